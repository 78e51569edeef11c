"""EdgeScores: one number for every edge of a model, and the circuits that are made of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from interp.circuits.circuit import Circuit
from interp.circuits.topology import Architecture
from interp.errors import InterpError
from interp.sites import Edge, Site


class EdgeScores:
    """Scores of all edges: ``matrix`` [receivers, senders], NaN where the model has no edge; with their provenance."""

    def __init__(
        self, graph: Architecture, matrix: Float[np.ndarray, "receivers senders"], provenance: dict[str, Any]
    ) -> None:
        broken = graph.allowed & ~np.isfinite(matrix)
        if broken.any():
            row, column = np.argwhere(broken)[0]
            edge = Edge(graph.senders[column], graph.receivers[row])
            raise InterpError(f"{int(broken.sum())} edge scores are not finite (first: {edge})")
        self.graph, self.provenance = graph, dict(provenance)
        self.matrix = np.where(graph.allowed, matrix, np.nan)

    def __len__(self) -> int:
        return len(self.graph)

    def __getitem__(self, edge: Edge | str) -> float:
        return float(self.matrix[self.graph.place(Edge.parse(edge) if isinstance(edge, str) else edge)])

    def __repr__(self) -> str:
        return f"EdgeScores({len(self)} edges, {self.provenance.get('method', 'no method')})"

    def frame(self) -> pd.DataFrame:
        """One row per edge, largest |score| first: sender, receiver, score."""
        rows, columns = np.nonzero(self.graph.allowed)
        frame = pd.DataFrame(
            {
                "sender": [str(self.graph.senders[c]) for c in columns],
                "receiver": [str(self.graph.receivers[r]) for r in rows],
                "score": self.matrix[rows, columns],
            }
        )
        order = np.argsort(-frame["score"].abs().to_numpy(), kind="stable")
        return frame.iloc[order].reset_index(drop=True)

    def senders(self) -> dict[Site, float]:
        """Sum over each sender's outgoing edges: its attribution as a node."""
        return dict(zip(self.graph.senders, np.nansum(self.matrix, axis=0).tolist(), strict=True))

    def top(self, n: int, *, absolute: bool = True, prune: bool = True) -> Circuit:
        """The ``n`` edges of largest |score| (``absolute=False``: of largest score), of which ``prune`` keeps those on
        a path from the input to the logits.

        InterpError if n is not between 1 and the number of edges, or if no path is left: try a larger n, or `greedy`.
        """
        self._check(n)
        values = self._ranked(absolute)
        order = np.argsort(-values, axis=None, kind="stable")[:n]
        kept = np.zeros(self.matrix.shape, dtype=bool)
        kept[np.unravel_index(order, kept.shape)] = True
        return self._circuit(kept, prune, f"top {n} by {'|score|' if absolute else 'score'}")

    def above(self, threshold: float, *, absolute: bool = True, prune: bool = True) -> Circuit:
        """The edges whose |score| (or score) is above a threshold. InterpError if that is none, or all of them."""
        if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number):
            raise InterpError(f"threshold={threshold!r}: a number, in the unit of scores, is expected")
        with np.errstate(invalid="ignore"):
            kept = self._ranked(absolute) > threshold
        what, n = "|score|" if absolute else "score", int(kept.sum())
        if n in (0, len(self)):
            low, high = np.nanmin(self._known(absolute)), np.nanmax(self._known(absolute))
            raise InterpError(
                f"the threshold {threshold:g} keeps {'no edge' if n == 0 else f'all {n} edges'}: {what} lies between "
                f"{low:.3g} and {high:.3g}; choose a threshold between them"
            )
        return self._circuit(kept, prune, f"{what} above {threshold:g}")

    def greedy(self, n: int, *, absolute: bool = True, prune: bool = True) -> Circuit:
        """``n`` edges chosen one at a time, from the logits backwards: the largest |score| (or score) among edges into
        receivers of nodes already chosen (Hanna et al. 2024, arXiv 2403.17806: Dijkstra-like greedy search).

        Every edge chosen leads to the logits; ``prune`` drops those that nothing reaches from the input.
        """
        self._check(n)
        values, graph = self._ranked(absolute), self.graph
        kept = np.zeros(values.shape, dtype=bool)
        open_rows = np.zeros(len(graph.receivers), dtype=bool)
        open_rows[graph.receiver_number[graph.output]] = True
        for _ in range(n):
            candidates = np.where(open_rows[:, None] & ~kept, values, -np.inf)
            place = np.unravel_index(int(candidates.argmax()), values.shape)
            if candidates[place] == -np.inf:
                break
            kept[place] = True
            open_rows |= rows_of(graph, graph.senders[int(place[1])])
        return self._circuit(kept, prune, f"greedy {n} by {'|score|' if absolute else 'score'}")

    def helpful(self) -> EdgeScores:
        """The same with a sign: positive where the edge helps the metric that was attributed, in its direction.

        Scores of ``mode="noise"`` say what corrupting an edge does, and are turned round.
        """
        if "mode" not in self.provenance:
            return self
        direction = self.provenance.get("metric_direction", 1) * (-1 if self.provenance["mode"] == "noise" else 1)
        kept = {k: v for k, v in self.provenance.items() if k not in ("mode", "metric_direction")}
        return EdgeScores(self.graph, direction * self.matrix, {**kept, "sign": "positive helps the metric"})

    def _check(self, n: int) -> None:
        if isinstance(n, bool) or not isinstance(n, int | np.integer):
            raise InterpError(f"n={n!r}: how many edges to take, a whole number")
        if not np.nanmax(np.abs(self.matrix)) > 0:
            raise InterpError(
                "every edge scores 0, so that none is better than another: do the clean and corrupt prompts differ in "
                "what the metric reads?"
            )
        if not 1 <= n <= len(self):
            raise InterpError(f"n={n} edges were asked for: this model has {len(self)}, and a circuit needs at least 1")

    def _known(self, absolute: bool) -> Float[np.ndarray, "receivers senders"]:
        return np.abs(self.matrix) if absolute else self.matrix

    def _ranked(self, absolute: bool) -> Float[np.ndarray, "receivers senders"]:
        return np.where(self.graph.allowed, self._known(absolute), -np.inf)

    def _circuit(self, kept: Bool[np.ndarray, "receivers senders"], prune: bool, how: str) -> Circuit:
        graph = self.graph
        places = zip(*np.nonzero(kept), strict=True)
        edges = {Edge(graph.senders[c], graph.receivers[r]): float(self.matrix[r, c]) for r, c in places}
        circuit = Circuit(graph, edges, provenance={**self.provenance, "selection": how, "selected_edges": len(edges)})
        return circuit.connected() if prune else circuit


def rows_of(graph: Architecture, sender: Site) -> Bool[np.ndarray, " receivers"]:
    """The receivers of a sender's node: a head's q, k and v."""
    found = np.zeros(len(graph.receivers), dtype=bool)
    if sender.component == "mlp_out":
        found[graph.receiver_number[sender]] = True
    elif sender.component == "z":
        kv = (sender.head or 0) // (graph.n_heads // graph.n_kv_heads)
        for component, head in (("q", sender.head), ("k", kv), ("v", kv)):
            found[graph.receiver_number[Site(component, sender.layer, head)]] = True
    return found
