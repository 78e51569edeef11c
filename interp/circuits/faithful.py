"""How much of a behaviour a circuit carries alone: faithfulness, completeness, minimality, CPR and CMD.

All edges outside the circuit carry an ablated activation (`interp.circuits.running`). With m the metric's mean over
examples, M the whole model and ∅ the model with every edge ablated *by the same recipe*,

    f(C) = (m(C) − m(∅)) / (m(M) − m(∅)),

0 for no circuit and 1 for the whole model (Mueller et al. 2025, arXiv 2504.13151, MIB; under ``"counterfactual"`` m(∅)
is the corrupt run, as in Hanna et al. 2024). It swings widely with the recipe, so every result carries its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from interp.circuits.evaluation import Ablation, Evaluator
from interp.circuits.graph import Circuit
from interp.circuits.scores import EdgeScores
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model import Model
from interp.prompts import PromptPair
from interp.sites import Site

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
N_BOOT = 2000
Ranking = Literal["signed", "absolute"]
Selection = Literal["top", "greedy"]
Pairs = PromptPair | Iterable[PromptPair]
Index = np.ndarray  # examples drawn for a bootstrap sample


def faithfulness(
    model: Model,
    pairs: Pairs,
    circuit: Circuit,
    metric: Metric | MetricFn | str = logit_diff,
    using: Ablation = "counterfactual",
    *,
    n_random: int = 0,
    seed: int = 0,
) -> Faithfulness:
    """f(C) with a 95% bootstrap interval over examples, beside f of ``n_random`` random circuits of as many edges.

    ``using``: what edges outside carry: ``"counterfactual"`` (the corrupt run of the pair), ``"zero"``, ``"mean"``
    (over all tokens of all clean prompts) or ``"resample"`` (another example's clean run, drawn by ``seed``). Raises
    ModelError for a circuit of another model, InterpError where m(M) = m(∅): there is then nothing to explain.
    """
    circuit.check(model)
    evaluate = Evaluator(model, pairs, metric, using, seed)
    scale = _Scale(evaluate)
    value = evaluate(circuit.mask())
    random = [scale.mean(evaluate(mask)) for mask in _random_masks(circuit, n_random, seed)]
    recipe = {**evaluate.recipe, "circuit": circuit.provenance, "n_edges": len(circuit)}
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
    circuit.check(model)
    evaluate = Evaluator(model, pairs, metric, using, seed)
    scale = _Scale(evaluate)
    whole = evaluate(circuit.mask())
    rows = []
    for node in circuit.nodes():
        without = evaluate(_without(circuit.mask(), circuit, [node]))
        change, lo, hi = scale.interval(whole, without)
        rows.append({"node": str(node), "role": circuit.roles.get(node, ""), "change": change, "lo": lo, "hi": hi})
    frame = pd.DataFrame(rows).sort_values("change", ascending=False, key=np.abs, ignore_index=True)
    frame.attrs.update(evaluate.recipe)
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
    circuit.check(model)
    evaluate = Evaluator(model, pairs, metric, using, seed)
    scale, nodes = _Scale(evaluate), circuit.nodes()
    knocked: list[tuple[str, Sequence[Site]]] = [("none", ()), *((str(n), (n,)) for n in nodes)]
    generator = np.random.default_rng(seed)
    for i in range(n_random):
        chosen = generator.random(len(nodes)) < 0.5
        knocked.append((f"random {i}", [n for n, c in zip(nodes, chosen, strict=True) if c]))
    knocked.append(("all", nodes))
    full = circuit.graph.allowed
    rows = []
    for name, removed in knocked:
        ours = evaluate(_without(circuit.mask(), circuit, removed))
        model_s = evaluate(_without(full, circuit, removed))
        gap, lo, hi = scale.interval(ours, model_s)
        row = {"knocked_out": name, "n": len(removed), "circuit": scale.mean(ours), "model": scale.mean(model_s)}
        rows.append({**row, "gap": gap, "lo": lo, "hi": hi})
    frame = pd.DataFrame(rows)
    frame.attrs.update(evaluate.recipe)
    return frame


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
    ``"signed"``, most helpful first, as for CPR.
    """
    shares = np.asarray(sizes, dtype=float)
    if len(shares) < 2 or (np.diff(shares) <= 0).any() or shares[0] < 0 or shares[-1] > 1:
        raise InterpError(f"sizes={tuple(sizes)}: at least two shares of the edges, rising, between 0 and 1")
    if ranking not in get_args(Ranking) or selection not in get_args(Selection):
        raise InterpError(f"ranking={ranking!r}, selection={selection!r}: 'signed' or 'absolute', 'top' or 'greedy'")
    Circuit(scores.graph, scores.graph.edges(), provenance=scores.provenance).check(model)
    evaluate = Evaluator(model, pairs, metric, using, seed)
    scale = _Scale(evaluate)
    ranked = scores.helpful() if ranking == "signed" else scores
    masks = [_selected(ranked, int(s * len(scores)), ranking == "absolute", selection) for s in shares]
    values = np.stack([scale.empty if not mask.any() else evaluate(mask) for mask in masks])
    recipe = {**evaluate.recipe, "scores": scores.provenance, "ranking": ranking, "selection": selection}
    return Curve(shares, np.array([m.sum() for m in masks]), values, scale.whole, scale.empty, recipe)


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
        """
        return _with_interval(lambda i: integrate(self.sizes, self.faithfulness(i)), len(self.whole))

    @property
    def cmd(self) -> tuple[float, float, float]:
        """Integrated circuit–model distance: ∫ |1 − f| dk, as `cpr`; 0 is best."""
        return _with_interval(lambda i: integrate(self.sizes, np.abs(1 - self.faithfulness(i))), len(self.whole))

    def frame(self) -> pd.DataFrame:
        """One row per size: share, edges, f and its 95% interval."""
        n = len(self.whole)
        parts = [_with_interval(lambda i, s=s: self.faithfulness(i)[s], n) for s in range(len(self.sizes))]
        found = pd.DataFrame(parts, columns=["faithfulness", "lo", "hi"])
        return pd.concat([pd.DataFrame({"size": self.sizes, "edges": self.edges}), found], axis=1)


def integrate(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    """Trapezoid rule."""
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum())


class _Scale:
    """The metric on the whole model and the empty circuit: what f is measured between."""

    def __init__(self, evaluate: Evaluator) -> None:
        self.whole, self.empty = evaluate.whole, evaluate(np.zeros(evaluate.graph.allowed.shape, dtype=bool))
        size = np.abs(self.whole).mean() + np.abs(self.empty).mean()
        if not abs((self.whole - self.empty).mean()) > 1e-9 * size:
            raise InterpError(
                f"the metric is the same on the whole model and with every edge ablated ({self.whole.mean():.4g}, "
                f"{evaluate.recipe['ablation']}): there is no difference that a circuit could explain"
            )

    def mean(self, values: Float[np.ndarray, " examples"], index: Index | slice = slice(None)) -> float:
        """f: a ratio of means over examples."""
        empty = self.empty[index].mean()
        return float((values[index].mean() - empty) / (self.whole[index].mean() - empty))

    def interval(
        self, values: Float[np.ndarray, " examples"], minus: Float[np.ndarray, " examples"] | None = None
    ) -> tuple[float, float, float]:
        """f, or the difference of two, with its interval."""
        return _with_interval(
            lambda i: self.mean(values, i) - (0 if minus is None else self.mean(minus, i)), len(self.whole)
        )


def _with_interval(statistic: Callable[[Any], float], n: int) -> tuple[float, float, float]:
    """A statistic of examples and its 95% percentile bootstrap interval; NaN with a single example."""
    value = float(statistic(slice(None)))
    if n < 2:
        return value, float("nan"), float("nan")
    generator = np.random.default_rng(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = [statistic(generator.integers(0, n, n)) for _ in range(N_BOOT)]
    lo, hi = np.nanquantile(drawn, (0.025, 0.975))
    return value, float(lo), float(hi)


def _selected(
    scores: EdgeScores, n: int, absolute: bool, selection: Selection
) -> Bool[np.ndarray, "receivers senders"]:
    nothing = np.zeros(scores.graph.allowed.shape, dtype=bool)
    if n == 0:
        return nothing
    chosen = (scores.top if selection == "top" else scores.greedy)(n, absolute=absolute, prune=False)
    return chosen.connected().mask() if chosen.is_connected() else nothing


def _random_masks(circuit: Circuit, n: int, seed: int) -> Iterable[Bool[np.ndarray, "receivers senders"]]:
    generator, places = np.random.default_rng(seed), np.argwhere(circuit.graph.allowed)
    for _ in range(n):
        mask = np.zeros(circuit.graph.allowed.shape, dtype=bool)
        mask[tuple(generator.permutation(places)[: len(circuit)].T)] = True
        yield mask


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
