"""ACDC: remove edges one at a time if the metric does not get worse.

Method: Conmy et al. 2023 (arXiv 2304.14997). Receivers are visited from the logits backwards (``order="backward"``, as
published) or from the input forwards. At each receiver, its edges are tried sender by sender. An edge is removed if the
metric, with all earlier removals in place, gets worse by less than the threshold. The result depends on both orders, as
with the published algorithm: of two edges that do the same work, the one that is tried first is removed, and the other
stays.

Every decision is exact and the same as if edges were tried one by one. To save time, one forward tries a chain of
removals (the next edge; the next two; …), across receivers, because most edges are removed. The trials after the first
edge that has to stay are discarded. Only the layers from the receiver's on are run
(`interp.circuits.evaluation.packed_forward`), on average a third of them if all edges are tried. The edges into a node
that no longer sends anything are removed without a run, since they cannot change the metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float

from interp.circuits.choices import Ablation, Order, Parents
from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.inputs import Pairs
from interp.circuits.scores import EdgeScores
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn
from interp.model.model import Model
from interp.model.session import in_session
from interp.sites import Edge
from interp.utils.progress import Advance, progress

CHAIN = 64  # removals tried in one batch, at most


@in_session
def acdc(
    model: Model,
    pairs: Pairs,
    threshold: float,
    metric: Metric | MetricFn | str = "kl",
    using: Ablation = "counterfactual",
    *,
    order: Order = "backward",
    parents: Parents = "late",
    absolute: bool = False,
    start: Circuit | None = None,
    prune: bool = True,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Circuit:
    """Find a circuit by ACDC.

    The score of an edge is how much the metric got worse when its removal was tried. ``threshold`` is in the unit of
    the metric, whose mean over pairs is compared. ``metric``: KL from the whole model, as published, or any other; a
    metric gets worse against its direction. ``absolute``: an edge also stays if the metric gets better by the
    threshold. ``using``: what removed edges carry (`faithfulness`). ``parents``: which sender is tried first at a
    receiver: the one computed last, the one computed first, or a random one by ``seed``. ``start``: a circuit to start
    from instead of all edges, e.g. the best edges by `attribute_edges`; a model of 30 layers has some 65,000 edges, and
    each of them takes a forward. ``prune`` keeps the edges on paths from the input to the logits.

    Raises InterpError if the threshold removes every edge or none, if no path is left, if ``start`` has no path, or if
    the metric is the same for the whole model and the empty circuit.
    """
    _check_threshold(threshold)
    search = _Search(model, pairs, metric, using, order, parents, absolute, start, seed)
    with progress("ACDC", int(search.first.sum()), show_progress) as advance:
        result = search.run(threshold, advance)
    n = int(result.mask.sum())
    if n in (0, int(search.first.sum())):
        tried = result.damage[search.first & ~np.isnan(result.damage)]
        raise InterpError(
            f"the threshold {threshold:g} keeps {'no edge' if n == 0 else f'all {n} edges'}: when tried, edges made "
            f"{search.evaluate.metric.name} worse by {tried.min():.3g} to {tried.max():.3g}; choose a threshold between"
        )
    circuit = search.circuit(result, threshold)
    return circuit.connected() if prune else circuit


@in_session
def acdc_sweep(
    model: Model,
    pairs: Pairs,
    thresholds: Sequence[float],
    metric: Metric | MetricFn | str = "kl",
    using: Ablation = "counterfactual",
    *,
    order: Order = "backward",
    parents: Parents = "late",
    absolute: bool = False,
    start: Circuit | None = None,
    seed: int = 0,
    show_progress: bool | None = None,
) -> EdgeScores:
    """Run ACDC at several thresholds.

    The score of an edge is the largest threshold at which it stays, or 0 if it never does.
    ``scores.provenance["sweep"]`` holds the threshold, number of edges (before pruning) and metric of each circuit. The
    other arguments are those of `acdc`. Every run of ACDC starts from the beginning, so an edge that is removed at one
    threshold may stay at a larger one.
    """
    if not isinstance(thresholds, Iterable) or not list(thresholds):
        raise InterpError(f"thresholds={thresholds!r}: several numbers, or at least one, in a list")
    for threshold in thresholds:
        _check_threshold(threshold)
    ascending = sorted(thresholds)
    search = _Search(model, pairs, metric, using, order, parents, absolute, start, seed)
    scores = np.zeros(search.first.shape)
    sweep: list[dict[str, Any]] = []
    with progress("ACDC", int(search.first.sum()) * len(ascending), show_progress) as advance:
        for threshold in ascending:
            result = search.run(threshold, advance)
            scores[result.mask] = threshold
            sweep.append({"threshold": threshold, "edges": int(result.mask.sum()), "metric": result.value})
    return EdgeScores(search.evaluate.graph, scores, {**search.recipe, "sweep": sweep})


def _check_threshold(threshold: float) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < float("inf"):
        raise InterpError(f"threshold={threshold!r}: expected a number above 0, in the metric's unit")


@dataclass(frozen=True)
class _Removal:
    """A trial: an edge, the circuit without it, and the position after the trial.

    The edges of all earlier trials are also removed from the circuit.
    """

    row: int
    column: int
    mask: Bool[np.ndarray, "receivers senders"]
    after: _Position


@dataclass(frozen=True)
class _Position:
    """Progress of a search: receivers done, and edges tried at the next receiver."""

    receivers: int = 0
    edges: int = 0


@dataclass(frozen=True)
class _SearchResult:
    """The edges that stay, the damage of each removal, and the final metric.

    ``damage``: how much worse the metric got when the removal of each edge was tried (NaN: not tried).
    """

    mask: Bool[np.ndarray, "receivers senders"]
    damage: Float[np.ndarray, "receivers senders"]
    value: float


def _without(mask: np.ndarray, *place: int) -> np.ndarray:
    """A copy of a mask without one edge (row, column) or one receiver's edges (row)."""
    mask = mask.copy()
    mask[place] = False
    return mask


class _Search:
    """Removal of edges from one circuit, with fixed prompts, metric and ablation."""

    def __init__(
        self, model: Model, pairs: Pairs, metric: Metric | MetricFn | str, using: Ablation, order: Order,
        parents: Parents, absolute: bool, start: Circuit | None, seed: int,
    ) -> None:  # fmt: skip
        if order not in get_args(Order) or parents not in get_args(Parents):
            raise InterpError(
                f"order={order!r}, parents={parents!r}: expected 'backward' or 'forward', and one of "
                f"{', '.join(map(repr, get_args(Parents)))}"
            )
        if start is not None:
            start.check(model)
            start.connected()  # raises InterpError if no path leads from the input to the logits
        self.evaluate = Evaluator(model, pairs, metric, using, seed)
        self.graph = self.evaluate.graph
        self.first = self.graph.allowed.copy() if start is None else start.mask()
        self.order, self.parents, self.absolute, self.seed = order, parents, absolute, seed
        rows = range(len(self.graph.receivers))
        self.rows: list[int] = list(rows[::-1] if order == "backward" else rows)
        self.first_value = float(self.evaluate(self.first).mean())
        empty = float(self.evaluate(np.zeros_like(self.first)).mean())
        if abs(self.first_value) + abs(empty) < 1e-9 or not self.evaluate.has_gap(self.first_value, empty):
            raise InterpError(
                f"{self.evaluate.metric.name} is {self.first_value:.4g} with all edges and with none "
                f"({self.evaluate.recipe['ablation']}): there is no difference that a circuit could explain"
            )
        # In backward order, removals change nothing before the current layer: all trials continue the first circuit.
        self.start = self.evaluate.start(self.first)
        self.recipe = {
            **self.evaluate.recipe, "method": "acdc", "order": order, "parents": parents, "absolute": absolute,
            "evidence": "exact, one edge at a time", "start": None if start is None else start.provenance,
        }  # fmt: skip

    def run(self, threshold: float, advance: Advance) -> _SearchResult:
        """Try all edges at one threshold."""
        mask, value = self.first.copy(), self.first_value
        damage = np.full(mask.shape, np.nan)
        position, width, start, start_layer = _Position(), CHAIN, self.start, None
        while chain := list(islice(self._removals(mask, position), min(width, CHAIN, self.evaluate.at_once))):
            layer = self.graph.receivers[chain[0].row].layer
            if self.order == "forward" and layer != start_layer:
                start, start_layer = self.evaluate.start(mask), layer  # all edges before this layer are decided
            values = self.evaluate.many(np.stack([c.mask for c in chain]), start).mean(1)
            width = 2 * len(chain)
            for trial, value_without in zip(chain, values.tolist(), strict=True):
                worse = (value - value_without) * self.evaluate.metric.direction
                damage[trial.row, trial.column] = worse
                advance(self._edges_before(trial.after) - self._edges_before(position))
                mask, position = trial.mask, trial.after
                if (abs(worse) if self.absolute else worse) >= threshold:
                    mask[trial.row, trial.column] = True
                    width = max(1, len(chain) // 2)
                    break
                value = value_without
        mask = self._without_idle(mask, position)
        advance(self._edges_before(_Position(len(self.rows))) - self._edges_before(position))
        return _SearchResult(mask, damage, value)

    def _removals(self, mask: np.ndarray, position: _Position) -> Iterator[_Removal]:
        """Trials from a position on, each with the edges of all earlier ones removed."""
        for done in range(position.receivers, len(self.rows)):
            row = self.rows[done]
            tried = position.edges if done == position.receivers else 0
            if not tried and self._is_idle(mask, row):
                mask = _without(mask, row)
                continue
            columns = self._columns_in_order(row)
            for i in range(tried, len(columns)):
                mask = _without(mask, row, columns[i])
                yield _Removal(row, columns[i], mask, _Position(done, i + 1))

    def _without_idle(self, mask: np.ndarray, position: _Position) -> np.ndarray:
        """Remove the edges of idle receivers after the last trial."""
        for row in self.rows[position.receivers + (position.edges > 0) :]:
            if self._is_idle(mask, row):
                mask = _without(mask, row)
        return mask

    def _columns_in_order(self, row: int) -> list[int]:
        """The senders of a receiver's edges, in the order in which they are tried."""
        edges = np.flatnonzero(self.first[row])
        if self.parents == "random":
            return np.random.default_rng((self.seed, row)).permutation(edges).tolist()
        return edges[:: -1 if self.parents == "late" else 1].tolist()

    def _edges_before(self, position: _Position) -> int:
        """Number of edges that lie before a position."""
        return int(self.first[self.rows[: position.receivers]].sum()) + position.edges

    def _is_idle(self, mask: np.ndarray, row: int) -> bool:
        """Whether a receiver's node no longer sends anything.

        Always False in forward order, where later receivers are not decided yet.
        """
        receiver = self.graph.receivers[row]
        if self.order == "forward" or receiver == self.graph.output:
            return False
        return not mask[:, [self.graph.sender_number[s] for s in self.graph.fed_by(receiver)]].any()

    def circuit(self, result: _SearchResult, threshold: float) -> Circuit:
        """The edges that stay, with their scores."""
        places = zip(*np.nonzero(result.mask), strict=True)
        edges = {Edge(self.graph.senders[c], self.graph.receivers[r]): float(result.damage[r, c]) for r, c in places}
        recipe = {**self.recipe, "threshold": threshold, "selected_edges": len(edges), "metric_left": result.value}
        return Circuit(self.graph, edges, provenance={**recipe, "selection": f"ACDC, threshold {threshold:g}"})
