"""Run a model with a weight on every edge, with gradients for the weights: what edge pruning learns by.

As `interp.circuits.evaluation.ablated_forward`, but an edge of weight z carries z · current + (1 − z) · ablated. What
is kept for the backward pass are the model's own activations, z of attention and the outputs of MLPs: receivers' inputs
are computed again, and senders' outputs in d_model numbers exist for one layer at a time, in both passes. The price is
time: a forward adds, for every layer's receivers, the output projection of every earlier layer, and the backward pass
adds it three times more, so that cost grows with the square of the number of layers.
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
class Sent:
    """The columns of some senders, and what they send instead; ``layer``: of heads, whose z it is."""

    columns: slice
    ablated: Tensor
    layer: int | None


class _Mix(torch.autograd.Function):
    """stream + Σ over senders of (1 − z) (ablated − current), for some receivers."""

    @staticmethod
    def forward(ctx: Any, wiring: Wiring, sent: list[Sent], cut: Tensor, stream: Tensor, *now: Tensor) -> Tensor:
        ctx.wiring, ctx.sent = wiring, sent
        ctx.save_for_backward(cut, *now)
        out = stream.expand(len(cut), *stream.shape).clone()
        for part, x in zip(sent, now, strict=True):
            out += torch.einsum("rs,s...->r...", cut[:, part.columns], _outputs(wiring, part, x))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (cut, *now) = grads, ctx.saved_tensors
        flat, for_cut, for_now = grad.flatten(1), torch.zeros_like(cut), []
        for part, x in zip(ctx.sent, now, strict=True):
            for_cut[:, part.columns] = flat @ _outputs(ctx.wiring, part, x).flatten(1).T
            back = -torch.einsum("rs,r...->s...", cut[:, part.columns], grad)
            if part.layer is None:
                for_now.append(back[0])
            else:
                for_now.append(torch.einsum("h...d,hde->...he", back, ctx.wiring.writes(part.layer)))
        return None, None, for_cut, grad.sum(0), *for_now


def _outputs(wiring: Wiring, part: Sent, now: Tensor) -> Float[Tensor, "senders batch position d_model"]:
    change = part.ablated - now
    return change[None] if part.layer is None else wiring.contributions(part.layer, change)


def run_weighted(
    wiring: Wiring,
    ids: Sequence[Sequence[int]],
    weights: Float[Tensor, "receivers senders"],
    ablated: dict[str, Tensor],
) -> Float[Tensor, "batch vocab"]:
    """Logits of prompts of one length, with gradients for ``weights`` (those where there is no edge are not read).

    ``ablated``: by `sender_hooks`, what senders send along edges of weight 0.
    """
    return _Forward(wiring, weights, ablated)(ids)


class _Forward:
    def __init__(self, wiring: Wiring, weights: Tensor, ablated: dict[str, Tensor]):
        self.wiring, self.graph, self.ablated = wiring, wiring.graph, ablated
        allowed = torch.from_numpy(self.graph.allowed).to(weights.device)
        self.cut = torch.where(allowed, 1 - weights, torch.zeros_like(weights)).to(wiring.model.dtype)
        self.now: dict[str, Tensor] = {}
        self.projected: dict[int, dict[str, Tensor]] = {}

    def __call__(self, ids: Sequence[Sequence[int]]) -> Tensor:
        model, pairs = self.wiring.model, []
        for layer in range(self.graph.n_layers):
            at = f"blocks.{layer}."
            pairs += [(at + name, self._keep(at + name)) for name in ("hook_resid_pre", "attn.hook_z", "hook_attn_out")]
            pairs += [(f"{at}attn.hook_{c}", self._project(layer, c)) for c in "qkv"]
            if self.graph.mlps:
                pairs.append((at + "mlp.hook_in", self._mlp(layer)))
                pairs.append((at + "hook_mlp_out", self._keep(at + "hook_mlp_out")))
        pairs.append((f"blocks.{self.graph.n_layers - 1}.hook_resid_post", self._final))
        with hooks(model, *pairs):
            return model.last_logits(torch.tensor([list(p) for p in ids], device=model.device))

    def _keep(self, name: str) -> Any:
        return lambda x, hook: self.now.__setitem__(name, x)

    def _project(self, layer: int, component: str) -> Any:
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

        found = self._again(rows, layer - 1, self.now[f"blocks.{layer}.hook_resid_pre"], project)
        return dict(zip("qkv", found, strict=True))

    def _mlp(self, layer: int) -> Any:
        def hook(x: Tensor, hook: Any) -> Tensor:
            stream = self.now[f"blocks.{layer}.hook_resid_pre"]
            if not self.graph.parallel:
                stream = stream + self.now[f"blocks.{layer}.hook_attn_out"]
            rows, upto, norm = self.graph.rows(layer, "mlp_out"), layer, self.wiring.norm(layer, "mlp")
            return self._again(rows, upto, stream, lambda mixed: norm(mixed[0]))

        return hook

    def _final(self, x: Tensor, hook: Any) -> Tensor:
        last = self.graph.n_layers - 1
        return self._again(self.graph.rows(last, "resid_post"), last, x, lambda mixed: mixed[0])

    def _again(self, rows: slice, upto: int, stream: Tensor, then: Any) -> Any:
        """``then`` of the mixed inputs of some receivers, of which nothing is kept for the backward pass."""
        sent, now = self._sent(rows, upto)

        def compute(cut: Tensor, stream: Tensor, *now: Tensor) -> Any:
            return then(_Mix.apply(self.wiring, sent, cut, stream, *now))

        return checkpoint(compute, self.cut[rows], stream, *now, use_reentrant=False)

    def _sent(self, rows: slice, upto: int) -> tuple[list[Sent], list[Tensor]]:
        """All that may reach some receivers of a layer: the input, and heads and MLPs of layers up to ``upto``."""
        places: list[tuple[slice, str, int | None]] = [(slice(0, 1), "blocks.0.hook_resid_pre", None)]
        for layer in range(upto + 1):
            places.append((self.graph.columns(layer, "z"), f"blocks.{layer}.attn.hook_z", layer))
            if self.graph.mlps:
                places.append((self.graph.columns(layer, "mlp_out"), f"blocks.{layer}.hook_mlp_out", None))
        reached = [p for p in places if self.graph.allowed[rows, p[0]].any()]
        return [Sent(c, self.ablated[n], i) for c, n, i in reached], [self.now[n] for _, n, _ in reached]
