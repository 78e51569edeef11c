"""How a model's blocks read and write the residual stream, as norms and matrices: what edges are computed with.

A receiver reads ``W · norm(x) + b``; a head adds ``W_O · z`` to the stream (the output bias belongs to no head). Before
anything is computed with them, `Wiring.check` compares both with the model's own activations, and refuses a model in
which they do not hold (norms behind attention, latent attention, scaled residuals).
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

TOLERANCE = 1e-3  # of the activations' own scale; rounding of float32 is far below, a missing norm far above
ROUNDINGS = 4  # of the activations' type, where those are more: of bfloat16 and float16
CHECKED = 64  # tokens of a prompt that are enough to tell


class Wiring:
    """Norms and matrices of one model. Raises ModelError where edges are not defined."""

    def __init__(self, model: Model):
        self.model = model
        self.graph: Architecture = architecture(model)
        self.checked = False
        parts = [_parts(model, layer) for layer in range(model.n_layers)]
        self._norms = [(p["attn"], p.get("mlp")) for p in parts]
        self._linears: list[dict[str, Any]] = [{c: p[c] for c in "qkvo"} for p in parts]

    def norm(self, layer: int, into: str) -> Any:
        """The norm in front of a layer's attention (``"attn"``) or MLP (``"mlp"``)."""
        return self._norms[layer][into == "mlp"]

    def heads(self, component: str) -> int:
        """Heads of q, k, v or z."""
        return self.graph.n_kv_heads if component in ("k", "v") else self.graph.n_heads

    def reads(self, layer: int, component: str) -> Float[Tensor, "heads d_head d_model"]:
        """The matrices of a layer's q, k or v, by head."""
        return _matrix(self._linears[layer][component]).unflatten(0, (self.heads(component), -1))

    def bias(self, layer: int, component: str) -> Float[Tensor, "heads d_head"] | None:
        """The bias of a layer's q, k or v, by head."""
        bias = self._linears[layer][component].bias
        return None if bias is None else bias.unflatten(0, (self.heads(component), -1))

    def writes(self, layer: int) -> Float[Tensor, "heads d_model d_head"]:
        """W_O by head."""
        return _matrix(self._linears[layer]["o"]).unflatten(1, (self.graph.n_heads, -1)).transpose(0, 1)

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """What a layer's attention adds beside its heads."""
        return self._linears[layer]["o"].bias

    def project(
        self, layer: int, component: str, x: Float[Tensor, "#heads *rows d_model"]
    ) -> Float[Tensor, "*rows heads d_head"]:
        """q, k or v of a layer, where each head reads a residual stream of its own (one for all: heads = 1)."""
        normed, matrix = self.norm(layer, "attn")(x), self.reads(layer, component)
        if x.shape[0] == 1:
            out = torch.einsum("...d,hed->...he", normed[0], matrix)
        else:
            out = torch.einsum("h...d,hed->...he", normed, matrix)
        bias = self.bias(layer, component)
        return out if bias is None else out + bias

    def contributions(self, layer: int, z: Float[Tensor, "*rows heads d_head"]) -> Float[Tensor, "heads *rows d_model"]:
        """What each head adds to the residual stream, without the output bias."""
        return torch.einsum("...he,hde->h...d", z, self.writes(layer))

    @torch.no_grad()
    def check(self, ids: Sequence[int]) -> None:
        """Compare with the model's activations on one prompt, once. Raises ModelError if they differ."""
        if self.checked:
            return
        found = capture(self.model, [ids[:CHECKED]], self.hook_names())
        for layer in range(self.graph.n_layers):
            self._check_layer(layer, found)
        self.checked = True

    def hook_names(self) -> list[str]:
        """The hooks that `check` reads."""
        mine = ["hook_resid_pre", "hook_attn_out", *(f"attn.hook_{c}" for c in "qkvz")]
        mine += ["hook_mlp_out", "mlp.hook_in"] if self.graph.mlps else []
        names = [f"blocks.{layer}.{name}" for layer in range(self.graph.n_layers) for name in mine]
        return [*names, f"blocks.{self.graph.n_layers - 1}.hook_resid_post"]

    def _check_layer(self, layer: int, found: dict[str, Tensor]) -> None:
        def at(name: str) -> Tensor:
            return found[f"blocks.{layer}.{name}"]

        x = at("hook_resid_pre")
        for c in "qkv":
            self._same(at(f"attn.hook_{c}"), self.project(layer, c, x[None]), f"{c} = W · norm(residual) + b", layer)
        added = self.contributions(layer, at("attn.hook_z")).sum(0)
        bias = self._linears[layer]["o"].bias
        self._same(at("hook_attn_out"), added if bias is None else added + bias, "attn_out = Σ W_O z + b", layer)
        after = x + at("hook_attn_out")
        if self.graph.mlps:
            read = self.norm(layer, "mlp")(x if self.graph.parallel else after)
            self._same(at("mlp.hook_in"), read, "MLP input = norm(residual)", layer)
            after = after + at("hook_mlp_out")
        last = layer == self.graph.n_layers - 1
        following = at("hook_resid_post") if last else found[f"blocks.{layer + 1}.hook_resid_pre"]
        self._same(following, after, "residual = sum of what its layers add", layer)

    def _same(self, got: Tensor, want: Tensor, what: str, layer: int) -> None:
        gap = (got - want).abs().max().item() if got.shape == want.shape else float("nan")
        if not gap <= tolerance(want.dtype) * max(1.0, want.abs().max().item()):
            raise ModelError(
                f"{self.model.name}, layer {layer}: not {what} (largest gap {gap:.1e}); edges are defined only where "
                "blocks read the residual stream by a norm and a matrix, and add to it as they are"
            )


def sender_hooks(wiring: Wiring) -> list[str]:
    """The hooks that carry what senders send: what enters block 0, z of every layer, the output of every MLP."""
    layers = range(wiring.graph.n_layers)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.attn.hook_z" for i in layers)]
    return names + [f"blocks.{i}.hook_mlp_out" for i in layers] * wiring.graph.mlps


def tolerance(dtype: torch.dtype) -> float:
    """By which share of their scale activations of a type may differ that are computed in another order."""
    return max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)


def _parts(model: Model, layer: int) -> dict[str, Any]:
    """The torch modules of one block that edges are computed with."""
    block = model.bridge.blocks[layer]
    where = f"{model.name}, layer {layer}"
    norms = {name: module_behind(getattr(block, name, None)) for name in ("ln1", "ln2")}
    if norms["ln1"] is None:
        raise ModelError(f"{where} has no norm in front of its attention (ln1), so that edges are not defined")
    found = {"attn": norms["ln1"], "mlp": norms["ln2"] or norms["ln1"]}
    for c in "qkvo":
        linear = module_behind(getattr(block.attn, c, None))
        weight = getattr(linear, "weight", None)
        if weight is None or weight.ndim != 2 or not weight.is_floating_point():
            raise ModelError(f"{where}: its attention has no plain {c} projection, so that edges are not defined")
        found[c] = linear
    return found


def module_behind(bridge: Any) -> Any:
    """The torch module behind a bridge component; None if there is none."""
    if bridge is None:
        return None
    return bridge._modules.get("_original_component") or getattr(bridge, "original_component", None)


def _matrix(linear: Any) -> Float[Tensor, "out in"]:
    """A projection's matrix; transformers' Conv1D (GPT-2) stores it the other way round."""
    weight = linear.weight.detach()
    return weight if isinstance(linear, nn.Linear) else weight.T
