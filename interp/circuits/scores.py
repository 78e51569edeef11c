"""EdgeScores: one number for every edge, and the circuits selected by them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from interp.circuits.circuit import Circuit
from interp.circuits.topology import Architecture
from interp.errors import InterpError
from interp.results.signs import helpful_direction
from interp.sites import Edge, Site


class EdgeScores:
    """Scores of all edges of a model, with provenance.

    ``matrix`` is [receivers, senders], NaN where the model has no edge.
    """

    def __init__(
        self, graph: Architecture, matrix: Float[np.ndarray, "receivers senders"], provenance: dict[str, Any]
    ) -> None:
        not_finite = graph.allowed & ~np.isfinite(matrix)
        if not_finite.any():
            row, column = np.argwhere(not_finite)[0]
            edge = Edge(graph.senders[column], graph.receivers[row])
            raise InterpError(f"{int(not_finite.sum())} edge scores are not finite (first: {edge})")
        self.graph, self.provenance = graph, dict(provenance)
        self.matrix = np.where(graph.allowed, matrix, np.nan)

    def __len__(self) -> int:
        return len(self.graph)

    def __getitem__(self, edge: Edge | str) -> float:
        return float(self.matrix[self.graph.place(Edge.parse(edge) if isinstance(edge, str) else edge)])

    def __repr__(self) -> str:
        facts = [str(self.provenance[k]) for k in ("method", "mode") if self.provenance.get(k)]
        return f"EdgeScores({len(self)} edges, {', '.join(facts) or 'no method'})"

    def frame(self) -> pd.DataFrame:
        """Table with one row per edge, largest |score| first: sender, receiver, score, effect.

        ``effect`` has the sign of the tables of effects: positive where the edge helps the metric (`helpful`). Scores
        of ``mode="noise"`` estimate the change that corrupting an edge makes, so there the two signs are opposite.
        """
        rows, columns = np.nonzero(self.graph.allowed)
        frame = pd.DataFrame(
            {
                "sender": [str(self.graph.senders[c]) for c in columns],
                "receiver": [str(self.graph.receivers[r]) for r in rows],
                "score": self.matrix[rows, columns],
                "effect": self.helpful().matrix[rows, columns],
            }
        )
        order = np.argsort(-frame["score"].abs().to_numpy(), kind="stable")
        return frame.iloc[order].reset_index(drop=True)

    def senders(self) -> dict[Site, float]:
        """Sum of the scores of each sender's outgoing edges: its attribution as a node."""
        return dict(zip(self.graph.senders, np.nansum(self.matrix, axis=0).tolist(), strict=True))

    def top(self, n: int, *, absolute: bool = True, prune: bool = True) -> Circuit:
        """Circuit of the ``n`` edges of largest |score|.

        ``absolute=False``: of largest score. ``prune`` then drops the edges that are not on a path from the input to
        the logits. Raises InterpError if n is not between 1 and the number of edges, or if no path is left: try a
        larger n, or `greedy`.
        """
        self._check(n)
        values = self._ranking_values(absolute)
        order = np.argsort(-values, axis=None, kind="stable")[:n]
        mask = np.zeros(self.matrix.shape, dtype=bool)
        mask[np.unravel_index(order, mask.shape)] = True
        return self._circuit(mask, prune, f"top {n} by {'|score|' if absolute else 'score'}")

    def above(self, threshold: float, *, absolute: bool = True, prune: bool = True) -> Circuit:
        """Circuit of the edges whose |score| (or score) is above a threshold.

        Raises InterpError if the threshold keeps no edge, or all of them.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number):
            raise InterpError(f"threshold={threshold!r}: expected a number, in the unit of scores")
        with np.errstate(invalid="ignore"):
            mask = self._ranking_values(absolute) > threshold
        what, n = "|score|" if absolute else "score", int(mask.sum())
        if n in (0, len(self)):
            values = np.abs(self.matrix) if absolute else self.matrix
            low, high = np.nanmin(values), np.nanmax(values)
            raise InterpError(
                f"the threshold {threshold:g} keeps {'no edge' if n == 0 else f'all {n} edges'}: {what} lies between "
                f"{low:.3g} and {high:.3g}; choose a threshold between them"
            )
        return self._circuit(mask, prune, f"{what} above {threshold:g}")

    def greedy(self, n: int, *, absolute: bool = True, prune: bool = True) -> Circuit:
        """Circuit of ``n`` edges chosen one at a time, from the logits backwards.

        Each step takes the edge of largest |score| (or score) among the edges into receivers of nodes that are already
        in the circuit (Hanna et al. 2024, arXiv 2403.17806: Dijkstra-like greedy search). Every edge of the result
        leads to the logits; ``prune`` drops those that no path from the input reaches. Raises InterpError as `top`.
        """
        self._check(n)
        values, graph = self._ranking_values(absolute), self.graph
        mask = np.zeros(values.shape, dtype=bool)
        open_rows = np.zeros(len(graph.receivers), dtype=bool)
        open_rows[graph.receiver_number[graph.output]] = True
        for _ in range(n):
            candidates = np.where(open_rows[:, None] & ~mask, values, -np.inf)
            place = np.unravel_index(int(candidates.argmax()), values.shape)
            if candidates[place] == -np.inf:
                break
            mask[place] = True
            open_rows |= graph.receivers_of(graph.senders[int(place[1])])
        return self._circuit(mask, prune, f"greedy {n} by {'|score|' if absolute else 'score'}")

    def helpful(self) -> EdgeScores:
        """The same scores, positive where an edge helps the metric in its direction.

        Scores of ``mode="noise"`` measure what corrupting an edge does, so their sign is reversed.
        """
        if "mode" not in self.provenance:
            return self
        direction = helpful_direction(self.provenance)
        provenance = {k: v for k, v in self.provenance.items() if k not in ("mode", "metric_direction")}
        return EdgeScores(self.graph, direction * self.matrix, {**provenance, "sign": "positive helps the metric"})

    def _check(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise InterpError(f"n={n!r}: expected a whole number of edges to select")
        if not np.nanmax(np.abs(self.matrix)) > 0:
            raise InterpError(
                "every edge scores 0, so no edge can be preferred: do the clean and corrupt prompts differ in what the "
                "metric reads?"
            )
        if not 1 <= n <= len(self):
            raise InterpError(f"n={n}: this model has {len(self)} edges, and a circuit needs at least 1")

    def _ranking_values(self, absolute: bool) -> Float[np.ndarray, "receivers senders"]:
        """What edges are ranked by: |score| or score, −inf where there is no edge."""
        return np.where(self.graph.allowed, np.abs(self.matrix) if absolute else self.matrix, -np.inf)

    def _circuit(self, mask: Bool[np.ndarray, "receivers senders"], prune: bool, how: str) -> Circuit:
        graph = self.graph
        places = zip(*np.nonzero(mask), strict=True)
        edges = {Edge(graph.senders[c], graph.receivers[r]): float(self.matrix[r, c]) for r, c in places}
        circuit = Circuit(graph, edges, provenance={**self.provenance, "selection": how, "selected_edges": len(edges)})
        return circuit.connected() if prune else circuit
