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

One backward pass gives the gradients at all q, k, v, MLP inputs and the final residual stream, block by block
(`interp.circuits.attribution.gradients`). The gradient at what a single head reads follows from them by the
projection's and the norm's vector–Jacobian products, some tokens at a time (`interp.circuits.attribution.contraction`):
memory grows with tokens × d_model × layers, and not with the number of heads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.attribution.contraction import Contraction
from interp.circuits.attribution.gradients import Override, stream_gradients
from interp.circuits.capture import capture
from interp.circuits.inputs import token_batches
from interp.circuits.scores import EdgeScores
from interp.circuits.wiring import Wiring, sender_hooks
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, Readout, as_metric, logit_diff
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PromptPair, encode_pairs, listed_prompts
from interp.recipes.inputs import check_metric, provenance_of
from interp.recipes.scoring import readout
from interp.utils.progress import progress
from interp.utils.provenance import now, prompt_hash

Method = Literal["eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations"]
METHODS = ("eap", "clean-corrupted", "eap-ig-inputs", "eap-ig-activations")


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
    listed = listed_prompts(pairs)
    prompts = encode_pairs(listed, model.coder)
    check_metric(metric, prompts, model)
    wiring = Wiring(model)
    wiring.check(prompts[0].clean)
    totals = torch.zeros(wiring.graph.allowed.shape, dtype=torch.float64)
    with progress(f"attribute edges ({method})", len(prompts), show_progress) as advance:
        for batch in token_batches(prompts):
            totals += _Batch(wiring, [prompts[i] for i in batch], metric, mode, method).scores(method, steps)
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

    def __init__(self, wiring: Wiring, prompts: Sequence[Encoded], metric: Metric, mode: str, method: Method):
        self.wiring, self.model, self.graph, self.metric = wiring, wiring.model, wiring.graph, metric
        self.ids = {"clean": [p.clean for p in prompts], "corrupt": [p.corrupt for p in prompts]}
        self.base = "clean" if mode == "noise" else "corrupt"
        senders = sender_hooks(wiring)
        # corrupt activations are held only as far as the method sets activations between the two
        held = {"eap-ig-inputs": senders[:1], "eap-ig-activations": senders}.get(method, [])
        clean = capture(self.model, self.ids["clean"], senders)
        corrupt = capture(self.model, self.ids["corrupt"], senders)
        self.read: Readout = readout(prompts, list(clean.pop("logits")))
        self.corrupt = {name: corrupt[name] for name in held}
        self.change = {name: clean.pop(name) - corrupt.pop(name) for name in senders}  # clean − corrupt

    def scores(self, method: Method, steps: int) -> Float[Tensor, "receivers senders"]:
        """Sum over the examples, float64."""
        points = list(self._points(method, steps))
        contraction = Contraction(self.wiring, self.change)
        for run, override in points:
            stream_gradients(self.wiring, self.ids[run], self.metric, self.read, override, contraction.receive)
            contraction.flush()
        return contraction.total * ((-1 if self.base == "clean" else 1) / len(points))

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
            # all heads of a layer are interpolated together; z is linear in them, so the attention output is too
            for name in sender_hooks(self.wiring):
                for k in range(1, steps + 1):
                    yield "clean", self._between(name, k / steps)

    def _between(self, name: str, clean: float) -> Override:
        return name, lambda x, hook: torch.add(self.corrupt[name], self.change[name], alpha=clean)
