"""A model run as a circuit, and what is computed from that, against many explicit forwards in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_circuits import metric_as_circuit, outputs

import interp
from interp.circuits import Circuit, completeness, curve, faithfulness, mib, minimality, random_scores
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.evaluation.faithfulness import random_circuit
from interp.circuits.topology import Architecture, architecture
from interp.errors import InterpError, ModelError
from interp.sites import Edge, Site

PAIRS = [
    interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96"),
    interp.PromptPair("w8 w2 w3 w4 w6", "w8 w2 w1 w4 w6", "w90", "w91"),
]
# Hugging Face's RMS norms round to float32 on the way, so that sums in another order differ by its rounding.
ATOL = 1e-5


def ablated(model, using: str) -> list[dict[Site, torch.Tensor]]:
    """What senders send along edges that are left out, pair by pair, by the recipe's own words."""
    clean = [outputs(model, p.clean) for p in PAIRS]
    if using == "counterfactual":
        return [outputs(model, p.corrupt) for p in PAIRS]
    if using == "resample":
        return clean[::-1]  # of two prompts, the other one
    if using == "zero":
        return [{s: torch.zeros_like(x) for s, x in clean[0].items()}] * 2
    return [{s: torch.cat([c[s] for c in clean]).mean((0, 1)) for s in clean[0]}] * 2


def edges_of(graph: Architecture, mask: np.ndarray) -> set[Edge]:
    return {e for e in graph.edges() if mask[graph.place(e)]}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("using", ["counterfactual", "zero", "mean", "resample"])
def test_circuits_equal_explicit_forwards(tiny, kind: str, using) -> None:
    model = tiny(kind)
    evaluate = Evaluator(model, PAIRS, interp.logit_diff, using)
    naive = Evaluator(model, PAIRS, interp.logit_diff, using, engine="naive")
    assert evaluate.packed is not None and naive.packed is None
    graph, sent = evaluate.graph, ablated(model, using)
    generator = np.random.default_rng(0)
    for share in (0.05, 0.3, 0.8):
        mask = graph.allowed & (generator.random(graph.allowed.shape) < share)
        kept = edges_of(graph, mask)
        want = [metric_as_circuit(model, p, kept, s) for p, s in zip(PAIRS, sent, strict=True)]
        np.testing.assert_allclose(evaluate(mask), want, atol=ATOL)
        np.testing.assert_allclose(naive(mask), want, atol=ATOL)


def test_measures_equal_their_definitions(tiny) -> None:
    """f, minimality, completeness, CPR and CMD of a model with grouped queries, term by term."""
    model = tiny("llama")
    graph, sent = architecture(model), ablated(model, "counterfactual")

    def m(kept: set[Edge]) -> float:
        return float(np.mean([metric_as_circuit(model, p, kept, s) for p, s in zip(PAIRS, sent, strict=True)]))

    every = set(graph.edges())
    top, bottom = m(every), m(set())

    def f(kept: set[Edge]) -> float:
        return (m(kept) - bottom) / (top - bottom)

    def approx(x: float):
        return pytest.approx(x, abs=ATOL / abs(top - bottom))

    names = ["resid_pre.L0 -> v.L0H1", "z.L0H3 -> mlp_out.L0", "mlp_out.L0 -> q.L1H0", "z.L1H0 -> resid_post.L2"]
    names += ["resid_pre.L0 -> mlp_out.L1", "mlp_out.L1 -> resid_post.L2"]
    circuit = Circuit.of(model, names)
    assert faithfulness(model, PAIRS, circuit).value == approx(f(set(circuit.edges)))

    def without(edges: set[Edge], node: str) -> set[Edge]:
        """Edges from a node and into it; v.L0H1 feeds heads 2 and 3, of which the circuit has head 3."""
        into = {"z.L0H3": ["v.L0H1", "q.L0H3", "k.L0H1"], "mlp_out.L1": ["mlp_out.L1"]}[node]
        return {e for e in edges if str(e.sender) != node and str(e.receiver) not in into}

    least = minimality(model, PAIRS, circuit).set_index("node")["change"]
    whole = completeness(model, PAIRS, circuit, n_random=0).set_index("knocked_out")
    for node in ("z.L0H3", "mlp_out.L1"):
        left = f(without(set(circuit.edges), node))
        assert least[node] == approx(f(set(circuit.edges)) - left)
        assert whole.loc[node, "circuit"] == approx(left)
        assert whole.loc[node, "model"] == approx(f(without(every, node)))

    scores = random_scores(model)
    sizes = (0.05, 0.3, 1.0)
    found = curve(model, PAIRS, scores, sizes=sizes)
    circuits = [scores.top(int(s * len(graph)), prune=False) for s in sizes]
    fs = [f(set(c.connected().edges)) if c.is_connected() else 0.0 for c in circuits]
    assert found.frame()["faithfulness"].tolist() == [approx(x) for x in fs]
    areas = [(b - a) * (g + h) / 2 for a, b, g, h in zip(sizes, sizes[1:], fs, fs[1:], strict=False)]
    assert found.cpr[0] == approx(sum(areas))
    gaps = [abs(1 - x) for x in fs]
    areas = [(b - a) * (g + h) / 2 for a, b, g, h in zip(sizes, sizes[1:], gaps, gaps[1:], strict=False)]
    assert found.cmd[0] == approx(sum(areas))


@pytest.mark.parametrize("metric", ["kl", "prob", "logprob"])
def test_other_metrics_have_the_same_scale(tiny, metric: str) -> None:
    model = tiny("llama")
    every, some = Circuit.whole(model), random_scores(model).top(60)
    assert faithfulness(model, PAIRS, every, metric=metric).value == pytest.approx(1, abs=ATOL)
    evaluate = Evaluator(model, PAIRS, metric, "zero")
    m = [evaluate(x).mean() for x in (some.mask(), every.mask(), np.zeros_like(every.mask()))]
    found = faithfulness(model, PAIRS, some, metric=metric, using="zero")
    assert found.value == pytest.approx((m[0] - m[2]) / (m[1] - m[2]), abs=1e-9)  # the same float64 sums
    assert (found.recipe["metric"], found.recipe["using"]) == (metric, "zero")


def test_mib_ranks_as_published(tiny) -> None:
    """CPR by signed scores, most helpful first; CMD by absolute ones."""
    model = tiny("gpt2")
    scores = interp.circuits.attribute_edges(model, PAIRS, method="eap")
    found = mib(model, PAIRS, scores)
    for ranking, area in (("signed", found.cpr), ("absolute", found.cmd)):
        alone = curve(model, PAIRS, scores, ranking=ranking)
        assert area == (alone.cpr if ranking == "signed" else alone.cmd)
        assert getattr(found, ranking).recipe["ranking"] == ranking
        assert getattr(found, ranking).recipe["scores"]["method"] == "eap"
    assert found.cpr[1] <= found.cpr[0] <= found.cpr[2]


@pytest.mark.parametrize("n", [1, 2, 7, 60, None])
def test_random_circuits_are_connected_and_of_the_same_size(n: int | None) -> None:
    graph = Architecture(n_layers=3, n_heads=4, n_kv_heads=2, mlps=True, parallel=False)
    for seed in range(5):
        mask = random_circuit(graph, n or len(graph), np.random.default_rng(seed))
        assert mask.sum() == (n or len(graph)) and not (mask & ~graph.allowed).any()
        if n == 60:
            circuit = Circuit(graph, edges_of(graph, mask))
            assert len(circuit.connected()) > 50  # what ends in a node without further edges is pruned


def test_circuits_that_cannot_be_measured_are_refused(tiny) -> None:
    model = tiny("llama")
    dead = Circuit.of(model, ["resid_pre.L0 -> q.L0H0", "z.L1H0 -> resid_post.L2"])
    for measure in (faithfulness, minimality, completeness):
        with pytest.raises(InterpError, match="the circuit is disconnected: none of its 2 edges"):
            measure(model, PAIRS, dead)
    path = ["resid_pre.L0 -> resid_post.L2"]
    other = Circuit(architecture(model), path, provenance={"weights": "0" * 24, "model": "another"})
    with pytest.raises(ModelError, match="made for another with weights 0000"):
        faithfulness(model, PAIRS, other)
    with pytest.raises(InterpError, match="chance='x'"):
        faithfulness(model, PAIRS, Circuit.of(model, path), chance="x")  # type: ignore[arg-type]
