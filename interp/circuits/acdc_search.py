"""ACDC: remove edges one at a time, for good if the metric does not suffer (Conmy et al. 2023, arXiv 2304.14997).

Receivers are visited from the logits backwards (``order="backward"``, as published) or from the input on; at each
receiver its edges are tried sender by sender. An edge is removed if the metric, with everything removed before, gets
worse by less than the threshold. The result depends on both orders, as the published algorithm's does: of two edges
that do the same work, the one that is tried first goes, and the other stays.

Every decision is exact and the same as if edges were tried one by one. They are not: as most edges go, a forward tries
a chain of removals (the next edge; the next two; …), across receivers, and what was tried beyond the first edge that
has to stay is thrown away. Only the layers from the receiver's on are run
(`interp.circuits.evaluation.packed_forward`), on average a third of them where all edges are tried. A receiver of a
node that no longer sends anything is dropped without a run, which cannot change the metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.evaluator import Ablation, Evaluator
from interp.circuits.scores import EdgeScores
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn
from interp.model.model import Model
from interp.prompts.pairs import PromptPair
from interp.sites import Edge
from interp.utils.progress import Advance, progress

Order = Literal["backward", "forward"]
Parents = Literal["late", "early", "random"]
CHAIN = 64  # removals tried in one batch, at most
Pairs = PromptPair | Iterable[PromptPair]


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
    """The edges that ACDC leaves; each edge's score is by how much the metric got worse when it was tried.

    ``threshold``: in the metric's unit, of its mean over pairs; ``metric``: KL from the whole model, as published, or
    any other, which gets worse against its direction. ``absolute``: an edge stays also if the metric gets better by as
    much. ``using``: what removed edges carry. ``parents``: which sender is tried first at a receiver, the last
    computed, the first, or by ``seed``. ``start``: a circuit to begin with in place of all edges, e.g. the best of
    `attribute_edges`: a model of 30 layers has some 65,000 edges, each of which takes a forward. ``prune`` keeps the
    edges on paths from input to logits.

    Raises InterpError if the threshold removes every edge, or none, if no path is left or ``start`` has none, and where
    nothing differs between the whole model and the empty circuit.
    """
    _check_threshold(threshold)
    search = _Search(model, pairs, metric, using, order, parents, absolute, start, seed)
    with progress("ACDC", int(search.first.sum()), show_progress) as advance:
        kept, damage, value = search.run(threshold, advance)
    n = int(kept.sum())
    if n in (0, int(search.first.sum())):
        seen = damage[search.first & ~np.isnan(damage)]
        raise InterpError(
            f"the threshold {threshold:g} keeps {'no edge' if n == 0 else f'all {n} edges'}: when tried, edges made "
            f"{search.evaluate.metric.name} worse by {seen.min():.3g} to {seen.max():.3g}; choose a threshold between"
        )
    circuit = search.circuit(kept, damage, threshold, value)
    return circuit.connected() if prune else circuit


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
    """ACDC at several thresholds: an edge's score is the largest at which it stays, 0 if it never does.

    ``scores.provenance["sweep"]`` lists threshold, edges (before pruning) and the metric of each circuit; see `acdc`
    for the rest. An edge may come back at a larger threshold, as every run of ACDC starts anew.
    """
    if not isinstance(thresholds, Iterable) or not list(thresholds):
        raise InterpError(f"thresholds={thresholds!r}: several numbers, or at least one, in a list")
    for threshold in thresholds:
        _check_threshold(threshold)
    listed = sorted(thresholds)
    search = _Search(model, pairs, metric, using, order, parents, absolute, start, seed)
    found = np.zeros(search.first.shape)
    sweep: list[dict[str, Any]] = []
    with progress("ACDC", int(search.first.sum()) * len(listed), show_progress) as advance:
        for threshold in listed:
            kept, _, value = search.run(threshold, advance)
            found[kept] = threshold
            sweep.append({"threshold": threshold, "edges": int(kept.sum()), "metric": value})
    return EdgeScores(search.evaluate.graph, found, {**search.recipe, "sweep": sweep})


def _check_threshold(threshold: float) -> None:
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold < float("inf"):
        raise InterpError(f"threshold={threshold!r}: a number above 0, in the metric's unit, is expected")


@dataclass(frozen=True)
class _Removal:
    """One edge, the circuit without it and all that was removed before, and the `_Search._removals` place behind it."""

    row: int
    column: int
    mask: Bool[np.ndarray, "receivers senders"]
    place: tuple[int, int]


def without(mask: np.ndarray, *place: int) -> np.ndarray:
    """A copy without an edge, or a receiver's edges."""
    mask = mask.copy()
    mask[place] = False
    return mask


class _Search:
    def __init__(
        self, model: Model, pairs: Pairs, metric: Any, using: Ablation, order: str, parents: str, absolute: bool,
        start: Circuit | None, seed: int,
    ) -> None:  # fmt: skip
        if order not in get_args(Order) or parents not in get_args(Parents):
            raise InterpError(
                f"order={order!r}, parents={parents!r}: 'backward' or 'forward', and one of {get_args(Parents)}"
            )
        if start is not None:
            start.check(model)
            start.connected()  # raises, where no path leads from the input to the logits
        self.evaluate = Evaluator(model, pairs, metric, using, seed)
        self.graph = self.evaluate.graph
        self.first = self.graph.allowed.copy() if start is None else start.mask()
        self.order, self.parents, self.absolute, self.seed = order, parents, absolute, seed
        rows = range(len(self.graph.receivers))
        self.rows: list[int] = list(rows[::-1] if order == "backward" else rows)
        self.began = float(self.evaluate(self.first).mean())
        nothing = float(self.evaluate(np.zeros_like(self.first)).mean())
        if (
            not abs(self.began - nothing) > 1e-9 * (abs(self.began) + abs(nothing))
            or abs(nothing) + abs(self.began) < 1e-9
        ):
            raise InterpError(
                f"{self.evaluate.metric.name} is {self.began:.4g} with all edges and with none "
                f"({self.evaluate.recipe['ablation']}): there is no difference that a circuit could explain"
            )
        # backwards, what is decided changes nothing before the layer at hand: all trials go on from the first circuit
        self.start = self.evaluate.start(self.first)
        self.recipe = {
            **self.evaluate.recipe, "method": "acdc", "order": order, "parents": parents, "absolute": absolute,
            "evidence": "exact, one edge at a time", "start": None if start is None else start.provenance,
        }  # fmt: skip

    def run(
        self, threshold: float, advance: Advance
    ) -> tuple[Bool[np.ndarray, "receivers senders"], Float[np.ndarray, "receivers senders"], float]:
        """The edges that stay, by how much the metric got worse when each was tried (NaN: never), and the metric."""
        mask, value = self.first.copy(), self.began
        damage = np.full(mask.shape, np.nan)
        place, width, start, layer = (0, 0), CHAIN, self.start, None
        while chain := list(islice(self._removals(mask, place), min(width, CHAIN, self.evaluate.at_once))):
            if self.order == "forward" and (here := self.graph.receivers[chain[0].row].layer) != layer:
                start, layer = self.evaluate.start(mask), here  # as all before this layer is decided
            values = self.evaluate.many(np.stack([c.mask for c in chain]), start).mean(1)
            width = 2 * len(chain)
            for step, after in zip(chain, values.tolist(), strict=True):
                worse = (value - after) * self.evaluate.metric.direction
                damage[step.row, step.column] = worse
                mask, passed, place = step.mask, self._passed(step.place) - self._passed(place), step.place
                advance(passed)
                if (abs(worse) if self.absolute else worse) >= threshold:
                    mask[step.row, step.column] = True
                    width = max(1, len(chain) // 2)
                    break
                value = after
        mask = self._without_idle(mask, place)
        advance(self._passed((len(self.rows), 0)) - self._passed(place))
        return mask, damage, value

    def _removals(self, mask: np.ndarray, place: tuple[int, int]) -> Iterator[_Removal]:
        """The edges that are still to be tried, each after the removal of all before it.

        ``place``: how many receivers are done, and how many edges of the next one.
        """
        for done in range(place[0], len(self.rows)):
            row = self.rows[done]
            tried = place[1] if done == place[0] else 0
            if not tried and self._idle(mask, row):
                mask = without(mask, row)
                continue
            columns = self._ordered(row)
            for i in range(tried, len(columns)):
                mask = without(mask, row, columns[i])
                yield _Removal(row, columns[i], mask, (done, i + 1))

    def _without_idle(self, mask: np.ndarray, place: tuple[int, int]) -> np.ndarray:
        """With what no edge was tried after."""
        for row in self.rows[place[0] + (place[1] > 0) :]:
            if self._idle(mask, row):
                mask = without(mask, row)
        return mask

    def _ordered(self, row: int) -> list[int]:
        edges = np.flatnonzero(self.first[row])
        if self.parents == "random":
            return np.random.default_rng((self.seed, row)).permutation(edges).tolist()
        return edges[:: -1 if self.parents == "late" else 1].tolist()

    def _passed(self, place: tuple[int, int]) -> int:
        """How many edges lie before a place."""
        return int(self.first[self.rows[: place[0]]].sum()) + place[1]

    def _idle(self, mask: np.ndarray, row: int) -> bool:
        """Whether the node of a receiver sends nothing any more, which is known only where later ones were decided."""
        receiver = self.graph.receivers[row]
        if self.order == "forward" or receiver == self.graph.output:
            return False
        return not mask[:, [self.graph.sender_number[s] for s in self.graph.fed_by(receiver)]].any()

    def circuit(self, kept: np.ndarray, damage: np.ndarray, threshold: float, value: float) -> Circuit:
        """The edges with their scores."""
        places = zip(*np.nonzero(kept), strict=True)
        edges = {Edge(self.graph.senders[c], self.graph.receivers[r]): float(damage[r, c]) for r, c in places}
        recipe = {**self.recipe, "threshold": threshold, "selected_edges": len(edges), "metric_left": value}
        return Circuit(self.graph, edges, provenance={**recipe, "selection": f"ACDC, threshold {threshold:g}"})
