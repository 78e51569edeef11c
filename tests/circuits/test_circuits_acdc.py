"""ACDC against edges tried one by one; circuits run together against one at a time."""

from __future__ import annotations

import numpy as np
import pytest

import interp
from interp import zoo
from interp.circuits import Circuit, acdc, acdc_sweep, attribute_edges
from interp.circuits.evaluation.evaluator import Evaluator
from interp.errors import InterpError, ModelError

PAIRS = [
    interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96"),
    interp.PromptPair("w8 w2 w3 w4 w6", "w8 w2 w1 w4 w6", "w90", "w91"),
    interp.PromptPair("w7 w2 w3 w4 w6 w9", "w7 w2 w1 w4 w6 w9", "w90", "w93"),
    interp.PromptPair("w7 w5 w3 w1 w6 w9", "w7 w5 w3 w4 w6 w9", "w80", "w93"),
]

# Hugging Face's RMS norms round to float32 on the way, so that sums in another order differ by its rounding.
ATOL = 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox"])
@pytest.mark.parametrize("using", ["counterfactual", "mean", "zero", "resample"])
def test_circuits_run_together_as_they_run_alone(tiny, kind: str, using, monkeypatch) -> None:
    """Packed with others and from the first layer that differs, against a full forward of each."""
    slow = Evaluator(tiny(kind), PAIRS, interp.logit_diff, using, engine="naive")
    graph = slow.graph
    rng = np.random.default_rng(0)
    masks = [graph.allowed & (rng.random(graph.allowed.shape) < p) for p in (0.1, 0.7, 1)]
    for layer in range(graph.n_layers + 1):  # the second one, from a layer on with other edges
        late = graph.n_layers - 1 if layer == graph.n_layers else layer
        first = graph.rows(late, "resid_post" if layer == graph.n_layers else "q").start
        masks.append(np.where(np.arange(len(graph.receivers))[:, None] >= first, masks[0], masks[1]))
    alone = slow.many(np.stack(masks))
    assert np.abs(alone[1] - alone[3:]).min() > 1e-4
    for tokens in (1024, 1):
        monkeypatch.setattr("interp.circuits.evaluation.evaluator.TOKENS", tokens)
        evaluate = Evaluator(tiny(kind), PAIRS, interp.logit_diff, using)
        assert evaluate.packed is not None and len(evaluate.packed) == (1 if tokens > 1 else len(PAIRS))
        np.testing.assert_allclose(evaluate.many(np.stack(masks)), alone, atol=ATOL)
        np.testing.assert_allclose(evaluate.many(np.stack(masks), evaluate.start(masks[1])), alone, atol=ATOL)
    monkeypatch.setattr("interp.circuits.evaluation.ablated_forward.HELD_BYTES", 0)
    evaluate = Evaluator(tiny(kind), PAIRS, interp.logit_diff, using)
    assert evaluate.packed is None and evaluate.start(masks[1]) is None
    np.testing.assert_allclose(evaluate.many(np.stack(masks)), alone, atol=ATOL)


def one_by_one(model, threshold, metric, order, parents, absolute, start=None):
    """Every edge removed alone and put back if the metric suffers, one forward each."""
    evaluate = Evaluator(model, PAIRS[1:], metric, "counterfactual")
    graph, mask = evaluate.graph, (start.mask() if start else evaluate.graph.allowed.copy())
    value = evaluate(mask).mean()
    rows = range(len(graph.receivers))
    for row in rows if order == "forward" else rows[::-1]:
        columns = np.flatnonzero(mask[row])
        for column in columns if parents == "early" else columns[::-1]:
            mask[row, column] = False
            after = evaluate(mask).mean()
            worse = value - after if evaluate.metric.direction > 0 else after - value
            if (abs(worse) if absolute else worse) < threshold:
                value = after
            else:
                mask[row, column] = True
    return mask


@pytest.mark.parametrize(
    "kind,metric,order,parents,absolute,threshold",
    [
        ("llama", "kl", "backward", "late", False, 2e-4),
        ("neox", "kl", "forward", "early", False, 2e-4),
        ("gpt2", "logit_diff", "backward", "early", True, 2e-3),
    ],
)
def test_equals_edges_tried_one_by_one(tiny, kind, metric, order, parents, absolute, threshold, monkeypatch) -> None:
    model = tiny(kind)
    start = attribute_edges(model, PAIRS, method="eap").top(40, prune=False)
    how = {"order": order, "parents": parents, "absolute": absolute, "start": start, "prune": False}
    want = one_by_one(model, threshold, metric, order, parents, absolute, start)
    assert 3 < want.sum() < 37
    for chain in (64, 3):
        monkeypatch.setattr("interp.circuits.acdc_search.CHAIN", chain)
        found = acdc(model, PAIRS[1:], threshold, metric, **how)
        np.testing.assert_array_equal(found.mask(), want)
    assert found.provenance["threshold"] == threshold and found.provenance["start"]["method"] == "eap"
    assert all(abs(x) >= threshold for x in found.edges.values())


def test_finds_a_known_circuit_in_both_orders() -> None:
    known = zoo.induction()
    for order, parents in (("backward", "late"), ("forward", "early"), ("backward", "random")):
        assert acdc(known.model, known.pairs(2), 0.1, order=order, parents=parents) == known.circuit, order
    sweep = acdc_sweep(known.model, known.pairs(2), [1.0, 0.1, 0.3])
    assert sweep.above(0.9) == known.circuit and [row["edges"] for row in sweep.provenance["sweep"]] == [3, 3, 3]
    assert acdc(known.model, known.pairs(2), 5, "logit_diff", "zero") == known.mechanism


def test_what_cannot_be_searched_is_refused(tiny) -> None:
    known = zoo.one_head()
    model, pairs = known.model, known.pairs(2)
    with pytest.raises(InterpError, match=r"keeps no edge: when tried, edges made kl worse by .* to .*; choose"):
        acdc(model, pairs, 1e6)
    two = attribute_edges(model, pairs, method="eap").top(2)
    with pytest.raises(InterpError, match="keeps all 2 edges"):
        acdc(model, pairs, 0.1, start=two)
    for bad in (0, -1, float("nan"), float("inf"), True, "x"):
        with pytest.raises(InterpError, match="a number above 0"):
            acdc(model, pairs, bad)  # type: ignore[arg-type]
    for bad in ([], 0.1):
        with pytest.raises(InterpError, match="several numbers, or at least one, in a list"):
            acdc_sweep(model, pairs, bad)  # type: ignore[arg-type]
    with pytest.raises(InterpError, match="'backward' or 'forward'"):
        acdc(model, pairs, 0.1, order="sideways")  # type: ignore[arg-type]
    same = interp.PromptPair(pairs[0].clean, pairs[0].clean, pairs[0].answer, pairs[0].foil)
    for metric in ("kl", "logit_diff"):
        with pytest.raises(InterpError, match="no difference that a circuit could explain"):
            acdc(model, same, 0.1, metric)
    with pytest.raises(ModelError, match="the circuit is of a model with"):
        acdc(tiny("llama"), PAIRS, 0.1, start=two)
    dead = Circuit.of(model, ["z.L0H0 -> q.L1H1", "resid_pre.L0 -> k.L0H0"])
    with pytest.raises(InterpError, match="the circuit is disconnected"):
        acdc(model, pairs, 0.1, start=dead)
    with pytest.raises(ModelError, match="no norm in front"):
        acdc(tiny("olmo2"), PAIRS, 0.1)
