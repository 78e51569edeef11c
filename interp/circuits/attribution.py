"""Attribution of edges: EAP and EAP-IG, for grouped queries too, one layer's receivers at a time.

The score of an edge u → r is (source(u) − base(u)) · ∂metric/∂(input of r), summed over positions and averaged over
examples: an estimate of how the metric of the base run would change if r alone read u as it is in the source run (Syed
et al. 2023, arXiv 2310.10348; Hanna et al. 2024, arXiv 2403.17806). Methods differ in where the gradient is taken:

* ``"eap"``: in the base run.
* ``"clean-corrupted"``: the mean of the gradients in both runs.
* ``"eap-ig-inputs"``: the mean over ``steps`` runs of the clean prompt, in which what enters block 0 is corrupt +
  (k/steps)(clean − corrupt), k = 0 … steps − 1: as in the authors' code, the corrupt end counts and the clean one does
  not.
* ``"eap-ig-activations"``: the mean over runs of the clean prompt in each of which one layer's attention output, one
  MLP's output, or the input is corrupt + (k/steps)(clean − corrupt), k = 1 … steps. What is set is a
  constant, through which no gradient passes, and all edges count in all of these steps × (2 × layers + 1) runs: both
  as in the authors' code.

One backward pass gives the gradients at all q, k, v, MLP inputs and the final residual stream. The gradient at what a
single head reads follows from them by the projection's and the norm's vector–Jacobian products. Of gradients with
d_model numbers per receiver, those of some layers exist at a time (`RECEIVER_BYTES`); of senders' outputs, one layer's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.evaluation import token_batches
from interp.circuits.running import sender_hooks
from interp.circuits.scores import EdgeScores
from interp.circuits.wiring import Wiring, capture
from interp.engine.runs import hooks
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, Readout, as_metric, logit_diff
from interp.model import Model
from interp.progress import progress
from interp.prompts import Encoded, PromptPair, encode_pairs
from interp.provenance import now, prompt_hash
from interp.recipes import check_metric, provenance_of, readout

Method = Literal["eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations"]
METHODS = ("eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations")
Override = tuple[str, Any]  # a hook that sets an activation
RECEIVER_BYTES = 256 * 2**20  # gradients of receivers, d_model numbers each, that exist at one time


def attribute_edges(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    metric: Metric | MetricFn | str = logit_diff,
    method: Method = "eap-ig-inputs",
    mode: Literal["noise", "denoise"] = "noise",
    *,
    steps: int = 5,
    show_progress: bool | None = None,
) -> EdgeScores:
    """Scores of all edges of a model by gradients: see this module's first lines for the methods.

    ``mode="noise"`` (as published): the change of the metric when the edge is corrupted in the clean run, so that
    edges which carry the answer score negative under logit_diff; ``"denoise"``: when it is restored in the corrupt run.
    ``steps``: of integrated gradients (5 in the MIB benchmark). Raises InterpError or PromptError for bad input,
    ModelError where edges are not defined, before any backward pass.
    """
    if method not in METHODS or mode not in ("noise", "denoise"):
        raise InterpError(f"method={method!r}, mode={mode!r}: one of {', '.join(METHODS)}, and 'noise' or 'denoise'")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InterpError(f"steps={steps!r}: a whole number from 1 on is expected")
    metric = as_metric(metric)
    listed = [pairs] if isinstance(pairs, PromptPair) else list(pairs)
    prompts = encode_pairs(listed, model.coder)
    check_metric(metric, prompts)
    wiring = Wiring(model)
    wiring.check(prompts[0].clean)
    totals = torch.zeros(wiring.graph.allowed.shape, dtype=torch.float64)
    with progress(f"attribute edges ({method})", len(prompts), show_progress) as advance:
        for batch in token_batches(prompts):
            totals += _Batch(wiring, [prompts[i] for i in batch], metric, mode).scores(method, steps)
            advance(len(batch))
    provenance = {
        **model.provenance(), "prompts": prompt_hash(listed), "n_prompts": len(listed), "created": now(),
        "method": method, "mode": mode, "metric": metric.name, "metric_direction": metric.direction,
        "steps": steps if "-ig-" in method else None,
        "evidence": "estimate by gradients", **provenance_of(pairs),
    }  # fmt: skip
    return EdgeScores(wiring.graph, (totals / len(prompts)).numpy(), provenance)


class _Batch:
    """Some pairs of one length."""

    def __init__(self, wiring: Wiring, prompts: Sequence[Encoded], metric: Metric, mode: str):
        self.wiring, self.model, self.graph, self.metric = wiring, wiring.model, wiring.graph, metric
        self.ids = {"clean": [p.clean for p in prompts], "corrupt": [p.corrupt for p in prompts]}
        self.senders = sender_hooks(wiring)
        self.acts = {run: capture(self.model, ids, self.senders) for run, ids in self.ids.items()}
        self.base, self.source = ("clean", "corrupt") if mode == "noise" else ("corrupt", "clean")
        self.read: Readout = readout(prompts, list(self.acts["clean"]["logits"]))

    def scores(self, method: Method, steps: int) -> Float[Tensor, "receivers senders"]:
        """Sum over the examples, float64."""
        points = list(self._points(method, steps))
        total = torch.zeros(self.graph.allowed.shape, dtype=torch.float64)
        for run, override in points:
            total += self._contract(gradients(self.wiring, self.ids[run], self.metric, self.read, override))
        return total / len(points)

    def _points(self, method: Method, steps: int) -> Iterator[tuple[str, Override | None]]:
        """The runs in which gradients are taken: a prompt, and what is overridden in it."""
        if method == "eap":
            yield self.base, None
        elif method == "clean-corrupted":
            yield from (("clean", None), ("corrupt", None))
        elif method == "eap-ig-inputs":
            for k in range(steps):
                yield "clean", self._between("blocks.0.hook_resid_pre", k / steps)
        else:
            layers = range(self.graph.n_layers)
            # all heads of a layer are interpolated together; z is linear in them, so the attention output is too
            names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.attn.hook_z" for i in layers)]
            names += [f"blocks.{i}.hook_mlp_out" for i in layers] * self.graph.mlps
            for name in names:
                for k in range(1, steps + 1):
                    yield "clean", self._between(name, k / steps)

    def _between(self, name: str, clean: float) -> Override:
        a, b = self.acts["corrupt"][name], self.acts["clean"][name]
        return name, lambda x, hook: torch.lerp(a, b, clean)

    def _contract(self, grads: Gradients) -> Float[Tensor, "receivers senders"]:
        """(source − base) · gradient for all edges, some layers' receivers and one layer's senders at a time."""
        out = torch.zeros(self.graph.allowed.shape, dtype=torch.float64)
        for rows, received in grads.receivers():
            last = self.graph.receivers[rows.stop - 1]
            flat = received.flatten(1)
            for columns, sent in self._sent(last.layer or 0):
                out[rows, columns] = (flat @ sent.flatten(1).T).double().cpu()
        return out

    def _sent(self, upto: int) -> Iterator[tuple[slice, Float[Tensor, "senders batch position d_model"]]]:
        """Source − base of what senders in layers ≤ ``upto`` add, layer by layer, with their columns."""
        yield slice(0, 1), self._difference("blocks.0.hook_resid_pre")[None]
        for layer in range(upto + 1):
            z = self._difference(f"blocks.{layer}.attn.hook_z")
            yield self.graph.columns(layer, "z"), self.wiring.contributions(layer, z)
            if self.graph.mlps:
                yield self.graph.columns(layer, "mlp_out"), self._difference(f"blocks.{layer}.hook_mlp_out")[None]

    def _difference(self, name: str) -> Tensor:
        return self.acts[self.source][name] - self.acts[self.base][name]


class Gradients:
    """Gradients of a metric, summed over a batch, at the inputs of all receivers.

    ``found`` holds them at q, k and v [batch, position, heads, d_head], at MLPs' normed inputs and the final residual
    stream; ``stream`` the residual streams that attention and MLPs read, all by hook name.
    """

    def __init__(self, wiring: Wiring, found: dict[str, Tensor], stream: dict[tuple[int, str], Tensor]):
        self.wiring, self.found, self.stream = wiring, found, stream

    def receivers(self) -> Iterator[tuple[slice, Float[Tensor, "receivers batch position d_model"]]]:
        """With their rows: gradients at what each receiver reads, before the norm. Some layers' at a time."""
        graph = self.wiring.graph
        size = next(iter(self.stream.values()))
        per_layer = size.numel() * size.element_size() * len(graph.receivers) // graph.n_layers
        at_once = max(1, RECEIVER_BYTES // per_layer)
        for first in range(0, graph.n_layers, at_once):
            layers = range(first, min(first + at_once, graph.n_layers))
            parts = [part for layer in layers for part in self._layer(layer)]
            stop = graph.rows(layers[-1], "mlp_out" if graph.mlps else "v").stop
            yield slice(graph.rows(first, "q").start, stop), torch.cat(parts)
        final = self.found[f"blocks.{graph.n_layers - 1}.hook_resid_post"]
        yield slice(len(graph.receivers) - 1, len(graph.receivers)), final[None]

    def _layer(self, layer: int) -> Iterator[Float[Tensor, "receivers batch position d_model"]]:
        normed = [
            torch.einsum("bphe,hed->hbpd", self.found[f"blocks.{layer}.attn.hook_{c}"], self.wiring.reads(layer, c))
            for c in "qkv"
        ]
        yield through_norm(self.wiring.norm(layer, "attn"), self.stream[layer, "attn"], torch.cat(normed))
        if self.wiring.graph.mlps:
            at = self.found[f"blocks.{layer}.mlp.hook_in"][None]
            yield through_norm(self.wiring.norm(layer, "mlp"), self.stream[layer, "mlp"], at)


def through_norm(
    norm: Any, x: Float[Tensor, "*rows d_model"], grads: Float[Tensor, "receivers *rows d_model"]
) -> Float[Tensor, "receivers *rows d_model"]:
    """Vector–Jacobian products of a norm at ``x``, one per receiver."""
    with torch.enable_grad():
        copies = x.expand_as(grads).detach().clone().requires_grad_()
        normed = norm(copies)
        if normed is copies:  # no norm
            return grads
        return torch.autograd.grad(normed, copies, grads)[0]


def gradients(
    wiring: Wiring, ids: Sequence[Sequence[int]], metric: Metric, read: Readout, override: Override | None = None
) -> Gradients:
    """One forward and one backward pass of prompts of one length. ``override``: a hook that sets an activation."""
    model, graph = wiring.model, wiring.graph
    kept: dict[str, Tensor] = {}
    stream: dict[tuple[int, str], Tensor] = {}

    def branch(name: str) -> Override:
        """Keeps a copy that only this hook's consumer reads, so that its gradient is that consumer's alone."""

        def hook(x: Tensor, hook: Any) -> Tensor:
            kept[name] = x.clone()
            return kept[name]

        return name, hook

    def start(x: Tensor, hook: Any) -> Tensor:
        return (x if x.requires_grad else x.detach().requires_grad_()).clone()

    def note(layer: int, into: str) -> Override:
        hook = "hook_resid_pre" if into == "attn" or graph.parallel else "hook_resid_mid"
        return f"blocks.{layer}.{hook}", lambda x, hook: stream.__setitem__((layer, into), x.detach())

    pairs = [] if override is None else [override]
    pairs.append(("blocks.0.hook_resid_pre", start))
    for layer in range(graph.n_layers):
        pairs.append(note(layer, "attn"))
        pairs += [branch(f"blocks.{layer}.attn.hook_{c}") for c in "qkv"]
        if graph.mlps:
            pairs += [note(layer, "mlp"), branch(f"blocks.{layer}.mlp.hook_in")]
    pairs.append(branch(f"blocks.{graph.n_layers - 1}.hook_resid_post"))
    with weights_fixed(model), torch.enable_grad(), hooks(model, *pairs):
        logits = model.last_logits(torch.tensor([list(p) for p in ids], device=model.device))
        total = metric(logits, read).sum()
        if not total.requires_grad:
            raise InterpError(f"metric {metric.name!r} has no gradient: attribution needs one")
        found = torch.autograd.grad(total, list(kept.values()), allow_unused=True)
    zeros = (torch.zeros_like(x) if g is None else g for x, g in zip(kept.values(), found, strict=True))
    return Gradients(wiring, dict(zip(kept, zeros, strict=True)), stream)


@contextmanager
def weights_fixed(model: Model) -> Iterator[None]:
    """Inside, weights need no gradients, so that nothing is kept for them."""
    needed = [p for p in model.bridge.parameters() if p.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
