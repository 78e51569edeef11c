"""How much of a behaviour a circuit carries alone: faithfulness, completeness, minimality.

All edges outside the circuit carry an ablated activation (`interp.circuits.evaluation.ablated_forward`). With m the
metric's mean over examples, M the whole model and ∅ the model with every edge ablated *by the same recipe*,

    f(C) = (m(C) − m(∅)) / (m(M) − m(∅)),

0 for no circuit and 1 for the whole model (Mueller et al. 2025, arXiv 2504.13151, MIB; under ``"counterfactual"`` m(∅)
is the corrupt run, as in Hanna et al. 2024). It swings widely with the recipe, so every result carries its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.evaluator import Ablation
from interp.circuits.evaluation.scale import Pairs, Scale
from interp.circuits.topology import Architecture
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.model import Model
from interp.sites import Site

Chance = Literal["paths", "edges"]


def faithfulness(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    metric: Metric | MetricFn | str = logit_diff,
    using: Ablation = "counterfactual",
    *,
    n_random: int = 0,
    chance: Chance = "paths",
    seed: int = 0,
) -> Faithfulness:
    """f(C) with a 95% bootstrap interval over examples, beside f of ``n_random`` random circuits of as many edges.

    ``using``: what edges outside carry: ``"counterfactual"`` (the corrupt run of the pair), ``"zero"``, ``"mean"``
    (over all tokens of all clean prompts) or ``"resample"`` (another example's clean run, drawn by ``seed``).
    ``chance``: random circuits are ``"paths"`` from the input to the logits (`random_circuit`), or ``"edges"`` drawn
    one by one, of which few lie on any path, so that they are more easily beaten. Raises ModelError for a circuit of
    another model, InterpError for a disconnected one, and where m(M) = m(∅): there is then nothing to explain.
    """
    if chance not in get_args(Chance):
        raise InterpError(f"chance={chance!r}: random circuits are made of 'paths' or of 'edges'")
    _check_random(n_random)
    scale = Scale(model, pairs, circuit, metric, using, seed)
    value = scale.evaluate(scale.mask())
    generator, draw = np.random.default_rng(seed), random_circuit if chance == "paths" else _random_edges
    random = [scale.f(scale.evaluate(draw(circuit.graph, len(circuit), generator))) for _ in range(n_random)]
    recipe = {**scale.recipe, "circuit": circuit.provenance, "n_edges": len(circuit)}
    recipe |= {"chance": chance, "chance_seed": seed} if n_random else {}
    return Faithfulness(*scale.interval(value), value, scale.whole, scale.empty, np.array(random), recipe)


def minimality(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    metric: Metric | MetricFn | str = logit_diff,
    using: Ablation = "counterfactual",
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """What each node of a circuit adds to it: f(C) − f(C without the node), with a 95% interval (paired bootstrap).

    This is the minimality criterion of Wang et al. 2022 with K = ∅; a node whose work another of the circuit can do
    scores 0 here, which a larger K would show. One row per node, largest change first; removing the last edges of a
    circuit leaves f = 0.
    """
    scale = Scale(model, pairs, circuit, metric, using, seed)
    whole = scale.evaluate(scale.mask())
    rows = []
    for node in circuit.nodes():
        without = scale.evaluate(_without(scale.mask(), circuit, [node]))
        change, lo, hi = scale.interval(whole, without)
        rows.append({"node": str(node), "role": circuit.roles.get(node, ""), "change": change, "lo": lo, "hi": hi})
    frame = pd.DataFrame(rows).sort_values("change", ascending=False, key=np.abs, ignore_index=True)
    frame.attrs.update(scale.recipe)
    return frame


def completeness(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    metric: Metric | MetricFn | str = logit_diff,
    using: Ablation = "counterfactual",
    *,
    n_random: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Does the circuit behave like the model under knock-outs? f(C∖K), f(M∖K) and their gap, for sets K of its nodes.

    Wang et al. 2022: a complete circuit has a small |f(C∖K) − f(M∖K)| for every K ⊆ C. K here: none, each node alone,
    ``n_random`` random halves, and all nodes (f(M∖C): what the model does without the circuit). The edges from and into
    K are ablated in both. One row per K.
    """
    _check_random(n_random)
    scale, nodes = Scale(model, pairs, circuit, metric, using, seed), circuit.nodes()
    knocked: list[tuple[str, Sequence[Site]]] = [("none", ()), *((str(n), (n,)) for n in nodes)]
    generator = np.random.default_rng(seed)
    for i in range(n_random):
        chosen = generator.random(len(nodes)) < 0.5
        knocked.append((f"random {i}", [n for n, c in zip(nodes, chosen, strict=True) if c]))
    knocked.append(("all", nodes))
    full = circuit.graph.allowed
    rows = []
    for name, removed in knocked:
        ours = scale.evaluate(_without(scale.mask(), circuit, removed))
        model_s = scale.evaluate(_without(full, circuit, removed))
        gap, lo, hi = scale.interval(ours, model_s)
        row = {"knocked_out": name, "n": len(removed), "circuit": scale.f(ours), "model": scale.f(model_s)}
        rows.append({**row, "gap": gap, "lo": lo, "hi": hi})
    frame = pd.DataFrame(rows)
    frame.attrs.update(scale.recipe)
    return frame


@dataclass(frozen=True)
class Faithfulness:
    """f(C), its 95% interval, the metric by example (of the circuit, the whole model and the empty one), f of random
    circuits of the same size, and the recipe."""

    value: float
    lo: float
    hi: float
    circuit: Float[np.ndarray, " examples"] = field(repr=False)
    whole: Float[np.ndarray, " examples"] = field(repr=False)
    empty: Float[np.ndarray, " examples"] = field(repr=False)
    random: Float[np.ndarray, " circuits"] = field(repr=False)
    recipe: dict[str, Any] = field(repr=False)

    @property
    def p(self) -> float:
        """Share of random circuits that are at least as faithful, (1 + hits) / (1 + n); NaN without any."""
        n = len(self.random)
        return (1 + int((self.random >= self.value).sum())) / (1 + n) if n else float("nan")


def _check_random(n: int) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise InterpError(f"n_random={n!r}: how many are drawn, from 0 on")


def random_circuit(
    graph: Architecture, n: int, generator: np.random.Generator
) -> Bool[np.ndarray, "receivers senders"]:
    """A mask of ``n`` edges made of random paths from the input to the logits.

    A path is drawn from the logits backwards: a sender that the receiver reads, one of that node's receivers (a
    head's q, k or v), and so on until the input. What a path too many would exceed n by is left out, and edges among
    the nodes that are in are drawn in its place; if there are too few of those, any others.
    """
    mask = np.zeros(graph.allowed.shape, dtype=bool)
    while n - mask.sum() > 0:
        path = _random_path(graph, generator)
        new = {place for place in path if not mask[place]}
        if mask.any() and mask.sum() + len(new) > n:
            break
        for place in list(new)[:n]:
            mask[place] = True
    sending = np.asarray(mask.any(axis=0))
    inside: np.ndarray = np.array(
        [any(sending[graph.sender_number[s]] for s in graph.fed_by(r)) for r in graph.receivers]
    )
    inside[graph.receiver_number[graph.output]] = True
    free: np.ndarray = graph.allowed & ~mask
    for choice in (free & inside[:, None] & sending[None], free):
        places = np.argwhere(choice & ~mask)
        more = generator.permutation(places)[: n - int(mask.sum())]
        mask[tuple(more.T)] = True
    return mask


def _random_path(graph: Architecture, generator: np.random.Generator) -> list[tuple[int, int]]:
    row, path = graph.receiver_number[graph.output], []
    while True:
        column = int(generator.choice(np.flatnonzero(graph.allowed[row])))
        path.append((row, column))
        if graph.senders[column] == graph.input:
            return path
        row = int(generator.choice(np.flatnonzero(graph.receivers_of(graph.senders[column]))))


def _random_edges(graph: Architecture, n: int, generator: np.random.Generator) -> Bool[np.ndarray, "receivers senders"]:
    mask = np.zeros(graph.allowed.shape, dtype=bool)
    mask[tuple(generator.permutation(np.argwhere(graph.allowed))[:n].T)] = True
    return mask


def _without(
    mask: Bool[np.ndarray, "receivers senders"], circuit: Circuit, nodes: Iterable[Site]
) -> Bool[np.ndarray, "receivers senders"]:
    """A mask without the edges from and into some nodes: k and v of a group go with the last of the circuit's heads."""
    graph, removed = circuit.graph, set(nodes)
    left = set(circuit.nodes()) - removed
    out = mask.copy()
    for site in removed:
        out[:, graph.sender_number[site]] = False
    for row, receiver in enumerate(graph.receivers):
        fed = set(graph.fed_by(receiver))
        if fed & removed and not fed & left:
            out[row] = False
    return out
