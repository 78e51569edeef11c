"""Components that exist in some layers only, or that a block scales or norms: against hooks on untouched models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import interp
from interp.doctor.examination import examine
from interp.doctor.families.text import tiny_hf
from interp.doctor.matrix import WORDS
from interp.errors import SiteError
from interp.zoo.tokenizer import word_tokenizer

PAIR = interp.PromptPair(clean="w1 w2 w3 w4", corrupt="w1 w9 w3 w5", answer="w11", foil="w12")
FACTS = [interp.Fact("w1 w2 w3 w4", "w2 w3", "w15")]
HYBRIDS = ("jamba", "bamba", "qwen3_next", "lfm2")  # attention in layer 1 of 3


def load(hf: Any) -> interp.Model:
    return interp.load(hf, tokenizer=word_tokenizer(WORDS))


def score(model: interp.Model, logits: torch.Tensor) -> float:
    answer, foil = (model.coder.encode(str(word))[-1] for word in (PAIR.answer, PAIR.foil))
    return float(logits[answer] - logits[foil])


@torch.no_grad()
def without(hf: Any, model: interp.Model, module: Any) -> float:
    """Score of the clean prompt on an untouched model, with the output of a module set to 0."""

    def zero(_module: Any, _args: Any, out: Any) -> Any:
        return (torch.zeros_like(out[0]), *out[1:]) if isinstance(out, tuple) else torch.zeros_like(out)

    handle = module.register_forward_hook(zero)
    logits = hf(torch.tensor([model.coder.encode(PAIR.clean)])).logits[0, -1]
    handle.remove()
    return score(model, logits)


@pytest.mark.parametrize("family", HYBRIDS)
def test_recipes_take_the_layers_that_have_a_component(family: str) -> None:
    model, hf = load(tiny_hf(family, torch.float32)), tiny_hf(family, torch.float32)
    assert {s.layer for s in model.sites("attn_out")} == {1} and model.layers_with("mlp_out") == [0, 1, 2]
    zeroed = interp.ablate(model, PAIR, model.sites("attn_out", positions="all"), using="zero").frame()
    assert zeroed["patched"].tolist() == pytest.approx([without(hf, model, hf.model.layers[1].self_attn)], abs=1e-4)
    windows = interp.ablate(model, PAIR, model.sites("attn_out", positions="all"), using="zero", window=3).frame()
    assert windows["patched"].tolist() == zeroed["patched"].tolist()  # the layers around it have no attention
    for options in ({"component": "attn_out"}, {"sever": "attn"}, {"sever": "mlp"}):
        assert interp.trace(model, FACTS, samples=1, **options).frame()["patched"].notna().all()
    assert interp.mean_difference(model, ["w1 w2"], ["w3 w4"], "attn_out.L1@-1").shape == (model.d_model,)
    with pytest.raises(SiteError, match=r"has no 'attn_out' .*of its layers, 1 have it"):
        interp.patch(model, PAIR, "attn_out.L0")


@pytest.mark.parametrize("family", ["jamba", "falcon_h1"])
def test_the_doctor_finds_hybrids_sound(family: str) -> None:
    report = examine(tiny_hf(family, torch.float32), tokenizer=word_tokenizer(WORDS))
    assert report.passed, str(report)
    assert ("the others have none" in str(report)) == (family == "jamba")


def test_attention_output_of_falcon_h1_is_what_the_block_adds() -> None:
    """The block multiplies it by attention_out_multiplier, 0.5 here: a value that is written counts as added."""
    model, hf = load(tiny_hf("falcon_h1", torch.float32)), tiny_hf("falcon_h1", torch.float32)
    seen: dict[str, torch.Tensor] = {}
    tokens = torch.tensor([model.coder.encode(PAIR.clean)])
    with torch.no_grad():
        hf.model.layers[1].self_attn.register_forward_hook(lambda _m, _a, out: seen.update(attn=out[0]))
        hf(tokens)
    (run,) = interp.engine.Engine(model).record([tuple(tokens[0].tolist())], ["attn_out", "result"])
    torch.testing.assert_close(run.acts["attn_out"][1], 0.5 * seen["attn"][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(run.acts["result"][1].sum(1), 0.5 * seen["attn"][0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_attention_output_behind_which_a_norm_stands_is_the_projections(family: str) -> None:
    model, hf = load(tiny_hf(family, torch.float32)), tiny_hf(family, torch.float32)
    tokens = torch.tensor([model.coder.encode("w1 w2 w3 <unk>")])
    seen: dict[str, torch.Tensor] = {}
    layer = (hf.bert if family == "bert" else hf.roberta).encoder.layer[1]
    layer.attention.output.dense.register_forward_hook(lambda _m, _a, out: seen.update(attn_out=out))
    layer.output.dense.register_forward_hook(lambda _m, _a, out: seen.update(mlp_out=out))
    with torch.no_grad():
        hf(tokens)
        _, cache = model.run_with_cache(tokens)
    for name, value in seen.items():
        torch.testing.assert_close(cache[f"blocks.1.hook_{name}"], value, atol=1e-5, rtol=1e-5)
    with pytest.raises(SiteError, match=r"'resid_mid' of .* is refused: .*norm stands behind"):
        interp.engine.Engine(model).check_sites(model.sites("resid_mid"))


def test_blooms_attention_output_and_results_together() -> None:
    """Both in one call, and either alone, have the same effects."""
    model, hf = load(tiny_hf("bloom", torch.float32)), tiny_hf("bloom", torch.float32)
    outputs, results = model.sites("attn_out", positions="all"), model.sites("result")
    both = interp.ablate(model, PAIR, outputs | results, using="zero").frame().set_index("component")["patched"]
    for name, sites in (("attn_out", outputs), ("result", results)):
        alone = interp.ablate(model, PAIR, sites, using="zero").frame()["patched"]
        assert both[name].tolist() == pytest.approx(alone.tolist(), abs=1e-4)
    by_hand = [without(hf, model, block.self_attention.dense) for block in hf.transformer.h]
    assert both["attn_out"].tolist() == pytest.approx(by_hand, abs=1e-4)
    assert len(interp.patch(model, PAIR, outputs | results)) == len(outputs) + len(results)


@pytest.mark.parametrize(("width", "norm_first"), [(16, False), (32, False), (16, True)])
def test_every_kind_of_opt_loads(width: int, norm_first: bool) -> None:
    """350m has norms behind its sums, and embeddings narrower than the residual stream."""
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
    config = transformers.OPTConfig(
        vocab_size=100, pad_token_id=1, word_embed_proj_dim=width, do_layer_norm_before=norm_first, **sizes
    )
    torch.manual_seed(0)
    hf = transformers.OPTForCausalLM(config).eval()
    tokens = torch.randint(4, 100, (1, 6))
    with torch.no_grad():
        expected = hf(tokens).logits
        model = load(hf)
        torch.testing.assert_close(model(tokens), expected, atol=1e-5, rtol=1e-5)
    effects = interp.trace(model, FACTS, samples=2)  # noise has the width of the embedding
    assert effects.frame()["patched"].notna().all()
    if not norm_first:
        with pytest.raises(SiteError, match=r"'resid_mid' of .* is refused"):
            interp.patch(model, PAIR, "resid_mid.L0@-1")
