"""Head h of q, k, v, z and result is the model's head h: hooks on untouched Hugging Face models, and the check at load.

`interp.doctor.matrix.heads` makes the comparison for every family; here are the two whose heads were wrong, through a
recipe, and what loading says of heads that it cannot trust.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from architectures import EVERY

import interp
from interp.doctor.examination import examine
from interp.doctor.families.text import tiny_hf
from interp.doctor.matrix import WORDS, FamilyCase, run_check
from interp.errors import SiteError
from interp.model import head_layout, loading
from interp.model.hooks import hooks
from interp.zoo.tokenizer import word_tokenizer

PAIR = interp.PromptPair(clean="w1 w2 w3 w4 w5", corrupt="w1 w7 w8 w4 w9", answer="w11", foil="w12")


def load(family: str) -> interp.Model:
    return interp.load(tiny_hf(family, torch.float32), tokenizer=word_tokenizer(WORDS))


@torch.no_grad()
def logit_difference_without(hf: Any, model: interp.Model, module: Any, side: str, part: slice) -> float:
    """Logit difference of the clean prompt on an untouched model, with part of a projection set to 0."""
    coder = model.coder
    answer, foil = (coder.encode(str(word))[-1] for word in (PAIR.answer, PAIR.foil))

    def zeroed(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., part] = 0
        return x

    if side == "in":
        handle = module.register_forward_pre_hook(lambda _m, args: (zeroed(args[0]),))
    else:
        handle = module.register_forward_hook(lambda _m, _args, out: zeroed(out))
    logits = hf(torch.tensor([coder.encode(PAIR.clean)])).logits[0, -1]
    handle.remove()
    return float(logits[answer] - logits[foil])


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("engine", ["auto", "naive"])
def test_zeroing_heads_of_latent_attention_is_zeroing_slices_of_the_output_projection(family: str, engine: Any) -> None:
    model, hf = load(family), tiny_hf(family, torch.float32)
    effects = interp.ablate(model, [PAIR], model.sites("z", layers=1), using="zero", engine=engine)
    o = hf.model.layers[1].self_attn.o_proj
    width = o.in_features // model.n_heads  # v_head_dim is 6; head_dim, by which TransformerLens splits, is 4
    parts = [slice(h * width, (h + 1) * width) for h in range(model.n_heads)]
    expected = [logit_difference_without(hf, model, o, "in", part) for part in parts]
    assert effects.frame()["patched"].to_numpy() == pytest.approx(expected, abs=1e-4)


def test_the_queries_of_gated_attention_are_queries_and_not_gates() -> None:
    model, hf = load("qwen3_next"), tiny_hf("qwen3_next", torch.float32)
    effects = interp.ablate(model, [PAIR], model.sites("q"), using="zero")
    q, layer = hf.model.layers[1].self_attn.q_proj, 1
    width = q.out_features // model.n_heads // 2  # each head's query, then its gate
    parts = [slice(2 * h * width, (2 * h + 1) * width) for h in range(model.n_heads)]
    expected = [logit_difference_without(hf, model, q, "out", part) for part in parts]
    assert list(effects.frame()["layer"].unique()) == [layer]
    assert effects.frame()["patched"].to_numpy() == pytest.approx(expected, abs=1e-4)


# ------------------------------------------------------------------ what loading refuses


def test_heads_that_cannot_be_trusted_are_refused_by_name_and_nothing_else_is(monkeypatch) -> None:
    monkeypatch.setattr(loading, "correct_heads", lambda bridge: None)
    model = load("deepseek_v3")
    assert set(model.head_axes.faults) == {("", "z"), ("", "result")}
    for attempt in (
        lambda: interp.patch(model, PAIR, "z.L0H1"),
        lambda: hooks(model, ("blocks.0.attn.hook_z", lambda x, hook: x)).__enter__(),
    ):
        with pytest.raises(SiteError, match=r"'z' of .* is refused.*hook_z has the shape \(2, 8, 6, 4\).*4 heads"):
            attempt()
    assert len(interp.patch(model, PAIR, ["v.L0H1", "q.L0H0"]).frame()) == 2
    model.attention_stats(PAIR.clean)
    report = examine(model)
    assert not report.passed and "hook_z has the shape" in str(report)


class Reversed(head_layout.SplitHeads):
    """A layout with the right shape and the wrong order."""

    def convert(self, x: torch.Tensor, *context: Any) -> torch.Tensor:
        return super().convert(x).flip(2)

    def revert(self, x: torch.Tensor, *context: Any) -> torch.Tensor:
        return super().revert(x.flip(2))


@pytest.mark.parametrize("component", ["q", "k", "v", "z"])
def test_heads_in_another_order_are_noticed_at_load_and_by_the_matrix(component: str, monkeypatch) -> None:
    def reverse(bridge: Any) -> None:
        for block in bridge.blocks:
            point = block.attn.o.hook_in if component == "z" else getattr(block.attn, component).hook_out
            point.hook_conversion = Reversed(4 if component in "qz" else 2)

    monkeypatch.setattr(loading, "correct_heads", reverse)
    assert ("", component) in load("llama").head_axes.faults
    case = FamilyCase("llama")
    case.ours.head_axes.faults.clear()  # so that hooks are not refused
    verdict = run_check(case, "heads")
    assert not verdict.passed and f"hook_{component}" in verdict.note


@pytest.mark.parametrize("family", ["llama", "neox", "gemma2", "qwen3", "bloom", "falcon_grouped", "phi3", "t5"])
def test_sound_heads_are_not_refused(family: str) -> None:
    axes = load(family).head_axes
    assert not axes.faults and not axes.joint


# ------------------------------------------------------------------ norms over all heads


@pytest.mark.parametrize("family", ["olmo2", "olmo3", "olmoe"])
def test_a_norm_over_all_heads_is_found_and_told(family: str) -> None:
    model, hf = load(family), tiny_hf(family, torch.float32)
    assert model.head_axes.joint == {"q", "k"}
    patched = interp.ablate(model, [PAIR], "q.L0H1", using="zero")
    assert patched.provenance["joint_heads"].startswith("q: a norm over all heads")
    assert "joint_heads" not in interp.ablate(model, [PAIR], "v.L0H1", using="zero").provenance
    estimated = interp.circuits.attribute_sites(model, [PAIR], model.sites("k", layers=0))
    assert estimated.provenance["joint_heads"].startswith("k: ")
    # by hand: without head 1, the norm's scale is another one for head 0 too
    attn = hf.model.layers[0].self_attn
    x = torch.randn(1, 3, attn.q_proj.out_features, generator=torch.Generator().manual_seed(0))
    without = x.clone()
    without[..., 8:16] = 0
    assert not torch.allclose(attn.q_norm(without)[..., :8], attn.q_norm(x)[..., :8])


def test_a_norm_between_attention_and_its_output_projection_joins_what_comes_before_it() -> None:
    """BitNet's z is behind the norm, and is head by head what the projection reads; q, k and v are before it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.BitNetConfig(vocab_size=100, intermediate_size=48, pad_token_id=1, **sizes)
    hf = transformers.BitNetForCausalLM(config).eval()
    model = interp.load(hf, tokenizer=word_tokenizer(WORDS))
    assert not model.head_axes.faults and model.head_axes.joint == {"q", "k", "v"}


@pytest.mark.parametrize("family", EVERY)
def test_the_check_says_the_same_in_bfloat16(family: str) -> None:
    """The coded changes are large beside bfloat16's rounding, so that no family is refused or passed by it."""
    exact = load(family)
    rounded = interp.load(tiny_hf(family, torch.float32).to(torch.bfloat16), tokenizer=word_tokenizer(WORDS))
    assert rounded.dtype == torch.bfloat16
    assert sorted(rounded.head_axes.faults) == sorted(exact.head_axes.faults)
    assert rounded.head_axes.joint == exact.head_axes.joint
