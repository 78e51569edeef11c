"""Roles rest on measurements: attention as in the dense pattern, effects as by patching, names of known heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp import zoo
from interp.circuits import Circuit, acdc, attribute_edges, name_roles, score_neurons
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.roles import attention_shares, effects_by_route
from interp.errors import InterpError
from interp.model.hooks import hooks
from interp.sites import Site

PAIRS = [
    interp.PromptPair("w1 w2 w3 w1 w2 w5", "w1 w9 w3 w1 w7 w5", " w3", " w96"),
    interp.PromptPair("w8 w8 w3 w4 w8 w6 w6", "w8 w8 w1 w4 w6 w2 w6", " w4", " w91"),
]


def test_attention_shares_equal_sums_over_the_dense_pattern(tiny, monkeypatch) -> None:
    model = tiny("llama")
    heads = [Site("z", 0, 1), Site("z", 2, 3)]
    want: dict[str, list[list[float]]] = {}
    for pair in PAIRS:
        ids = model.coder.encode(pair.clean)
        answer = model.coder.continuation(pair.answer)[0]
        seen = {}
        names = [f"blocks.{s.layer}.attn.hook_pattern" for s in heads]
        keep = [(n, lambda x, hook, n=n, seen=seen: seen.__setitem__(n, x)) for n in names]
        with torch.no_grad(), hooks(model, *keep):
            model.last_logits(torch.tensor([ids]))
        last = len(ids) - 1
        for i in range(len(ids)):
            keys = {
                "earlier": [j for j in range(1, i) if ids[j] == ids[i]],
                "after_earlier": [j for j in range(2, i) if ids[j - 1] == ids[i]],
                "previous": [i - 1] if i > 1 else [],
                "first": [0] if i else [],
                "answer": [j for j in range(1, last + 1) if ids[j] == answer and i == last],
                "repeated": [j for j in range(1, last) if ids.count(ids[j]) > 1 and i == last],
            }
            for name, found in keys.items():
                if found:
                    shares = [float(seen[n][0, s.head, i, found].sum()) for n, s in zip(names, heads, strict=True)]
                    want.setdefault(name, []).append(shares)
    for rows in (256, 3):
        monkeypatch.setattr("interp.circuits.roles.ROWS", rows)
        shares = attention_shares(Evaluator(model, PAIRS, "logit_diff", "counterfactual"), heads)
        for name, found in want.items():
            assert [shares[s][name] for s in heads] == pytest.approx(np.mean(found, axis=0).tolist(), abs=1e-6), name


def test_effects_equal_patching_and_paths(tiny) -> None:
    model = tiny("llama")
    evaluate = Evaluator(model, PAIRS, "logit_diff", "counterfactual")
    site = Site("z", 1, 2)
    found = effects_by_route(evaluate, [site, Site("z", 2, 0)])
    gap = evaluate.whole.mean() - evaluate(np.zeros_like(evaluate.graph.allowed)).mean()
    patched = interp.patch(model, PAIRS, site, mode="noise").frame()["raw"].mean()
    assert found[site]["total"] == pytest.approx(-patched / gap, rel=1e-5)
    direct = interp.path_patch(model, PAIRS, site).frame()["raw"].mean()
    assert found[site]["direct"] == pytest.approx(-direct / gap, rel=1e-5)
    assert found[Site("z", 2, 0)]["via_q"] == 0 and found[site]["via_k"] != 0


@pytest.mark.parametrize("name", ["induction", "ioi", "previous_token", "duplicate_token"])
def test_known_heads_get_their_names(name: str, tmp_path) -> None:
    known = getattr(zoo, name)()
    found = acdc(known.model, known.pairs(12), 0.05)
    named = name_roles(known.model, known.pairs(12), found)
    assert {str(s): role for s, role in named.roles.items()} == dict(known.roles)
    site = next(iter(named.roles))
    assert abs(named.evidence[site]["effect"]["total"]) > 0.5 and named.evidence[site]["thresholds"]["attention"] == 0.4
    again = Circuit.read(named.write(tmp_path / "c.json"), known.model)
    assert again.roles == named.roles and again.evidence.keys() == named.evidence.keys()
    assert (again | found).evidence.keys() == named.evidence.keys()


def test_a_name_needs_both_attention_and_effect() -> None:
    known = zoo.induction()
    idle = [s for s in known.circuit.graph.senders if s.component == "z" and s not in set(known.truth)]
    named = name_roles(known.model, known.pairs(4), known.circuit, heads=idle)
    assert {named.roles[s] for s in idle} <= {"unknown", "sink"}
    random = zoo.random()
    pairs = random.pairs(6)
    heads = [s for s in Circuit.whole(random.model).nodes() if s.component == "z"]
    roles = name_roles(random.model, pairs, Circuit.whole(random.model), heads=heads).roles
    assert set(roles.values()) <= {"unknown"}


def test_neurons_of_a_circuit(tmp_path) -> None:
    known = zoo.greater_than()
    circuit = score_neurons(known.model, known.pairs(12), known.circuit, k=5)
    assert len(circuit.neurons) == 5 and {s.layer for s in circuit.neurons} == {1}
    best, score = next(iter(circuit.neurons.items()))
    assert abs(score) == max(abs(x) for x in circuit.neurons.values()) > 0.01
    assert Circuit.read(circuit.write(tmp_path / "c.json")).neurons == circuit.neurons and best.component == "mlp_post"
    with pytest.raises(InterpError, match="0 MLPs"):
        score_neurons(zoo.one_head().model, zoo.one_head().pairs(2), zoo.one_head().circuit)


def test_what_cannot_be_named_is_refused() -> None:
    known = zoo.one_head()
    for bad in ({"attention": 0}, {"effect": 1.5}, {"effect": True}):
        with pytest.raises(InterpError, match="a share above 0"):
            name_roles(known.model, known.pairs(2), known.circuit, **bad)
    with pytest.raises(InterpError, match="has no head to name"):
        name_roles(known.model, known.pairs(2), known.circuit, heads=["resid_pre.L0"])
    pair = known.pairs(1)[0]
    same = interp.PromptPair(pair.clean, pair.clean, pair.answer, pair.foil)
    with pytest.raises(InterpError, match="no head can have an effect"):
        name_roles(known.model, same, known.circuit)


@pytest.mark.model
def test_the_induction_circuit_of_the_embedded_model(smollm2) -> None:
    """Its strongest induction head and the previous-token heads that feed it are found, and named by what they do."""
    pairs = interp.tasks.induction(smollm2, n=2, seed=0)
    circuit = attribute_edges(smollm2, pairs, method="clean-corrupted").top(400)
    assert {"z.L18H6", "z.L16H0", "z.L11H1"} <= set(map(str, circuit.nodes()))
    named = name_roles(smollm2, pairs, circuit, heads=["z.L18H6", "z.L16H0"])
    assert [named.roles[Site.parse(s)] for s in ("z.L18H6", "z.L16H0")] == ["induction", "previous token"]
    does = named.evidence[Site("z", 16, 0)]["effect"]
    assert does["via_k"] > max(0.05, does["via_q"], does["via_v"], does["direct"])  # K-composition
