"""Plain blocks: transformer blocks as bare matrix products.

They exist for architectures that are exactly known. They compute the same numbers as the model's own blocks, without
hooks and wrappers. Covered are Llama's block and its copies: root-mean-square norm, rotary positions, SiLU-gated MLP.
Weights are used where they are and never copied. The engine checks plain blocks, like everything else, against full
forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.engine.matmul import choose_products
from interp.model.model import Model

FAMILIES = ("Llama", "Mistral", "Qwen2")
WRITABLE = frozenset({"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z"})
ROWS = 512  # rows that go through an MLP together, so that its inner activations stay in the processor's cache
SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


class RowWriter(Protocol):
    """Receives a component where it is computed, e.g. `RowWrites`, which change it."""

    def put_(self, x: Tensor, headed: bool) -> None:
        """Read or change x [rows, (heads,) width] in place."""
        ...


WriterOf = Callable[[str], RowWriter | None]  # component -> its writer
Heads = Float[Tensor, "rows heads dim"]


@dataclass(frozen=True)
class Norm:
    """x / √(mean x² + eps) · weight.

    ``module``: the model's own norm, which in float64 rounds to float32 internally.
    """

    module: Any
    weight: Float[Tensor, " d_model"]
    eps: float

    def __call__(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """Return normed rows."""
        if x.dtype != torch.float32:
            return self.module(x[None])[0]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return (x * scale).mul_(self.weight)


@dataclass(frozen=True)
class PlainBlock:
    """The modules and weights of one block."""

    ln1: Norm
    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    ln2: Norm
    gate: nn.Linear
    up: nn.Linear
    down: nn.Linear
    d_head: int

    def project(
        self,
        x: Float[Tensor, "rows d_model"],
        names: str,
        rotation: Float[Tensor, "rows 2 d_head"],
        writer_of: WriterOf,
    ) -> list[Heads]:
        """Compute those of q, k and v that ``names`` contains.

        Applies their writes, and rotates q and k.
        """
        product, normed, out = choose_products(x.dtype, x.device), self.ln1(x), []
        for name in names:
            layer: nn.Linear = getattr(self, name)
            heads = product.linear(normed, layer.weight, layer.bias).unflatten(-1, (-1, self.d_head))
            if (writer := writer_of(name)) is not None:
                writer.put_(heads, headed=True)
            out.append(heads if name == "v" else _rotate(heads, *rotation.unbind(1)))
        return out

    def finish(self, x: Float[Tensor, "rows d_model"], z: Heads, writer_of: WriterOf) -> None:
        """Compute the block from attention's output to its end, in place.

        ``x`` holds the block's input, then its output.
        """
        product = choose_products(x.dtype, x.device)
        if (writer := writer_of("z")) is not None:
            writer.put_(z, headed=True)
        z = z.flatten(1)
        self._add(x, lambda part: product.linear(z[part], self.o.weight, self.o.bias), writer_of("attn_out"))
        if (writer := writer_of("resid_mid")) is not None:
            writer.put_(x, headed=False)

        def mlp(part: slice) -> Tensor:
            normed = self.ln2(x[part])
            inner = product.silu(normed, self.gate.weight, self.gate.bias)
            inner = product.times(normed, self.up.weight, self.up.bias, inner)
            return product.linear(inner, self.down.weight, self.down.bias)

        self._add(x, mlp, writer_of("mlp_out"))

    @staticmethod
    def _add(x: Tensor, compute: Callable[[slice], Tensor], writer: RowWriter | None) -> None:
        """Add what ``compute`` returns to x, some rows at a time.

        All rows at once if there is a writer.
        """
        if writer is not None:
            out = torch.cat([compute(part) for part in _parts(len(x))])
            writer.put_(out, headed=False)
            x += out
            return
        for part in _parts(len(x)):
            x[part].add_(compute(part))


def _parts(rows: int) -> list[slice]:
    return [slice(i, i + ROWS) for i in range(0, rows, ROWS)]


def _rotate(heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
    """Compute x · cos + (−second half, first half) · sin.

    ``sin`` already holds the minus sign (see `rotation`).
    """
    turned = heads.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(heads * cos[:, None], turned, sin[:, None])


def rotation(cos: Tensor, sin: Tensor) -> Float[Tensor, "positions 2 d_head"]:
    """Stack rotary tables [1, positions, d_head] into one.

    The minus sign of the first half moves into sin.
    """
    first, second = sin[0].chunk(2, dim=-1)
    return torch.stack([cos[0], torch.cat([-first, second], dim=-1)], dim=1)


def read_plain_blocks(model: Model) -> list[PlainBlock] | None:
    """Read the model's blocks as plain blocks; None if any part is not exactly known."""
    config = model.bridge.cfg
    if model.dtype not in (torch.float32, torch.float64) or any(getattr(config, switch, False) for switch in SWITCHES):
        return None
    blocks = [_block(bridge, int(config.d_head)) for bridge in model.bridge.blocks]
    plain = [block for block in blocks if block is not None]
    return plain if len(plain) == len(blocks) else None


def has_fixed_rotary(model: Model) -> bool:
    """Whether a position's rotary angles are the same in prompts of any length."""
    parameters = getattr(model.bridge.original_model.config, "rope_parameters", None) or {}
    kinds = [parameters, *(v for v in parameters.values() if isinstance(v, dict))]  # some have a set per kind of layer
    return all(kind.get("rope_type", "default") not in ("dynamic", "longrope") for kind in kinds)


def _inner(module: Any) -> Any:
    """The module inside a TransformerLens bridge."""
    return getattr(module, "original_component", module)


def _block(bridge: Any, d_head: int) -> PlainBlock | None:
    """Read one block from its bridge.

    Returns None if its classes are not those of a known family.
    """
    layer = _inner(bridge)
    name = type(layer).__name__
    family = name.removesuffix("DecoderLayer")
    if family not in FAMILIES or name == family:
        return None
    attn, mlp = _inner(layer.self_attn), _inner(layer.mlp)
    norm_bridges = (layer.input_layernorm, layer.post_attention_layernorm)
    norms = [_inner(n) for n in norm_bridges]
    class_names = [type(m).__name__ for m in (attn, mlp, *norms)]
    if class_names != [f"{family}{part}" for part in ("Attention", "MLP", "RMSNorm", "RMSNorm")]:
        return None
    products = [_inner(getattr(attn, f"{n}_proj")) for n in "qkvo"]
    products += [_inner(getattr(mlp, f"{n}_proj")) for n in ("gate", "up", "down")]
    if any(type(p) is not nn.Linear for p in products) or type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    q, k, v, o, gate, up, down = products
    ln1, ln2 = (Norm(m, n.weight, n.variance_epsilon) for m, n in zip(norm_bridges, norms, strict=True))
    return PlainBlock(ln1, q, k, v, o, ln2, gate, up, down, d_head)
