"""Faithfulness over circuit size, with its integrals CPR and CMD.

Both are those of MIB (Mueller et al. 2025, arXiv 2504.13151).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from interp.circuits.choices import Ablation, Ranking, Selection
from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.scale import Scale, position_on_scale, ratio_interval, recipe_text
from interp.circuits.inputs import Pairs
from interp.circuits.scores import EdgeScores
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.model import Model
from interp.model.session import in_session
from interp.utils.progress import progress

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@in_session
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
    """Measure f of the circuits that scores select at several sizes.

    The result has the integrals CPR and CMD. ``sizes`` are shares of all edges. Each circuit consists of the int(size ×
    edges) best edges, and is then pruned to the paths from the input to the logits. A circuit with no edge left has f =
    0, that of ∅. ``ranking``: ``"absolute"``, by |score|, as MIB does for CMD, or ``"signed"``, most helpful first, as
    MIB does for CPR; `mib` returns both as published. Raises ModelError for scores of another model and InterpError for
    bad input, before any run.
    """
    shares = np.asarray(sizes, dtype=float)
    if len(shares) < 2 or (np.diff(shares) <= 0).any() or shares[0] < 0 or shares[-1] > 1:
        raise InterpError(f"sizes={tuple(sizes)}: expected at least two rising shares of the edges, between 0 and 1")
    if ranking not in get_args(Ranking) or selection not in get_args(Selection):
        raise InterpError(
            f"ranking={ranking!r}, selection={selection!r}: expected 'signed' or 'absolute', and 'top' or 'greedy'"
        )
    return _curve(_scale(model, pairs, scores, metric, using, seed), scores, shares, ranking, selection)


@in_session
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
    """Compute CPR and CMD as published (Mueller et al. 2025), at `MIB_SIZES`.

    CPR is over circuits of the most helpful edges, by signed score; CMD is over circuits of the edges of largest
    |score|. Raises the errors of `curve`.
    """
    scale = _scale(model, pairs, scores, metric, using, seed)
    shares = np.array(MIB_SIZES)
    signed, absolute = (_curve(scale, scores, shares, ranking, selection) for ranking in get_args(Ranking))
    return MIB(signed.cpr, absolute.cmd, signed, absolute)


def _scale(
    model: Model, pairs: Pairs, scores: EdgeScores, metric: Metric | MetricFn | str, using: Ablation, seed: int
) -> Scale:
    """The scale of all circuits that the scores can select."""
    all_edges = Circuit(scores.graph, scores.graph.edges(), provenance=scores.provenance)
    return Scale(model, pairs, all_edges, metric, using, seed)


def _curve(
    scale: Scale, scores: EdgeScores, shares: Float[np.ndarray, " sizes"], ranking: Ranking, selection: Selection
) -> Curve:
    """The curve of one ranking on a scale."""
    ranked = scores.helpful() if ranking == "signed" else scores
    masks = [_selected(ranked, int(s * len(scores)), ranking == "absolute", selection) for s in shares]
    values = []
    with progress(f"circuits by size ({ranking})", len(masks)) as advance:
        for mask in masks:
            values.append(scale.evaluate(mask) if mask.any() else scale.empty)
            advance(1)
    recipe = {**scale.recipe, "scores": scores.provenance, "ranking": ranking, "selection": selection}
    return Curve(shares, np.array([m.sum() for m in masks]), np.stack(values), scale.whole, scale.empty, recipe)


@dataclass(frozen=True)
class Curve:
    """f over circuit size.

    ``values`` [sizes, examples] is the metric of each circuit; ``edges`` counts the edges left after pruning. `cpr` and
    `cmd` are (value, lo, hi), with 95% intervals over examples.
    """

    sizes: Float[np.ndarray, " sizes"]
    edges: np.ndarray
    values: Float[np.ndarray, "sizes examples"] = field(repr=False)
    whole: Float[np.ndarray, " examples"] = field(repr=False)
    empty: Float[np.ndarray, " examples"] = field(repr=False)
    recipe: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        f, n = self.faithfulness(), len(self.whole)
        ends = f"{f[0]:.3f} at {self.edges[0]} edges to {f[-1]:.3f} at {self.edges[-1]}" if len(f) else "empty"
        return f"Curve({len(f)} sizes, f from {ends}; {recipe_text(self.recipe, n)})"

    def faithfulness(self) -> Float[np.ndarray, " sizes"]:
        """f at each size."""
        return position_on_scale(self.values.mean(1), self.whole.mean(), self.empty.mean())

    @property
    def cpr(self) -> tuple[float, float, float]:
        """Integrated circuit performance ratio, ∫ f dk.

        It is computed by the trapezoid rule over the sizes, on a linear scale. The integral runs from the smallest size
        to the largest, as in MIB, so a constant f = 1 gives 0.999 with `MIB_SIZES`. Published figures use
        ``ranking="signed"``.
        """
        return ratio_interval(integrate(self.sizes, self.values - self.empty), self.whole - self.empty)

    @property
    def cmd(self) -> tuple[float, float, float]:
        """Integrated circuit–model distance, ∫ |1 − f| dk; 0 is best.

        It is integrated as in `cpr`. Published figures use ``ranking="absolute"``. The interval holds the sign of 1 −
        f at each size, and does not go below 0.
        """
        signs = np.sign(1 - self.faithfulness())
        distance = integrate(self.sizes, signs[:, None] * (self.whole - self.values))
        value, lo, hi = ratio_interval(distance, self.whole - self.empty)
        return value, max(lo, 0.0) if np.isfinite(lo) else lo, hi

    def frame(self) -> pd.DataFrame:
        """Table with one row per size: share, edges, f and its 95% interval."""
        parts = [ratio_interval(values - self.empty, self.whole - self.empty) for values in self.values]
        values = pd.DataFrame(parts, columns=["faithfulness", "lo", "hi"])
        return pd.concat([pd.DataFrame({"size": self.sizes, "edges": self.edges}), values], axis=1)


def integrate(x: Float[np.ndarray, " n"], y: Float[np.ndarray, "n ..."]) -> Float[np.ndarray, "..."]:
    """Integral of y over x, along the first axis, by the trapezoid rule."""
    return np.tensordot(np.diff(x), (y[1:] + y[:-1]) / 2, axes=1)


@dataclass(frozen=True)
class MIB:
    """CPR and CMD, each (value, lo, hi), with the curves that they are integrals of."""

    cpr: tuple[float, float, float]
    cmd: tuple[float, float, float]
    signed: Curve = field(repr=False)
    absolute: Curve = field(repr=False)

    def __repr__(self) -> str:
        (cpr, *cpr_ends), (cmd, *cmd_ends) = self.cpr, self.cmd
        recipe = recipe_text(self.signed.recipe, len(self.signed.whole))
        return (
            f"MIB(CPR {cpr:.3f} [{cpr_ends[0]:.3f}, {cpr_ends[1]:.3f}], "
            f"CMD {cmd:.3f} [{cmd_ends[0]:.3f}, {cmd_ends[1]:.3f}]; {recipe})"
        )


def _selected(
    scores: EdgeScores, n: int, absolute: bool, selection: Selection
) -> Bool[np.ndarray, "receivers senders"]:
    """The mask of the n best edges, pruned to paths; empty if no path is left."""
    empty = np.zeros(scores.graph.allowed.shape, dtype=bool)
    if n == 0:
        return empty
    select = scores.top if selection == "top" else scores.greedy
    circuit = select(n, absolute=absolute, prune=False)
    return circuit.connected().mask() if circuit.is_connected() else empty
