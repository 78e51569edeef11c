"""Edge attribution against split inputs, finite differences of exact effects, TransformerLens, known circuits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from slow_circuits import activations, edge_scores, logit_diff, outputs

import interp
from interp import zoo
from interp.circuits import atp_star, attribute_edges
from interp.circuits.topology import architecture
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, ModelError
from interp.sites import Edge, Site
from interp.zoo.tokenizer import word_tokenizer as word_tokenizer_of

KINDS = ("llama", "gpt2", "neox", "qwen3")  # grouped queries; plain; parallel MLPs; norms of q and k
PAIR = interp.PromptPair("w1 w2 w3 w4 w5", "w1 w9 w3 w7 w5", "w95", "w96")


# Sums in another order, of what norms have rounded to float32 (transformers' do): a few times its 6e-8.
ROUNDING = 1e-6


def gap(scores, want: dict[Edge, float]) -> float:
    """The largest difference of any edge, as a share of the largest score."""
    assert len(scores) == len(want)
    return max(abs(scores[e] - x) for e, x in want.items()) / max(map(abs, want.values()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["noise", "denoise"])
def test_eap_equals_split_inputs(tiny, kind: str, mode: str) -> None:
    text = PAIR.clean if mode == "noise" else PAIR.corrupt
    scores = attribute_edges(tiny(kind), PAIR, method="eap", mode=mode)
    assert gap(scores, edge_scores(tiny(kind), PAIR, [text], mode=mode)) < ROUNDING
    assert scores.provenance["steps"] is None and scores.provenance["weights"] == tiny(kind).fingerprint()


def between(a: dict, b: dict, name: str, share: float) -> tuple[str, torch.Tensor]:
    return name, (1 - share) * a[name] + share * b[name]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_integrated_gradients_equal_a_sum_over_explicit_runs(tiny, kind: str) -> None:
    model = tiny(kind)
    clean, corrupt = (activations(model, t) for t in (PAIR.clean, PAIR.corrupt))
    inputs = [between(corrupt, clean, "blocks.0.hook_resid_pre", k / 3) for k in range(3)]
    want = edge_scores(model, PAIR, [PAIR.clean] * 3, inputs)
    assert gap(attribute_edges(model, PAIR, method="eap-ig-inputs", steps=3), want) < ROUNDING
    both = edge_scores(model, PAIR, [PAIR.clean, PAIR.corrupt], [None, None])
    assert gap(attribute_edges(model, PAIR, method="clean-corrupted"), both) < ROUNDING
    each = [between(corrupt, clean, name, k / 2) for name in clean for k in (1, 2)]
    want = edge_scores(model, PAIR, [PAIR.clean] * len(each), each)
    assert gap(attribute_edges(model, PAIR, method="eap-ig-activations", steps=2), want) < ROUNDING


@pytest.mark.parametrize("kind", ["llama", "neox"])
def test_gradients_are_the_limit_of_exact_effects(tiny, kind: str) -> None:
    """A shrinking share of the corrupt sender, sent along one edge, changes the metric by that share of the score."""
    model = tiny(kind)
    scores = attribute_edges(model, PAIR, method="eap")
    sent = [outputs(model, t) for t in (PAIR.clean, PAIR.corrupt)]
    with torch.no_grad():
        for edge in list(scores.graph.edges())[::17]:
            change = sent[1][edge.sender] - sent[0][edge.sender]
            ends = [logit_diff(model, PAIR, PAIR.clean, {edge.receiver: e * change}) for e in (-1e-3, 1e-3)]
            # transformers' norms round to float32, hence the coarse step and tolerance
            assert float(ends[1] - ends[0]) / 2e-3 == pytest.approx(scores[edge], abs=2e-3), str(edge)


def test_batches_and_lengths_change_nothing(tiny) -> None:
    model = tiny("llama")
    longer = interp.PromptPair("w1 w2 w3 w4 w5 w6 w7", "w1 w9 w3 w7 w5 w6 w7", "w95", "w96")
    pairs = [PAIR, longer, interp.PromptPair("w8 w2 w3 w4 w6", "w8 w2 w1 w4 w6", "w90", "w91")]
    alone = np.mean([attribute_edges(model, p, steps=2).matrix for p in pairs], axis=0)
    np.testing.assert_allclose(
        attribute_edges(model, pairs, steps=2).matrix, alone, atol=1e-9
    )  # float64, another order


def test_equals_transformer_lens_where_it_goes(tiny) -> None:
    """TransformerLens scores edges by position; ours are its sums over positions. Grouped queries it refuses."""
    from transformer_lens.tools.analysis import attribution_patching as tl

    model = tiny("gpt2")
    tokens = [torch.tensor([model.coder.encode(t)]) for t in (PAIR.clean, PAIR.corrupt)]
    answer, foil = (model.coder.continuation(w)[0] for w in (PAIR.answer, PAIR.foil))

    def metric(logits):
        return logits[0, -1, answer] - logits[0, -1, foil]

    config = tl.EdgeAttributionConfig(granularity="edge")
    theirs = tl.attribution_patch(model.bridge, *tokens, metric, config).edge_scores
    want = dict.fromkeys(architecture(model).edges(), 0.0)
    names = {"embed": "resid_pre", "attn_head_out": "z", "mlp_in": "mlp_out", "logits": "resid_post"}

    def site(node) -> Site:
        component = names.get(node.kind, node.kind.removesuffix("_input"))
        return Site(component, 0 if node.kind == "embed" else node.layer, node.head)

    for (sender, receiver), score in theirs.items():
        want[Edge(site(sender), site(receiver))] += score
    assert gap(attribute_edges(model, PAIR, method="eap", mode="denoise"), want) < ROUNDING
    with pytest.raises(ValueError, match="GQA"):
        tl.attribution_patch(tiny("llama").bridge, *tokens, metric, config)


def auroc(scores, truth: set[Edge]) -> float:
    """P(a true edge outranks another), ties counting half."""
    rank = {e: abs(scores[e]) for e in scores.graph.edges()}
    true = np.array([x for e, x in rank.items() if e in truth])
    other = np.array([x for e, x in rank.items() if e not in truth])
    return float((true[:, None] > other).mean() + (true[:, None] == other).mean() / 2)


TRUTH = {
    # The pairs change one embedding; position and everything else are the same in both.
    "induction": ["resid_pre.L0 -> v.L0H1", "z.L0H1 -> k.L1H2", "z.L1H2 -> resid_post.L1"],
    "one_head": ["resid_pre.L0 -> v.L1H2", "z.L1H2 -> resid_post.L2"],
}


@pytest.mark.parametrize("name", TRUTH)
def test_integrated_gradients_find_known_circuits(name: str) -> None:
    known = getattr(zoo, name)()
    scores = attribute_edges(known.model, known.pairs(4), steps=5)
    assert auroc(scores, {Edge.parse(e) for e in TRUTH[name]}) >= 0.95


def test_half_precision_is_no_other_wiring(tiny, word_tokenizer) -> None:
    half = interp.load(tiny_hf("llama", torch.bfloat16), tokenizer=word_tokenizer)
    rough, exact = (attribute_edges(m, PAIR).matrix for m in (half, tiny("llama")))
    known = ~np.isnan(exact)
    assert np.corrcoef(rough[known], exact[known])[0, 1] > 0.98
    with pytest.raises(ModelError, match="residual"):  # a norm behind attention is told apart all the same
        attribute_edges(interp.load(tiny_hf("gemma2", torch.bfloat16), tokenizer=word_tokenizer), PAIR)


def test_a_metric_that_is_no_number_is_refused(tiny) -> None:
    for method in (attribute_edges, atp_star):
        with pytest.raises(InterpError, match="NaN or infinity"):
            method(tiny("llama"), PAIR, metric=lambda logits, read: logits[:, 0] * float("nan"))


def test_a_tokenizer_of_another_model_is_told() -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer_of([f"w{i}" for i in range(120)]))
    with pytest.raises(interp.errors.PromptError, match="beyond the 100 tokens"):
        attribute_edges(model, interp.PromptPair("w1 w110", "w2 w110", "w3", "w4"))
    with pytest.raises(ModelError, match="the tokenizer belongs to another model"):
        attribute_edges(model, interp.PromptPair("w1 w2", "w2 w2", "w110", "w4"))


def test_what_has_no_edges_is_refused(tiny) -> None:
    because = {"gemma2": "attn_out = Σ W_O z", "olmo2": "no norm in front", "deepseek_v3": "no plain q projection"}
    for kind, why in because.items():
        with pytest.raises(ModelError, match=why):
            attribute_edges(tiny(kind), PAIR)
    for bad in ({"method": "x"}, {"mode": "x"}, {"steps": 0}, {"steps": True}):
        with pytest.raises(InterpError):
            attribute_edges(tiny("llama"), PAIR, **bad)
    with pytest.raises(InterpError, match="has no gradient"):
        attribute_edges(tiny("llama"), PAIR, metric=interp.metrics.rank)
    assert all(p.requires_grad for p in tiny("llama").bridge.parameters())


def test_a_metric_without_slope_at_the_base_run_is_refused(tiny) -> None:
    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w7 w3 w4", "w95", "w96")
    for refused in (
        lambda: attribute_edges(model, pair, "kl", "eap", "noise"),
        lambda: attribute_edges(model, pair, "kl", "eap-ig-activations", steps=1),
        lambda: atp_star(model, pair, metric="kl"),
        lambda: interp.circuits.attribute_sites(model, pair, metric="kl", mode="noise"),
    ):
        with pytest.raises(InterpError, match="'kl' has no slope at the clean run"):
            refused()
    for method, mode in (("eap", "denoise"), ("eap-ig-inputs", "noise"), ("clean-corrupted", "noise")):
        assert np.nanmax(np.abs(attribute_edges(model, pair, "kl", method, mode).matrix)) > 1e-6


def test_the_effect_of_an_edge_has_the_sign_of_tables(tiny) -> None:
    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3 w4", "w1 w7 w3 w4", "w95", "w96")
    noise, denoise = (attribute_edges(model, pair, method="eap", mode=m) for m in ("noise", "denoise"))
    assert (noise.frame()["effect"] == -noise.frame()["score"]).all() and "noise" in repr(noise)
    assert (denoise.frame()["effect"] == denoise.frame()["score"]).all()
