"""Attribution of edges by gradients: EAP and EAP-IG, also for grouped queries.

The score of an edge u → r is (source(u) − base(u)) · ∂metric/∂(input of r), summed over positions and averaged over
examples. It estimates how the metric of the base run would change if r alone read u as it is in the source run (Syed
et al. 2023, arXiv 2310.10348; Hanna et al. 2024, arXiv 2403.17806). Methods differ in where the gradient is taken:

* ``"eap"``: in the base run.
* ``"clean-corrupted"``: the mean of the gradients in both runs.
* ``"eap-ig-inputs"``: the mean over ``steps`` runs of the clean prompt, in which the input of block 0 is corrupt +
  (k/steps)(clean − corrupt), k = 0 … steps − 1. As in the authors' code, the corrupt end counts and the clean end does
  not.
* ``"eap-ig-activations"``: the mean over runs of the clean prompt. In each run, one layer's attention output, one MLP's
  output, or the input is corrupt + (k/steps)(clean − corrupt), k = 1 … steps. As in the authors' code, the activation
  that is set is a constant, through which no gradient passes, and all edges count in all of these
  steps × (2 × layers + 1) runs.

One backward pass gives the gradients at all q, k, v, MLP inputs and the final residual stream, block by block
(`interp.circuits.attribution.gradients`). The gradient at a single head's input follows from them by vector–Jacobian
products of the projection and the norm, for a chunk of tokens at a time (`interp.circuits.attribution.contraction`).
Memory grows with tokens × d_model × layers, and not with the number of heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.attribution.contraction import Contraction
from interp.circuits.attribution.gradients import Override, stream_gradients
from interp.circuits.attribution.slope import check_slope
from interp.circuits.capture import capture
from interp.circuits.choices import EdgeMethod
from interp.circuits.inputs import Pairs, token_batches
from interp.circuits.scores import EdgeScores
from interp.circuits.wiring import Wiring, sender_hooks
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, Readout, as_metric, logit_diff
from interp.model.layer_progress import by_layer
from interp.model.model import Model
from interp.model.prompt_provenance import prompt_provenance
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import encode_pairs, listed_prompts
from interp.recipes.choices import MODES
from interp.recipes.inputs import check_metric, provenance_of
from interp.recipes.patching import Mode
from interp.recipes.scoring import readout
from interp.utils.arguments import check_whole
from interp.utils.progress import progress


@in_session
def attribute_edges(
    model: Model,
    pairs: Pairs,
    metric: Metric | MetricFn | str = logit_diff,
    method: EdgeMethod = "eap-ig-inputs",
    mode: Mode = "noise",
    *,
    steps: int = 5,
    show_progress: bool | None = None,
) -> EdgeScores:
    """Score all edges of a model by gradients.

        known = interp.zoo.ioi()
        scores = attribute_edges(known.model, known.pairs(24), steps=5)
        circuit = scores.top(20)

    The module docstring describes the methods. ``mode="noise"`` (as published) estimates the change of the metric when
    the edge is corrupted in the clean run, so edges that carry the answer have negative scores under logit_diff;
    ``mode="denoise"`` estimates the change when the edge is restored in the corrupt run. ``steps`` is the number of
    steps of integrated gradients (5 in the MIB benchmark). Raises InterpError or PromptError for bad input, and
    ModelError if the model's edges are not defined, before any backward pass.
    """
    if method not in get_args(EdgeMethod) or mode not in MODES:
        methods = ", ".join(get_args(EdgeMethod))
        raise InterpError(f"method={method!r}, mode={mode!r}: expected one of {methods}, and 'noise' or 'denoise'")
    check_whole(1, steps=steps)
    metric = as_metric(metric)
    pair_list = listed_prompts(pairs)
    prompts = encode_pairs(pair_list, model.coder)
    check_metric(metric, prompts, model)
    wiring = Wiring.checked(model, prompts[0].clean)
    totals = torch.zeros(wiring.graph.allowed.shape, dtype=torch.float64)
    with progress(f"attribute edges ({method})", len(prompts), show_progress) as advance:
        for batch in token_batches(prompts):
            forwards = 2 + (steps if "-ig-" in method else 1)
            with by_layer(model, advance, len(batch), forwards):
                totals += _EdgeBatch(wiring, [prompts[i] for i in batch], metric, mode, method, steps).scores(
                    method, steps
                )
    provenance = {
        **prompt_provenance(model, pair_list, prompts),
        "method": method, "mode": mode, "metric": metric.name, "metric_direction": metric.direction,
        "steps": steps if "-ig-" in method else None,
        "evidence": "estimate by gradients", **provenance_of(pairs), **model.head_axes.told("qkv"),
    }  # fmt: skip
    return EdgeScores(wiring.graph, (totals / len(prompts)).numpy(), provenance)


class _EdgeBatch:
    """Pairs of one length: senders' outputs, and the runs that take gradients."""

    def __init__(
        self, wiring: Wiring, prompts: Sequence[Encoded], metric: Metric, mode: Mode, method: EdgeMethod, steps: int
    ):
        self.wiring, self.model, self.graph, self.metric = wiring, wiring.model, wiring.graph, metric
        self.ids = {"clean": [p.clean for p in prompts], "corrupt": [p.corrupt for p in prompts]}
        self.base = "clean" if mode == "noise" else "corrupt"
        senders = sender_hooks(wiring)
        # corrupt activations are held only if the method interpolates between the two runs there
        interpolated = {"eap-ig-inputs": senders[:1], "eap-ig-activations": senders}.get(method, [])
        clean = capture(self.model, self.ids["clean"], senders)
        corrupt = capture(self.model, self.ids["corrupt"], senders)
        logits = {"clean": clean.pop("logits"), "corrupt": corrupt.pop("logits")}
        self.read: Readout = readout(prompts, list(logits["clean"]))
        if (base := self._only_base(method, steps)) is not None:
            other = "corrupt" if base == "clean" else "clean"
            check_slope(metric, logits[base], logits[other], self.read, base)
        self.corrupt = {name: corrupt[name] for name in interpolated}
        self.change = {name: clean.pop(name) - corrupt.pop(name) for name in senders}  # clean − corrupt

    def _only_base(self, method: EdgeMethod, steps: int) -> str | None:
        """The one run in which gradients are taken; None if they are taken between or in both."""
        if method == "eap-ig-activations" and steps == 1:
            return "clean"  # the only step is the whole way
        return self.base if method == "eap" else None

    def scores(self, method: EdgeMethod, steps: int) -> Float[Tensor, "receivers senders"]:
        """Sum of the scores over the examples, float64."""
        runs = list(self._gradient_runs(method, steps))
        contraction = Contraction(self.wiring, self.change)
        for prompt, override in runs:
            stream_gradients(self.wiring, self.ids[prompt], self.metric, self.read, override, contraction.receive)
            contraction.flush()
        return contraction.total * ((-1 if self.base == "clean" else 1) / len(runs))

    def _gradient_runs(self, method: EdgeMethod, steps: int) -> Iterator[tuple[str, Override | None]]:
        """The runs in which gradients are taken.

        Each is "clean" or "corrupt" prompts, with an activation to override.
        """
        if method == "eap":
            yield self.base, None
        elif method == "clean-corrupted":
            yield from (("clean", None), ("corrupt", None))
        elif method == "eap-ig-inputs":
            for k in range(steps):
                yield "clean", self._interpolate("blocks.0.hook_resid_pre", k / steps)
        else:
            # all heads of a layer are interpolated together; z is linear in them, so the attention output is too
            for name in sender_hooks(self.wiring):
                for k in range(1, steps + 1):
                    yield "clean", self._interpolate(name, k / steps)

    def _interpolate(self, name: str, clean: float) -> Override:
        """Set an activation to corrupt + ``clean`` × (clean − corrupt)."""
        return name, lambda x, hook: torch.add(self.corrupt[name], self.change[name], alpha=clean)
