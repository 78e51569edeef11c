"""Faithfulness over circuit size, and its two integrals, CPR and CMD (MIB: Mueller et al. 2025, arXiv 2504.13151)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.evaluator import Ablation
from interp.circuits.evaluation.scale import Index, Pairs, Scale, with_interval
from interp.circuits.scores import EdgeScores
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.model import Model

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
Ranking = Literal["signed", "absolute"]
Selection = Literal["top", "greedy"]


def curve(
    model: Model,
    pairs: Pairs,
    scores: EdgeScores,
    metric: Metric | MetricFn | str = logit_diff,
    using: Ablation = "counterfactual",
    *,
    ranking: Ranking = "absolute",
    selection: Selection = "top",
    sizes: Sequence[float] = MIB_SIZES,
    seed: int = 0,
) -> Curve:
    """f of the circuits that scores give at several sizes, and its integrals CPR and CMD.

    ``sizes``: shares of all edges; each circuit is the int(size × edges) best ones, then pruned to the paths from input
    to logits; what is left of none counts f = 0, that of ∅. ``ranking``: by |score|, as MIB does for CMD, or
    ``"signed"``, most helpful first, as for CPR: `mib` gives both as published. Raises ModelError for scores of another
    model, and InterpError for bad input, before anything is run.
    """
    shares = np.asarray(sizes, dtype=float)
    if len(shares) < 2 or (np.diff(shares) <= 0).any() or shares[0] < 0 or shares[-1] > 1:
        raise InterpError(f"sizes={tuple(sizes)}: at least two shares of the edges, rising, between 0 and 1")
    if ranking not in get_args(Ranking) or selection not in get_args(Selection):
        raise InterpError(f"ranking={ranking!r}, selection={selection!r}: 'signed' or 'absolute', 'top' or 'greedy'")
    return _along(_scale(model, pairs, scores, metric, using, seed), scores, shares, ranking, selection)


def mib(
    model: Model,
    pairs: Pairs,
    scores: EdgeScores,
    metric: Metric | MetricFn | str = logit_diff,
    using: Ablation = "counterfactual",
    *,
    selection: Selection = "top",
    seed: int = 0,
) -> MIB:
    """CPR and CMD as published (Mueller et al. 2025): CPR over circuits of the most helpful edges, by signed score, and
    CMD over those of the largest |score|, at `MIB_SIZES`. Errors as `curve`.
    """
    scale = _scale(model, pairs, scores, metric, using, seed)
    shares = np.array(MIB_SIZES)
    signed, absolute = (_along(scale, scores, shares, ranking, selection) for ranking in get_args(Ranking))
    return MIB(signed.cpr, absolute.cmd, signed, absolute)


def _scale(model: Model, pairs: Pairs, scores: EdgeScores, metric: Any, using: Ablation, seed: int) -> Scale:
    """The scale of all circuits that the scores can give."""
    every = Circuit(scores.graph, scores.graph.edges(), provenance=scores.provenance)
    return Scale(model, pairs, every, metric, using, seed)


def _along(
    scale: Scale, scores: EdgeScores, shares: Float[np.ndarray, " sizes"], ranking: Ranking, selection: Selection
) -> Curve:
    ranked = scores.helpful() if ranking == "signed" else scores
    masks = [_selected(ranked, int(s * len(scores)), ranking == "absolute", selection) for s in shares]
    values = np.stack([scale.evaluate(mask) if mask.any() else scale.empty for mask in masks])
    recipe = {**scale.recipe, "scores": scores.provenance, "ranking": ranking, "selection": selection}
    return Curve(shares, np.array([m.sum() for m in masks]), values, scale.whole, scale.empty, recipe)


@dataclass(frozen=True)
class Curve:
    """f over circuit size. ``values`` [sizes, examples] is the metric of each circuit; ``edges`` counts those left
    after pruning. `cpr` and `cmd` are (value, lo, hi), with bootstrap intervals over examples."""

    sizes: Float[np.ndarray, " sizes"]
    edges: np.ndarray
    values: Float[np.ndarray, "sizes examples"] = field(repr=False)
    whole: Float[np.ndarray, " examples"] = field(repr=False)
    empty: Float[np.ndarray, " examples"] = field(repr=False)
    recipe: dict[str, Any] = field(repr=False)

    def faithfulness(self, index: Index | slice = slice(None)) -> Float[np.ndarray, " sizes"]:
        """f at each size, over all examples or some."""
        empty = self.empty[index].mean()
        return (self.values[:, index].mean(1) - empty) / (self.whole[index].mean() - empty)

    @property
    def cpr(self) -> tuple[float, float, float]:
        """Integrated circuit performance ratio: ∫ f dk by the trapezoid rule over the sizes, on a linear scale.

        As MIB computes it: from the least size to the largest, so that a constant f = 1 gives 0.999 with `MIB_SIZES`.
        Published figures are of ``ranking="signed"``.
        """
        return with_interval(lambda i: integrate(self.sizes, self.faithfulness(i)), len(self.whole))

    @property
    def cmd(self) -> tuple[float, float, float]:
        """Integrated circuit–model distance: ∫ |1 − f| dk, as `cpr`; 0 is best. Published: of ``"absolute"``."""
        return with_interval(lambda i: integrate(self.sizes, np.abs(1 - self.faithfulness(i))), len(self.whole))

    def frame(self) -> pd.DataFrame:
        """One row per size: share, edges, f and its 95% interval."""
        n = len(self.whole)
        parts = [with_interval(lambda i, s=s: self.faithfulness(i)[s], n) for s in range(len(self.sizes))]
        found = pd.DataFrame(parts, columns=["faithfulness", "lo", "hi"])
        return pd.concat([pd.DataFrame({"size": self.sizes, "edges": self.edges}), found], axis=1)


def integrate(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Trapezoid rule."""
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())


@dataclass(frozen=True)
class MIB:
    """``cpr`` and ``cmd`` are (value, lo, hi), and the curves that they are the areas of."""

    cpr: tuple[float, float, float]
    cmd: tuple[float, float, float]
    signed: Curve = field(repr=False)
    absolute: Curve = field(repr=False)


def _selected(
    scores: EdgeScores, n: int, absolute: bool, selection: Selection
) -> Bool[np.ndarray, "receivers senders"]:
    nothing = np.zeros(scores.graph.allowed.shape, dtype=bool)
    if n == 0:
        return nothing
    chosen = (scores.top if selection == "top" else scores.greedy)(n, absolute=absolute, prune=False)
    return chosen.connected().mask() if chosen.is_connected() else nothing
