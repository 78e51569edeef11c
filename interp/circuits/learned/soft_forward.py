"""Run a model with a weight on every edge, with gradients for the weights.

Used by edge pruning. As in `interp.circuits.evaluation.ablated_forward`, except that an edge of weight z carries z ·
current + (1 − z) · ablated. The backward pass stores only the model's own activations: z of attention and the outputs
of MLPs. Receivers' inputs are computed again, and senders' outputs, d_model numbers each, exist for one layer at a time
in both passes. The price is time: for every layer's receivers, a forward adds the output projection of every earlier
layer, and the backward pass adds it three more times, so cost grows with the square of the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from interp.circuits.wiring import Wiring
from interp.model.hooks import hooks


@dataclass(frozen=True)
class SenderGroup:
    """The senders at one hook: columns, ablated activations, and layer.

    ``layer`` is None except for heads.
    """

    columns: slice
    ablated: Tensor
    layer: int | None


class _Mix(torch.autograd.Function):
    """stream + Σ over senders of (1 − z) (ablated − current), for some receivers."""

    @staticmethod
    def forward(
        ctx: Any, wiring: Wiring, groups: list[SenderGroup], cut: Tensor, stream: Tensor, *current: Tensor
    ) -> Tensor:
        ctx.wiring, ctx.groups = wiring, groups
        ctx.save_for_backward(cut, *current)
        out = stream.expand(len(cut), *stream.shape).clone()
        for group, x in zip(groups, current, strict=True):
            out += torch.einsum("rs,s...->r...", cut[:, group.columns], _changes(wiring, group, x))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (cut, *current) = grads, ctx.saved_tensors
        flat, cut_grad, current_grads = grad.flatten(1), torch.zeros_like(cut), []
        for group, x in zip(ctx.groups, current, strict=True):
            cut_grad[:, group.columns] = flat @ _changes(ctx.wiring, group, x).flatten(1).T
            back = -torch.einsum("rs,r...->s...", cut[:, group.columns], grad)
            if group.layer is None:
                current_grads.append(back[0])
            else:
                current_grads.append(torch.einsum("h...d,hde->...he", back, ctx.wiring.writes(group.layer)))
        return None, None, cut_grad, grad.sum(0), *current_grads


def _changes(wiring: Wiring, group: SenderGroup, current: Tensor) -> Float[Tensor, "senders batch position d_model"]:
    """Ablated − current of what each sender of a group adds to the residual stream."""
    change = group.ablated - current
    return change[None] if group.layer is None else wiring.contributions(group.layer, change)


def run_weighted(
    wiring: Wiring,
    ids: Sequence[Sequence[int]],
    weights: Float[Tensor, "receivers senders"],
    ablated: dict[str, Tensor],
) -> Float[Tensor, "batch vocab"]:
    """Logits of prompts of one length, with gradients for ``weights``.

    Weights without an edge are not read. ``ablated``: by `sender_hooks`, the senders' activations on edges of weight 0.
    """
    return _WeightedForward(wiring, weights, ablated)(ids)


class _WeightedForward:
    """One forward of prompts of one length with weights on edges."""

    def __init__(self, wiring: Wiring, weights: Tensor, ablated: dict[str, Tensor]):
        self.wiring, self.graph, self.ablated = wiring, wiring.graph, ablated
        allowed = torch.from_numpy(self.graph.allowed).to(weights.device)
        self.cut = torch.where(allowed, 1 - weights, torch.zeros_like(weights)).to(wiring.model.dtype)
        self.current: dict[str, Tensor] = {}  # activations of this run, by hook name
        self.projected: dict[int, dict[str, Tensor]] = {}

    def __call__(self, ids: Sequence[Sequence[int]]) -> Tensor:
        model, pairs = self.wiring.model, []
        for layer in range(self.graph.n_layers):
            at = f"blocks.{layer}."
            pairs += [(at + n, self._store(at + n)) for n in ("hook_resid_pre", "attn.hook_z", "hook_attn_out")]
            pairs += [(f"{at}attn.hook_{c}", self._project(layer, c)) for c in "qkv"]
            if self.graph.mlps:
                pairs.append((at + "mlp.hook_in", self._mlp(layer)))
                pairs.append((at + "hook_mlp_out", self._store(at + "hook_mlp_out")))
        pairs.append((f"blocks.{self.graph.n_layers - 1}.hook_resid_post", self._final))
        with hooks(model, *pairs):
            return model.last_logits(ids)

    def _store(self, name: str) -> Any:
        def hook(x: Tensor, hook: Any) -> None:
            self.current[name] = x

        return hook

    def _project(self, layer: int, component: str) -> Any:
        """The hook that computes q, k or v of a layer from its receivers' inputs."""

        def hook(x: Tensor, hook: Any) -> Tensor:
            if layer not in self.projected:  # q, k and v of a layer together
                self.projected[layer] = self._projections(layer)
            return self.projected[layer].pop(component)

        return hook

    def _projections(self, layer: int) -> dict[str, Tensor]:
        rows = slice(self.graph.rows(layer, "q").start, self.graph.rows(layer, "v").stop)
        sizes = [self.wiring.head_count(c) for c in "qkv"]

        def project(mixed: Tensor) -> tuple[Tensor, ...]:
            parts = zip("qkv", mixed.split(sizes), strict=True)
            return tuple(self.wiring.project(layer, c, x) for c, x in parts)

        projections = self._mix(rows, layer - 1, self.current[f"blocks.{layer}.hook_resid_pre"], project)
        return dict(zip("qkv", projections, strict=True))

    def _mlp(self, layer: int) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            stream = self.current[f"blocks.{layer}.hook_resid_pre"]
            if not self.graph.parallel:
                stream = stream + self.current[f"blocks.{layer}.hook_attn_out"]
            rows, norm = self.graph.rows(layer, "mlp_out"), self.wiring.norm(layer, "mlp")
            return self._mix(rows, layer, stream, lambda mixed: norm(mixed[0]))

        return hook

    def _final(self, x: Tensor, hook: Any) -> Tensor:
        last = self.graph.n_layers - 1
        return self._mix(self.graph.rows(last, "resid_post"), last, x, lambda mixed: mixed[0])

    def _mix(self, rows: slice, last_layer: int, stream: Tensor, function: Any) -> Any:
        """``function`` of the mixed inputs of some receivers.

        Both are computed again in the backward pass.
        """
        groups, current = self._senders_before(rows, last_layer)

        def compute(cut: Tensor, stream: Tensor, *current: Tensor) -> Any:
            return function(_Mix.apply(self.wiring, groups, cut, stream, *current))

        return checkpoint(compute, self.cut[rows], stream, *current, use_reentrant=False)

    def _senders_before(self, rows: slice, last_layer: int) -> tuple[list[SenderGroup], list[Tensor]]:
        """The senders that some receivers may read, with their activations.

        These are the input, and heads and MLPs of layers up to ``last_layer``.
        """
        places: list[tuple[slice, str, int | None]] = [(slice(0, 1), "blocks.0.hook_resid_pre", None)]
        for layer in range(last_layer + 1):
            places.append((self.graph.columns(layer, "z"), f"blocks.{layer}.attn.hook_z", layer))
            if self.graph.mlps:
                places.append((self.graph.columns(layer, "mlp_out"), f"blocks.{layer}.hook_mlp_out", None))
        readable = [p for p in places if self.graph.allowed[rows, p[0]].any()]
        groups = [SenderGroup(columns, self.ablated[name], layer) for columns, name, layer in readable]
        return groups, [self.current[name] for _, name, _ in readable]
