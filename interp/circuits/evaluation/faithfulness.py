"""Faithfulness, completeness and minimality of circuits.

They measure how much of a behaviour a circuit carries alone. All edges outside the circuit carry an ablated activation
(`interp.circuits.evaluation.ablated_forward`). With m the metric's mean over examples, M the whole model and ∅ the
model with every edge ablated *by the same recipe*,

    f(C) = (m(C) − m(∅)) / (m(M) − m(∅)),

which is 0 for no circuit and 1 for the whole model (Mueller et al. 2025, arXiv 2504.13151, MIB; under
``"counterfactual"`` m(∅) is the corrupt run, as in Hanna et al. 2024). f varies widely with the ablation recipe, so
every result stores its recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from interp.circuits.choices import Ablation, Chance
from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.scale import Scale, recipe_text
from interp.circuits.inputs import Pairs
from interp.circuits.topology import Architecture
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.model import Model
from interp.model.session import in_session
from interp.sites import Site
from interp.utils.arguments import check_whole
from interp.utils.progress import progress


@in_session
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
    show_progress: bool | None = None,
) -> Faithfulness:
    """Measure f(C) with a 95% interval over examples.

    The result also has f of ``n_random`` random circuits of equal size.

        known = interp.zoo.induction()
        result = faithfulness(known.model, known.pairs(16), known.circuit, n_random=10)
        print(result.value, result.lo, result.hi, result.p)

    ``using``: the activation on edges outside the circuit: ``"counterfactual"`` (the corrupt run of the pair),
    ``"zero"``, ``"mean"`` (over all tokens of all clean prompts) or ``"resample"`` (another example's clean run, drawn
    by ``seed``). ``chance``: random circuits consist of ``"paths"`` from the input to the logits (`random_circuit`), or
    of ``"edges"`` drawn one by one; few of these edges lie on any path, so such circuits are easier to beat. Raises
    ModelError for a circuit of another model, and InterpError for a disconnected circuit or if m(M) = m(∅), so that
    there is nothing to explain.
    """
    if chance not in get_args(Chance):
        raise InterpError(f"chance={chance!r}: random circuits consist of 'paths' or of 'edges'")
    check_whole(0, n_random=n_random)
    scale = Scale(model, pairs, circuit, metric, using, seed)
    generator, draw = np.random.default_rng(seed), random_circuit if chance == "paths" else _random_edges
    with progress("faithfulness", 1 + n_random, show_progress) as advance:
        values = scale.evaluate(scale.mask())
        advance(1)
        random = []
        for _ in range(n_random):
            random.append(scale.f(scale.evaluate(draw(circuit.graph, len(circuit), generator))))
            advance(1)
    recipe = {**scale.recipe, "circuit": circuit.provenance, "n_edges": len(circuit)}
    if n_random:
        recipe |= {"chance": chance, "chance_seed": seed}
    return Faithfulness(*scale.interval(values), values, scale.whole, scale.empty, np.array(random), recipe)


@in_session
def minimality(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    metric: Metric | MetricFn | str = logit_diff,
    using: Ablation = "counterfactual",
    *,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure what each node adds to a circuit: f(C) − f(C without the node).

    Each change has a 95% interval over examples (paired). This is the minimality criterion of Wang et al. 2022 with K =
    ∅. A node whose work another node of the circuit can do scores 0 here; a larger K would show its effect. One row per
    node, largest change first. Removing the last edges of a circuit leaves f = 0.
    """
    scale = Scale(model, pairs, circuit, metric, using, seed)
    with_all = scale.evaluate(scale.mask())
    rows, nodes = [], circuit.nodes()
    with progress("minimality", len(nodes)) as advance:
        for node in nodes:
            without = scale.evaluate(_without_nodes(scale.mask(), circuit, [node]))
            change, lo, hi = scale.interval(with_all, without)
            rows.append({"node": str(node), "role": circuit.roles.get(node, ""), "change": change, "lo": lo, "hi": hi})
            advance(1)
    frame = pd.DataFrame(rows).sort_values("change", ascending=False, key=np.abs, ignore_index=True)
    frame.attrs.update(scale.recipe)
    return frame


@in_session
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
    """Compare circuit and model under knock-outs of sets K of the circuit's nodes.

    The result has f(C∖K), f(M∖K) and their gap. Wang et al. 2022: a complete circuit has a small |f(C∖K) − f(M∖K)| for
    every K ⊆ C. The sets K are: none, each node alone, ``n_random`` random halves, and all nodes (f(M∖C): the model
    without the circuit). The edges from and into K are ablated in both. One row per K.
    """
    check_whole(0, n_random=n_random)
    scale, nodes = Scale(model, pairs, circuit, metric, using, seed), circuit.nodes()
    rows = []
    with progress("completeness", 2 * (len(nodes) + n_random + 2)) as advance:
        for name, removed in _knock_out_sets(nodes, n_random, seed):
            of_circuit = scale.evaluate(_without_nodes(scale.mask(), circuit, removed))
            advance(1)
            of_model = scale.evaluate(_without_nodes(circuit.graph.allowed, circuit, removed))
            advance(1)
            gap, lo, hi = scale.interval(of_circuit, of_model)
            row = {"knocked_out": name, "n": len(removed), "circuit": scale.f(of_circuit), "model": scale.f(of_model)}
            rows.append({**row, "gap": gap, "lo": lo, "hi": hi})
    frame = pd.DataFrame(rows)
    frame.attrs.update(scale.recipe)
    return frame


def _knock_out_sets(nodes: Sequence[Site], n_random: int, seed: int) -> Iterator[tuple[str, Sequence[Site]]]:
    """The sets of nodes that `completeness` knocks out, with their names."""
    yield "none", ()
    yield from ((str(node), (node,)) for node in nodes)
    generator = np.random.default_rng(seed)
    for i in range(n_random):
        is_removed = generator.random(len(nodes)) < 0.5
        yield f"random {i}", [node for node, removed in zip(nodes, is_removed, strict=True) if removed]
    yield "all", nodes


@dataclass(frozen=True)
class Faithfulness:
    """f(C) with its 95% interval, f of random circuits, and the recipe.

    Random circuits have the same size as the circuit. ``circuit``, ``whole`` and ``empty`` are the metric of the
    circuit, the whole model and the empty circuit.
    """

    value: float
    lo: float
    hi: float
    circuit: Float[np.ndarray, " examples"] = field(repr=False)
    whole: Float[np.ndarray, " examples"] = field(repr=False)
    empty: Float[np.ndarray, " examples"] = field(repr=False)
    random: Float[np.ndarray, " circuits"] = field(repr=False)
    recipe: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        n = len(self.whole)
        interval = f" [{self.lo:.3f}, {self.hi:.3f}]" if n > 1 else ""
        recipe = recipe_text(self.recipe, n)
        chance = f"; random circuits: {random_text(self.random, self.recipe)}" if len(self.random) else ""
        return f"Faithfulness({self.value:.3f}{interval} of {self.recipe.get('n_edges', '?')} edges; {recipe}{chance})"

    @property
    def p(self) -> float:
        """Share of random circuits that are at least as faithful.

        (1 + hits) / (1 + n); NaN without random circuits.
        """
        n = len(self.random)
        return (1 + int((self.random >= self.value).sum())) / (1 + n) if n else float("nan")


def random_text(random: Float[np.ndarray, " circuits"], recipe: Mapping[str, Any]) -> str:
    """Describe f of random circuits, and how they are drawn."""
    return f"mean {random.mean():.3f}, at most {random.max():.3f} of {len(random)} ({recipe.get('chance', 'paths')})"


def random_circuit(
    graph: Architecture, n: int, generator: np.random.Generator
) -> Bool[np.ndarray, "receivers senders"]:
    """A mask of ``n`` edges on random paths from the input to the logits.

    A path is drawn from the logits backwards: a sender that the receiver reads, one of that node's receivers (a head's
    q, k or v), and so on until the input. A path that would exceed n edges is discarded. The missing edges are then
    drawn among the nodes that are already in the circuit; if there are too few of those edges, among all others.
    """
    mask = np.zeros(graph.allowed.shape, dtype=bool)
    while n - mask.sum() > 0:
        path = _random_path(graph, generator)
        new = {place for place in path if not mask[place]}
        if mask.any() and mask.sum() + len(new) > n:
            break
        for place in list(new)[:n]:
            mask[place] = True
    is_sending = np.asarray(mask.any(axis=0))
    is_inside: np.ndarray = np.array(
        [any(is_sending[graph.sender_number[s]] for s in graph.fed_by(r)) for r in graph.receivers]
    )
    is_inside[graph.receiver_number[graph.output]] = True
    unused: np.ndarray = graph.allowed & ~mask
    for candidates in (unused & is_inside[:, None] & is_sending[None], unused):
        places = np.argwhere(candidates & ~mask)
        drawn = generator.permutation(places)[: n - int(mask.sum())]
        mask[tuple(drawn.T)] = True
    return mask


def _random_path(graph: Architecture, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Rows and columns of the edges of a random path, from the logits to the input."""
    row, path = graph.receiver_number[graph.output], []
    while True:
        column = int(generator.choice(np.flatnonzero(graph.allowed[row])))
        path.append((row, column))
        if graph.senders[column] == graph.input:
            return path
        row = int(generator.choice(np.flatnonzero(graph.receivers_of(graph.senders[column]))))


def _random_edges(graph: Architecture, n: int, generator: np.random.Generator) -> Bool[np.ndarray, "receivers senders"]:
    """A mask of ``n`` edges drawn uniformly."""
    mask = np.zeros(graph.allowed.shape, dtype=bool)
    mask[tuple(generator.permutation(np.argwhere(graph.allowed))[:n].T)] = True
    return mask


def _without_nodes(
    mask: Bool[np.ndarray, "receivers senders"], circuit: Circuit, nodes: Iterable[Site]
) -> Bool[np.ndarray, "receivers senders"]:
    """A mask without the edges from and into some nodes.

    Edges into the k and v of a group are removed if no head of the group is left in the circuit.
    """
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
