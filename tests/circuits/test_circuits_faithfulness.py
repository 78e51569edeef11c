"""Running a model as a circuit, against path patching, ablation, TransformerLens and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp import zoo
from interp.circuits import (
    Circuit,
    attribute_edges,
    completeness,
    curve,
    faithfulness,
    magnitude_scores,
    minimality,
    random_scores,
)
from interp.circuits.evaluation.curves import MIB_SIZES, Curve
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.scores import EdgeScores
from interp.circuits.topology import architecture
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, ModelError, PromptError
from interp.sites import Edge, Site

PAIR = interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96")
PAIRS = [
    PAIR,
    interp.PromptPair("w8 w2 w3 w4 w6", "w8 w2 w1 w4 w6", "w90", "w91"),
    interp.PromptPair("w7 w2 w3 w4 w6 w9", "w7 w2 w1 w4 w6 w9", "w90", "w93"),
    interp.PromptPair("w7 w5 w3 w1 w6 w9", "w7 w5 w3 w4 w6 w9", "w80", "w93"),
]
KINDS = ("llama", "gpt2", "neox")


@pytest.mark.parametrize("kind", KINDS)
def test_all_edges_are_the_model_and_none_the_corrupt_run(tiny, kind: str) -> None:
    model = tiny(kind)
    evaluate = Evaluator(model, PAIRS, interp.logit_diff, "counterfactual")
    whole = evaluate(evaluate.graph.allowed)
    np.testing.assert_allclose(whole, evaluate.whole, atol=1e-9)
    swapped = [interp.PromptPair(p.corrupt, p.clean, p.answer, p.foil) for p in PAIRS]
    corrupt = Evaluator(model, swapped, interp.logit_diff, "counterfactual").whole
    nothing = np.zeros_like(evaluate.graph.allowed)
    np.testing.assert_allclose(evaluate(nothing), corrupt, atol=1e-6)  # norms that round to float32


@pytest.mark.parametrize("kind", KINDS)
def test_one_edge_left_out_is_path_patching(tiny, kind: str) -> None:
    model = tiny(kind)
    evaluate = Evaluator(model, PAIR, interp.logit_diff, "counterfactual")
    graph = evaluate.graph
    receivers = [Site("q", 2, 0), Site("k", 2, 1), Site("v", 1, 0), Site("mlp_out", 2), Site("resid_post", 2)]
    senders = [Site("z", 0, 1), Site("z", 1, 3), Site("mlp_out", 0)]
    paths = interp.path_patch(model, PAIR, senders, receivers).frame()
    assert len(paths) >= 11
    for row in paths.itertuples():
        head = None if str(row.head) == "<NA>" else int(row.head)
        mask = graph.allowed.copy()
        mask[graph.place(Edge(Site.parse(row.sender), Site(row.component, int(row.layer), head)))] = False
        # norms that round to float32
        assert evaluate(mask)[0] == pytest.approx(row.patched, abs=1e-6), row.sender


@pytest.mark.parametrize("using", ["counterfactual", "zero", "mean"])
def test_all_edges_of_a_sender_are_its_ablation(tiny, using: str) -> None:
    model = tiny("llama")
    evaluate = Evaluator(model, PAIRS, interp.logit_diff, using)
    for site in (Site("z", 1, 3), Site("mlp_out", 0)):
        if using == "counterfactual":
            want = interp.patch(model, PAIRS, site, mode="noise").frame()
        else:
            want = interp.ablate(model, PAIRS, site, using=using).frame()
        mask = evaluate.graph.allowed.copy()
        mask[:, evaluate.graph.sender_number[site]] = False
        np.testing.assert_allclose(evaluate(mask), want.sort_values("example")["patched"], atol=1e-6)


def test_resampling_takes_another_prompt_of_the_same_length(tiny) -> None:
    model = tiny("llama")
    evaluate = Evaluator(model, PAIRS, interp.logit_diff, "resample")
    nothing = np.zeros_like(evaluate.graph.allowed)
    other = [PAIRS[i] for i in (1, 0, 3, 2)]  # two of each length: the other one
    swapped = [interp.PromptPair(o.clean, p.clean, p.answer, p.foil) for o, p in zip(other, PAIRS, strict=True)]
    want = Evaluator(model, swapped, interp.logit_diff, "zero").whole
    np.testing.assert_allclose(evaluate(nothing), want, atol=1e-6)


@pytest.mark.parametrize("engine", ["auto", "naive"])
def test_resampling_takes_the_nearest_length_where_there_is_no_other(tiny, engine) -> None:
    """With every edge ablated, the logits are the donor's at its last token: by an untouched Hugging Face model."""
    model, hf = tiny("llama"), tiny_hf("llama").eval()
    pairs = PAIRS[:3]  # the third is the only one of its length, and takes one of the other two
    evaluate = Evaluator(model, pairs, interp.logit_diff, "resample", engine=engine)
    empty = evaluate(np.zeros_like(evaluate.graph.allowed))

    def by_hand(pair: interp.PromptPair, donor: interp.PromptPair) -> float:
        with torch.no_grad():
            logits = hf(torch.tensor([model.coder.encode(donor.clean)])).logits[0, -1]
        answer, foil = (model.tokenizer.convert_tokens_to_ids(t) for t in (pair.answer, pair.foil))
        return float(logits[answer] - logits[foil])

    assert empty[0] == pytest.approx(by_hand(pairs[0], pairs[1]), abs=1e-5)
    assert empty[1] == pytest.approx(by_hand(pairs[1], pairs[0]), abs=1e-5)
    assert min(abs(empty[2] - by_hand(pairs[2], donor)) for donor in pairs[:2]) < 1e-5
    shorter = Evaluator(model, [PAIRS[0], *PAIRS[2:]], interp.logit_diff, "resample", engine=engine)  # a longer donor
    empty = shorter(np.zeros_like(shorter.graph.allowed))
    assert min(abs(empty[0] - by_hand(PAIRS[0], donor)) for donor in PAIRS[2:]) < 1e-5
    with pytest.raises(PromptError, match="there is only one"):
        Evaluator(model, PAIRS[:1], interp.logit_diff, "resample")


def test_equals_transformer_lens_where_it_goes(tiny) -> None:
    from transformer_lens.tools.analysis import attribution_patching as tl

    model = tiny("gpt2")
    circuit = attribute_edges(model, PAIR, method="eap").top(40)
    tokens = [torch.tensor([model.coder.encode(t)]) for t in (PAIR.clean, PAIR.corrupt)]
    answer, foil = (model.coder.continuation(w)[0] for w in (PAIR.answer, PAIR.foil))

    def node(site: Site, position: int, reads: bool) -> tl.Node:
        if site.component in ("q", "k", "v"):
            return tl.Node(f"{site.component}_input", position, site.layer, site.head)  # type: ignore[arg-type]
        kinds = {"resid_pre": "embed", "z": "attn_head_out", "resid_post": "logits"}
        kind = kinds.get(site.component, "mlp_in" if reads else "mlp_out")
        return tl.Node(kind, position, None if kind == "embed" else site.layer, site.head)  # type: ignore[arg-type]

    edges = [
        (node(e.sender, i, False), node(e.receiver, i, True)) for e in circuit.edges for i in range(tokens[0].shape[1])
    ]
    theirs = tl.faithfulness(model.bridge, *tokens, lambda x: x[0, -1, answer] - x[0, -1, foil], edges)
    ours = faithfulness(model, PAIR, circuit)
    assert ours.value == pytest.approx(theirs.recovered, abs=1e-5)
    assert abs(ours.value) > 0.05 and np.isnan(ours.lo) and np.isnan(ours.p)


@pytest.fixture(scope="module")
def induction():
    known = zoo.induction()
    return known.model, known.pairs(6), Circuit.of(known.model, INDUCTION)


INDUCTION = [
    "resid_pre.L0 -> v.L0H1", "resid_pre.L0 -> q.L0H1", "resid_pre.L0 -> k.L0H1",
    "resid_pre.L0 -> q.L1H2", "resid_pre.L0 -> v.L1H2", "z.L0H1 -> k.L1H2", "resid_pre.L0 -> k.L1H2",
    "z.L1H2 -> resid_post.L1",
]  # fmt: skip


def test_a_known_circuit_is_faithful_minimal_and_complete(induction) -> None:
    model, pairs, circuit = induction
    for using in ("counterfactual", "zero"):
        f = faithfulness(model, pairs, circuit, using=using, n_random=19)
        assert f.value == pytest.approx(1, abs=1e-4) and f.lo == pytest.approx(1, abs=1e-4)
        assert f.p == 1 / 20 and f.random.max() < 0.5
        assert f.recipe["using"] == using and f.recipe["n_edges"] == len(circuit) == 8
    least = minimality(model, pairs, circuit)
    heads = least[least["node"].str.startswith("z")]
    assert set(heads["node"]) == {"z.L0H1", "z.L1H2"} and heads["change"].to_numpy() == pytest.approx([1, 1], abs=1e-4)
    every = completeness(model, pairs, circuit, n_random=3)
    assert every["gap"].abs().max() < 1e-4 and every.iloc[-1]["model"] == pytest.approx(0, abs=1e-4)
    # a bystander added to the circuit changes nothing and is found to be of no use
    more = circuit | Circuit.of(model, ["resid_pre.L0 -> v.L0H0", "z.L0H0 -> resid_post.L1"])
    useless = minimality(model, pairs, more).set_index("node").loc["z.L0H0"]
    assert abs(useless["change"]) < 1e-6


def test_attributed_circuits_beat_chance_and_magnitude(induction) -> None:
    model, pairs, _ = induction
    sizes = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    made = {
        "eap-ig": attribute_edges(model, pairs, steps=5),
        "random": random_scores(model),
        "magnitude": magnitude_scores(model, pairs),
    }
    found = {name: curve(model, pairs, scores, sizes=sizes) for name, scores in made.items()}
    assert found["eap-ig"].cmd[0] < 0.1 < found["random"].cmd[0]
    assert found["eap-ig"].cmd[0] < found["magnitude"].cmd[0]
    signed = curve(model, pairs, made["eap-ig"], ranking="signed", sizes=sizes)
    assert signed.cpr[0] > found["random"].cpr[0]
    assert found["eap-ig"].frame()["faithfulness"].iloc[-1] == pytest.approx(1, abs=1e-5)
    greedy = curve(model, pairs, made["eap-ig"], selection="greedy", sizes=(0.1, 1.0))
    assert greedy.frame()["faithfulness"].tolist() == pytest.approx([1, 1], abs=1e-4)


def test_areas_in_closed_form() -> None:
    sizes, one = np.array(MIB_SIZES), np.ones((10, 2))
    flat = Curve(sizes, sizes, one, np.ones(2), np.zeros(2), {})
    assert flat.cpr[0] == pytest.approx(0.999) and flat.cmd[0] == 0
    line = Curve(sizes, sizes, sizes[:, None] * one, np.ones(2), np.zeros(2), {})
    assert line.cpr[0] == pytest.approx((1 - 1e-6) / 2, abs=1e-12) and line.cmd[0] == pytest.approx(0.4990005)


def test_random_models_have_no_better_than_random_circuits() -> None:
    """Answer and foil are drawn apart from the prompts: what is found on some pairs holds for those, not for others."""
    seen, unseen = [], []
    for seed in range(3):
        known = zoo.random(seed)
        pairs = known.pairs(20)
        best = attribute_edges(known.model, pairs[:4], method="eap").helpful().top(400, absolute=False)
        chance = random_scores(known.model, seed).top(len(best), prune=False)
        evaluate = Evaluator(known.model, pairs, interp.logit_diff, "counterfactual")
        gain = evaluate(best.mask()) - evaluate(chance.mask())
        seen.append(gain[:4])
        unseen.append(gain[4:])
    t = [np.mean(x) / (np.std(x) / np.sqrt(np.size(x))) for x in (seen, unseen)]
    assert t[0] > 3 and abs(t[1]) < 2


def test_bad_input_is_explained(tiny, induction) -> None:
    circuit = induction[2]
    llama = tiny("llama")
    with pytest.raises(ModelError, match="the circuit is of a model with 2 layers"):
        faithfulness(llama, PAIR, circuit)
    mine = Circuit.whole(llama)
    with pytest.raises(InterpError, match="unknown ablation 'x'"):
        faithfulness(llama, PAIR, mine, using="x")
    same = interp.PromptPair(PAIR.clean, PAIR.clean, PAIR.answer, PAIR.foil)
    with pytest.raises(InterpError, match="no difference that a circuit could explain"):
        faithfulness(llama, same, mine)
    scores = random_scores(llama)
    for bad in ({"sizes": (0.5,)}, {"sizes": (0.5, 0.2)}, {"sizes": (0.5, 1.2)}, {"ranking": "x"}, {"selection": "x"}):
        with pytest.raises(InterpError):
            curve(llama, PAIR, scores, **bad)
    graph = architecture(llama)
    with pytest.raises(InterpError, match="not finite"):
        EdgeScores(graph, np.full(graph.allowed.shape, np.nan), {})
