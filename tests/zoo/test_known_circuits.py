"""The circuits that hand-set models come with: exact patching finds just these nodes and edges, and they suffice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from naive_hooks import run

import interp
from interp import zoo
from interp.circuits.evaluation.evaluator import Evaluator
from interp.errors import TaskError
from interp.prompts.pairs import encode_pairs
from interp.sites import Edge, Site
from interp.zoo.planted import LOGIT

MODELS = {
    "induction": zoo.induction, "one_head": zoo.one_head, "previous_token": zoo.previous_token,
    "duplicate_token": zoo.duplicate_token, "ioi": zoo.ioi, "ioi-abc": lambda: zoo.ioi(corruption="abc"),
    "two_hop": zoo.two_hop, "greater_than": zoo.greater_than,
    "tracr_induction": zoo.tracr_induction,
}  # fmt: skip
NEW = [name for name in MODELS if name not in ("induction", "one_head", "tracr_induction")]
SAYS = {"tracr_induction": 1.0}  # the logit of the answer, in place of LOGIT


@pytest.fixture(scope="module", params=MODELS)
def known(request):
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def pairs(known):
    return known.pairs(12, seed=1)


NONE = 1e-5  # an effect, on the recovery scale, that is float32's rounding of logits of some twenty


def extremes(effects: dict, truth: set) -> tuple[float, float]:
    """The least effect of what is true, and the largest |effect| of what is not: 1 and 0 in theory."""
    assert truth and truth < set(effects)
    return min(effects[t] for t in truth), max(abs(x) for t, x in effects.items() if t not in truth)


def test_answers_are_certain_and_foils_are_not_mentioned(known, pairs):
    for pair, e in zip(pairs, encode_pairs(pairs, known.model.coder), strict=True):
        clean, corrupt = known.model.next_token_logits([e.clean, e.corrupt]).double()
        said = SAYS.get(known.name, LOGIT)
        assert (clean[e.answer] - clean[e.foil]).item() == pytest.approx(said, abs=5e-3)
        other_way = (corrupt[e.answer] - corrupt[e.foil]).item() / said
        assert min(abs(other_way - expected) for expected in (0, -1)) < 1e-3, pair
        allowed = known.name == "greater_than"  # several answers are right there
        assert allowed or clean.argmax().item() == e.answer


def test_heads_attend_where_they_are_said_to(known, pairs):
    for pair in pairs:
        _, cache = run(known.bridge, [pair.clean])
        for site, keys in known.attends(pair).items():
            pattern = cache[f"blocks.{site.layer}.attn.hook_pattern"][0, site.head]
            told = pattern[len(pattern) - len(keys) :]
            assert min(row[key] for row, key in zip(told, keys, strict=True)) > 0.999, (site, pair)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_patching_nodes_finds_the_circuit(known, pairs, mode):
    sites = known.model.sites("z")
    if known.circuit.graph.mlps:
        sites = sites | known.model.sites("mlp_out", positions="all")
    table = interp.patch(known.model, pairs, sites, mode=mode, show_progress=False).summary()
    rows = table.assign(head=table["head"].fillna(-1)).itertuples()
    effects = {Site(r.component, int(r.layer), None if r.head < 0 else int(r.head)): r.effect for r in rows}
    least, other = extremes(effects, set(known.truth))
    assert least > 0.1 and other < NONE
    assert set(known.truth) == set(known.circuit.nodes()) - {known.circuit.graph.input}


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("component", ["resid_pre", "resid_post"])
def test_patching_the_residual_stream_finds_the_path(known, pairs, mode, component):
    some = list(pairs)[:6]
    sites = known.model.sites(component)
    table = interp.patch(known.model, some, sites, mode=mode, show_progress=False).frame()
    for row in table.itertuples():
        expected = float(Site(component, row.layer, position=row.position) in known.truth_resid(some[row.example]))
        assert row.effect == pytest.approx(expected, abs=2e-3), row


def test_corrupting_one_edge_finds_the_circuit(known, pairs):
    """Exact, for every edge from the input on: the clean model with the corrupt activation along one edge."""
    evaluate = Evaluator(known.model, pairs, "logit_diff", "counterfactual")
    graph, edges = evaluate.graph, list(evaluate.graph.edges())
    gap = (evaluate(np.zeros_like(graph.allowed)) - evaluate.whole).mean()
    masks = np.repeat(graph.allowed[None], len(edges), axis=0)
    for mask, edge in zip(masks, edges, strict=True):
        mask[graph.place(edge)] = False
    found = (evaluate.many(masks, evaluate.start(graph.allowed)) - evaluate.whole).mean(1) / gap
    effects = dict(zip(edges, found, strict=True))
    least, other = extremes(effects, set(known.circuit.edges))
    assert least > 0.1 and other < NONE


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_path_patching_finds_the_circuit(known, pairs, mode):
    model, graph = known.model, known.circuit.graph
    senders = [s for s in graph.senders if s != graph.input]
    table = interp.path_patch(model, pairs, senders, graph.receivers, mode=mode, show_progress=False).frame()
    names = ["sender", "component", "layer", "head"]
    means = table.assign(head=table["head"].fillna(-1)).groupby(names)["effect"].mean()
    effects = {
        Edge(Site.parse(sender), Site(component, int(layer), None if head < 0 else int(head))): effect
        for (sender, component, layer, head), effect in means.items()
    }
    truth = {e for e in known.circuit.edges if e.sender != graph.input}
    if known.name == "ioi" and mode == "denoise":
        # Where and what are both lost with a third name; one of them alone mends nothing.
        truth -= {Edge.parse("z.L0H1 -> k.L1H2"), Edge.parse("z.L0H1 -> v.L1H2")} if len(known.circuit) == 5 else set()
    least, other = extremes(effects, truth)
    assert least > 0.1 and other < NONE


def test_the_mechanism_suffices_and_needs_each_of_its_edges(known, pairs):
    evaluate = Evaluator(known.model, pairs, "logit_diff", "zero")
    mask, graph = known.mechanism.mask(), known.mechanism.graph
    np.testing.assert_allclose(evaluate(mask), evaluate.whole, atol=2e-3)
    for edge in known.mechanism.edges:
        without = mask.copy()
        without[graph.place(edge)] = False
        assert np.mean(evaluate.whole - evaluate(without)) > 0.2 * SAYS.get(known.name, LOGIT), str(edge)
    assert known.mechanism.is_connected() and set(known.circuit.edges) <= set(known.mechanism.edges)


@pytest.mark.parametrize("name", NEW)
def test_what_does_not_matter_is_busy(name):
    """Inert parts move information, and shift all logits; else finding the planted ones would be no test."""
    known = MODELS[name]()
    ids, cache = run(known.bridge, [known.pairs(1)[0].clean])
    planted = set(known.truth)
    for layer in range(known.bridge.cfg.n_layers):
        for head in range(known.bridge.cfg.n_heads):
            if Site("z", layer, head) not in planted:
                assert cache[f"blocks.{layer}.attn.hook_z"][0, 1:, head].norm(dim=-1).min() > 0.1
        assert cache[f"blocks.{layer}.hook_mlp_out"][0].norm(dim=-1).min() > 0.1
    with torch.no_grad():
        shifts = known.bridge(ids)[0, -1, :4]  # special tokens are never said
    assert shifts.std() < 1e-5 and shifts.abs().min() > 1e-3


@pytest.mark.parametrize("name", NEW)
def test_same_weights_and_pairs_every_time(name):
    a, b = MODELS[name](), MODELS[name]()
    for x, y in zip(a.bridge.original_model.parameters(), b.bridge.original_model.parameters(), strict=True):
        assert torch.equal(x, y)
    assert list(a.pairs(8, 3)) == list(b.pairs(8, 3)) != list(a.pairs(8, 4))
    for pair in a.pairs(8):
        assert all(pair.clean[start:stop] in pair.clean.split() for start, stop in pair.spans.values())


def test_grouped_queries_share_keys_and_values():
    known = zoo.two_hop()
    assert (known.model.n_heads, known.model.n_kv_heads) == (4, 2)


def test_circuits_round_trip_and_belong_to_their_model(tmp_path):
    known = zoo.ioi()
    path = known.circuit.write(tmp_path / "ioi.json")
    again = interp.circuits.Circuit.read(path, known.model)
    assert again == known.circuit and again.roles[Site("z", 1, 2)] == "inhibition"
    with pytest.raises(interp.errors.ModelError, match=r"made for zoo\.ioi"):
        interp.circuits.Circuit.read(path, zoo.duplicate_token().model)


def test_bad_requests_are_refused():
    with pytest.raises(TaskError, match="no circuit: its weights are random"):
        _ = zoo.random().circuit
    with pytest.raises(TaskError, match="'swap' or 'abc'"):
        zoo.ioi(corruption="third")  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="stands twice"):
        zoo.ioi().facts(1)
    with pytest.raises(TaskError, match="at most 36"):
        zoo.ioi().pairs(37)
