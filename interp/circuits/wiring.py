"""Norms and matrices by which blocks read and write the residual stream.

A receiver reads ``W · norm(x) + b``. A head adds ``W_O · z`` to the stream; the output bias belongs to no head. Before
edges are computed, `Wiring.check` compares both equations with the model's own activations. It raises ModelError for a
model in which they do not hold (norms behind attention, latent attention, scaled residuals).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.circuits.capture import capture
from interp.circuits.topology import Architecture, architecture
from interp.errors import ModelError
from interp.model.model import Model

TOLERANCE = 1e-3  # share of the activations' scale; float32 rounding is far below it, a missing norm far above
ROUNDINGS = 4  # tolerance in roundings of the activations' dtype, if that is more (bfloat16, float16)
CHECK_TOKENS = 64  # tokens of a prompt that suffice for `Wiring.check`


class Wiring:
    """Norms and matrices of one model.

    Raises ModelError if its edges are not defined.
    """

    def __init__(self, model: Model):
        self.model = model
        self.graph: Architecture = architecture(model)
        self._is_checked = False
        self._blocks = [_block_modules(model, layer) for layer in range(model.n_layers)]

    @classmethod
    def checked(cls, model: Model, ids: Sequence[int]) -> Wiring:
        """The wiring of a model, compared with its activations on one prompt (`check`)."""
        wiring = cls(model)
        wiring.check(ids)
        return wiring

    def norm(self, layer: int, before: str) -> Any:
        """The norm in front of a layer's attention (``"attn"``) or MLP (``"mlp"``)."""
        return self._blocks[layer][before]

    def head_count(self, component: str) -> int:
        """Number of heads of q, k, v or z."""
        return self.graph.n_kv_heads if component in ("k", "v") else self.graph.n_heads

    def reads(self, layer: int, component: str) -> Float[Tensor, "heads d_head d_model"]:
        """The matrices of a layer's q, k or v, by head."""
        return _matrix(self._blocks[layer][component]).unflatten(0, (self.head_count(component), -1))

    def bias(self, layer: int, component: str) -> Float[Tensor, "heads d_head"] | None:
        """The bias of a layer's q, k or v, by head."""
        bias = self._blocks[layer][component].bias
        return None if bias is None else bias.unflatten(0, (self.head_count(component), -1))

    def writes(self, layer: int) -> Float[Tensor, "heads d_model d_head"]:
        """W_O by head."""
        return _matrix(self._blocks[layer]["o"]).unflatten(1, (self.graph.n_heads, -1)).transpose(0, 1)

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The output bias, which a layer's attention adds besides what its heads add."""
        return self._blocks[layer]["o"].bias

    def project(
        self, layer: int, component: str, x: Float[Tensor, "#heads *rows d_model"]
    ) -> Float[Tensor, "*rows heads d_head"]:
        """q, k or v of a layer, for one residual stream per head, or one for all.

        A stream for all heads has #heads = 1.
        """
        normed, matrix = self.norm(layer, "attn")(x), self.reads(layer, component)
        if x.shape[0] == 1:
            out = torch.einsum("...d,hed->...he", normed[0], matrix)
        else:
            out = torch.einsum("h...d,hed->...he", normed, matrix)
        bias = self.bias(layer, component)
        return out if bias is None else out + bias

    def contributions(self, layer: int, z: Float[Tensor, "*rows heads d_head"]) -> Float[Tensor, "heads *rows d_model"]:
        """The addition of each head to the residual stream, without the output bias."""
        return torch.einsum("...he,hde->h...d", z, self.writes(layer))

    @torch.no_grad()
    def check(self, ids: Sequence[int]) -> None:
        """Compare with the model's activations on one prompt, in the first call only.

        Raises ModelError if they differ.
        """
        if self._is_checked:
            return
        acts = capture(self.model, [ids[:CHECK_TOKENS]], self.hook_names())
        for layer in range(self.graph.n_layers):
            self._check_layer(layer, acts)
        self._is_checked = True

    def hook_names(self) -> list[str]:
        """The hooks that `check` reads."""
        in_block = ["hook_resid_pre", "hook_attn_out", *(f"attn.hook_{c}" for c in "qkvz")]
        if self.graph.mlps:
            in_block += ["hook_mlp_out", "mlp.hook_in"]
        names = [f"blocks.{layer}.{name}" for layer in range(self.graph.n_layers) for name in in_block]
        return [*names, f"blocks.{self.graph.n_layers - 1}.hook_resid_post"]

    def _check_layer(self, layer: int, acts: dict[str, Tensor]) -> None:
        def at(name: str) -> Tensor:
            return acts[f"blocks.{layer}.{name}"]

        x = at("hook_resid_pre")
        for c in "qkv":
            projected = self.project(layer, c, x[None])
            self._check_equal(at(f"attn.hook_{c}"), projected, f"{c} = W · norm(residual) + b", layer)
        added = self.contributions(layer, at("attn.hook_z")).sum(0)
        bias = self.output_bias(layer)
        added = added if bias is None else added + bias
        self._check_equal(at("hook_attn_out"), added, "attn_out = Σ W_O z + b", layer)
        after = x + at("hook_attn_out")
        if self.graph.mlps:
            read = self.norm(layer, "mlp")(x if self.graph.parallel else after)
            self._check_equal(at("mlp.hook_in"), read, "MLP input = norm(residual)", layer)
            after = after + at("hook_mlp_out")
        last = layer == self.graph.n_layers - 1
        following = at("hook_resid_post") if last else acts[f"blocks.{layer + 1}.hook_resid_pre"]
        self._check_equal(following, after, "residual = sum of what its layers add", layer)

    def _check_equal(self, got: Tensor, want: Tensor, equation: str, layer: int) -> None:
        gap = (got - want).abs().max().item() if got.shape == want.shape else float("nan")
        if not gap <= tolerance(want.dtype) * max(1.0, want.abs().max().item()):
            raise ModelError(
                f"{self.model.name}, layer {layer}: not {equation} (largest gap {gap:.1e}); edges are defined only if "
                "blocks read the residual stream through a norm and a matrix, and add to it unscaled"
            )


def sender_hooks(wiring: Wiring) -> list[str]:
    """The hooks that carry the senders' outputs.

    These are the input of block 0, z of every layer, and the output of every MLP.
    """
    layers = range(wiring.graph.n_layers)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.attn.hook_z" for i in layers)]
    if wiring.graph.mlps:
        names += [f"blocks.{i}.hook_mlp_out" for i in layers]
    return names


def tolerance(dtype: torch.dtype) -> float:
    """Relative tolerance of activations that are computed in another order.

    It depends on their dtype, and is a share of their scale.
    """
    return max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)


def _block_modules(model: Model, layer: int) -> dict[str, Any]:
    """The torch modules of one block that read and write the stream.

    The norms are ``"attn"`` and ``"mlp"``; the projections are q, k, v and o.
    """
    block = model.bridge.blocks[layer]
    place = f"{model.name}, layer {layer}"
    norms = {name: module_behind(getattr(block, name, None)) for name in ("ln1", "ln2")}
    if norms["ln1"] is None:
        raise ModelError(f"{place} has no norm in front of its attention (ln1), so its edges are not defined")
    modules = {"attn": norms["ln1"], "mlp": norms["ln2"] or norms["ln1"]}
    for c in "qkvo":
        linear = module_behind(getattr(block.attn, c, None))
        weight = getattr(linear, "weight", None)
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            raise ModelError(f"{place}: its attention has no plain {c} projection, so its edges are not defined")
        modules[c] = linear
    return modules


def module_behind(bridge: Any) -> Any:
    """The torch module that a bridge component wraps; None if there is none."""
    if bridge is None:
        return None
    return bridge._modules.get("_original_component") or getattr(bridge, "original_component", None)


def _matrix(linear: Any) -> Float[Tensor, "out in"]:
    """A projection's matrix [out, in].

    transformers' Conv1D (GPT-2) stores its transpose.
    """
    weight = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.T
