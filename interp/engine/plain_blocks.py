"""Blocks in bare matrix products, where the architecture is known to the letter: the same numbers, no detours.

Llama's block and those that copy it: norm by root mean square, rotary positions, SiLU-gated MLP. Weights are read
where they are, never copied. The engine checks these blocks, like all that it does, against full forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.engine.matmul import products_for
from interp.model.model import Model

FAMILIES = ("Llama", "Mistral", "Qwen2")
WRITABLE = frozenset({"resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z"})
ROWS = 512  # rows that go through an MLP together: its inner activations stay in the processor's cache
SWITCHES = ("use_attn_result", "use_split_qkv_input", "use_attn_in", "use_hook_mlp_in")


class RowWriter(Protocol):
    """What happens to a component where it is computed: `RowWrites` are written into it."""

    def put_(self, x: Tensor, headed: bool) -> None:
        """To [rows, (heads,) width], in place."""
        ...


WriterOf = Callable[[str], RowWriter | None]  # the writes of a component
Heads = Float[Tensor, "rows heads dim"]


@dataclass(frozen=True)
class Norm:
    """x / √(mean x² + eps) · weight. ``module``: the model's own, which in float64 rounds to float32 on its way."""

    module: Any
    weight: Float[Tensor, " d_model"]
    eps: float

    def __call__(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """Normed rows."""
        if x.dtype != torch.float32:
            return self.module(x[None])[0]
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = length.square_().div_(x.shape[-1]).add_(self.eps).rsqrt_()
        return (x * scale).mul_(self.weight)


@dataclass(frozen=True)
class PlainBlock:
    """One block's parts."""

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
        rows: WriterOf,
    ) -> list[Heads]:
        """Those of q, k and v that ``names`` has, with their writes, q and k then rotated."""
        product, normed, found = products_for(x.dtype, x.device), self.ln1(x), []
        for name in names:
            layer: nn.Linear = getattr(self, name)
            heads = product.linear(normed, layer.weight, layer.bias).unflatten(-1, (-1, self.d_head))
            if (written := rows(name)) is not None:
                written.put_(heads, headed=True)
            found.append(heads if name == "v" else _rotated(heads, *rotation.unbind(1)))
        return found

    def finish(self, x: Float[Tensor, "rows d_model"], z: Heads, rows: WriterOf) -> None:
        """From attention's output to the end of the block, in place of ``x``, which was its input."""
        product = products_for(x.dtype, x.device)
        written = {name: rows(name) for name in ("z", "attn_out", "resid_mid", "mlp_out")}
        if (at := written["z"]) is not None:
            at.put_(z, headed=True)
        z = z.flatten(1)
        self._add(x, lambda part: product.linear(z[part], self.o.weight, self.o.bias), written["attn_out"])
        if (at := written["resid_mid"]) is not None:
            at.put_(x, headed=False)

        def mlp(part: slice) -> Tensor:
            normed = self.ln2(x[part])
            inner = product.silu(normed, self.gate.weight, self.gate.bias)
            inner = product.times(normed, self.up.weight, self.up.bias, inner)
            return product.linear(inner, self.down.weight, self.down.bias)

        self._add(x, mlp, written["mlp_out"])

    @staticmethod
    def _add(x: Tensor, compute: Callable[[slice], Tensor], written: RowWriter | None) -> None:
        """x += compute, some rows at a time; whole if something is written into it."""
        if written is not None:
            out = torch.cat([compute(part) for part in _parts(len(x))])
            written.put_(out, headed=False)
            x += out
            return
        for part in _parts(len(x)):
            x[part].add_(compute(part))


def _parts(rows: int) -> list[slice]:
    return [slice(i, i + ROWS) for i in range(0, rows, ROWS)]


def _rotated(heads: Heads, cos: Tensor, sin: Tensor) -> Heads:
    """x · cos + (−second half, first half) · sin, the sign being taken by ``sin`` (see `rotation`)."""
    turned = heads.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.addcmul(heads * cos[:, None], turned, sin[:, None])


def rotation(cos: Tensor, sin: Tensor) -> Float[Tensor, "positions 2 d_head"]:
    """Rotary tables [1, positions, d_head] as one, with the minus of the first half moved into sin."""
    first, second = sin[0].chunk(2, dim=-1)
    return torch.stack([cos[0], torch.cat([-first, second], dim=-1)], dim=1)


def read_plain_blocks(model: Model) -> list[PlainBlock] | None:
    """The model's blocks, or None if some part is not known to the letter."""
    config = model.bridge.cfg
    if model.dtype not in (torch.float32, torch.float64) or any(getattr(config, switch, False) for switch in SWITCHES):
        return None
    blocks = [_block(bridge, int(config.d_head)) for bridge in model.bridge.blocks]
    known = [block for block in blocks if block is not None]
    return known if len(known) == len(blocks) else None


def has_fixed_rotary(model: Model) -> bool:
    """Whether a position's rotary angles are the same in prompts of any length."""
    given = getattr(model.bridge.original_model.config, "rope_parameters", None) or {}
    kinds = [given, *(v for v in given.values() if isinstance(v, dict))]  # some have one for each kind of layer
    return all(kind.get("rope_type", "default") not in ("dynamic", "longrope") for kind in kinds)


def _inner(module: Any) -> Any:
    """The module inside a TransformerLens bridge."""
    return getattr(module, "original_component", module)


def _block(bridge: Any, d_head: int) -> PlainBlock | None:
    layer = _inner(bridge)
    name = type(layer).__name__
    family = name.removesuffix("DecoderLayer")
    if family not in FAMILIES or name == family:
        return None
    attn, mlp = _inner(layer.self_attn), _inner(layer.mlp)
    own = (layer.input_layernorm, layer.post_attention_layernorm)
    norms = [_inner(n) for n in own]
    found = [type(m).__name__ for m in (attn, mlp, *norms)]
    if found != [f"{family}{part}" for part in ("Attention", "MLP", "RMSNorm", "RMSNorm")]:
        return None
    products = [_inner(getattr(attn, f"{n}_proj")) for n in "qkvo"]
    products += [_inner(getattr(mlp, f"{n}_proj")) for n in ("gate", "up", "down")]
    if any(type(p) is not nn.Linear for p in products) or type(mlp.act_fn).__name__ not in ("SiLU", "SiLUActivation"):
        return None
    q, k, v, o, gate, up, down = products
    ln1, ln2 = (Norm(m, n.weight, n.variance_epsilon) for m, n in zip(own, norms, strict=True))
    return PlainBlock(ln1, q, k, v, o, ln2, gate, up, down, d_head)
