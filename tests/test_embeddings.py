"""Prompts of vectors: `Embeddings` of a prompt's own tokens give the prompt's numbers, on every decoder family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from architectures import of_kind

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, PromptError

CLEAN, CORRUPT = [0, 4, 5, 6, 9, 12], [0, 4, 7, 6, 9, 12]
SPANS = {"changed": (2, 3), "end": (4, 6)}
PAIR = interp.PromptPair(CLEAN, CORRUPT, 8, 9, SPANS)  # type: ignore[arg-type]
FAMILIES = of_kind("decoder")


def vectors_of(hf: Any, ids: list[int]) -> torch.Tensor:
    return hf.get_input_embeddings()(torch.tensor(ids)).detach()


def embedded(hf: Any) -> interp.PromptPair:
    """PAIR as vectors."""
    clean, corrupt = (interp.Embeddings(vectors_of(hf, ids), SPANS) for ids in (CLEAN, CORRUPT))
    return interp.PromptPair(clean, corrupt, 8, 9)  # type: ignore[arg-type]


def numbers(result: Any) -> pd.DataFrame:
    return result.frame().drop(columns=["prompt", "token"], errors="ignore")


@pytest.fixture(scope="module")
def llama() -> interp.Model:
    return interp.load(tiny_hf("llama"), tokenizer=False)


@pytest.fixture(scope="module")
def pair(llama) -> interp.PromptPair:
    return embedded(llama.bridge.original_model)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_an_untouched_model(family) -> None:
    torch.manual_seed(0)
    hf = tiny_hf(family)
    vectors = vectors_of(hf, CLEAN) + 0.1 * torch.randn(6, hf.get_input_embeddings().weight.shape[1]).to(hf.dtype)
    want = hf(inputs_embeds=vectors[None]).logits
    model = interp.load(tiny_hf(family), tokenizer=False)
    prompt = interp.Embeddings(vectors, SPANS)
    assert torch.allclose(model(prompt), want, atol=1e-5 * want.abs().max().item())
    pair = interp.PromptPair(prompt, embedded(hf).corrupt, 8, 9)
    effects = interp.patch(model, pair, ["resid_pre.L1@changed"])
    assert effects.frame()["clean"].item() == pytest.approx((want[0, -1, 8] - want[0, -1, 9]).item(), abs=1e-4)


@pytest.mark.parametrize("engine", ["auto", "naive"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_recipes_give_the_numbers_of_the_tokens(family, engine) -> None:
    hf = tiny_hf(family)
    vectors, model = embedded(hf), interp.load(hf, tokenizer=False)
    half = interp.AttentionEdit(keys="changed", gain=0.5)
    recipes: list[Callable[[Any], Any]] = [
        lambda p: interp.patch(model, p, model.sites("z") | model.sites("resid_pre", positions="each"), engine=engine),
        lambda p: interp.patch(model, p, ["embed@changed"], engine=engine),
        lambda p: interp.ablate(
            model, p, model.sites("z"), using="zero", metric=interp.token_kl, at="each", engine=engine
        ),
        lambda p: interp.mediate(model, p, model.sites("mlp_out", positions="changed"), engine=engine),
        lambda p: interp.knock_out(model, p, keys="changed", queries="end:last", engine=engine),
        lambda p: interp.edit(model, p, {"half": half}, engine=engine),
        lambda p: interp.path_patch(model, p, model.sites("z"), engine=engine),
    ]
    for recipe in recipes:
        pd.testing.assert_frame_equal(numbers(recipe(vectors)), numbers(recipe(PAIR)), rtol=1e-7, atol=1e-7)


def test_statistics_patterns_edits_and_circuits_give_the_numbers_of_the_tokens(llama, pair) -> None:
    ids = interp.Prompt(CLEAN, SPANS)  # type: ignore[arg-type]
    edit = interp.AttentionEdit(keys="changed", gain=0)
    pd.testing.assert_frame_equal(numbers(llama.attention_stats(pair.clean)), numbers(llama.attention_stats(ids)))
    with llama.edited(edit):
        edited = llama.attention_stats([pair.clean, pair.corrupt])
        logits = llama(pair.clean)
    with llama.edited(edit):
        want = llama.attention_stats([ids, interp.Prompt(CORRUPT, SPANS)])  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(numbers(edited), numbers(want))
    assert (logits - llama(pair.clean)).abs().max() > 1e-3  # the edit acted
    for method in ("eap", "eap-ig-inputs", "eap-ig-activations"):
        scores = [interp.circuits.attribute_edges(llama, [p], method=method) for p in (pair, PAIR)]
        pd.testing.assert_frame_equal(numbers(scores[0]), numbers(scores[1]), rtol=1e-6)
    patterns = [llama.attention_patterns(p) for p in (pair.clean, ids)]
    assert (patterns[0].map("L1H0") == patterns[1].map("L1H0")).all()
    assert patterns[0].examples[0].segments == patterns[1].examples[0].segments


def test_prompts_of_other_vectors_are_other_prompts(llama, pair) -> None:
    effects = interp.patch(llama, [pair, interp.PromptPair(pair.corrupt, pair.clean, 8, 9)], ["resid_pre.L0@changed"])
    clean = effects.frame()["clean"]
    assert clean[0] != clean[1]
    hashes = {interp.ablate(llama, p, ["z.L0H0"], using="zero").provenance["prompts"] for p in (
        pair, interp.PromptPair(pair.corrupt, pair.clean, 8, 9), interp.PromptPair(pair.clean, pair.clean, 8, 9)
    )}  # fmt: skip
    assert len(hashes) == 3
    assert hash(pair.clean) != hash(pair.corrupt) and pair.clean != pair.corrupt
    assert pair.clean == interp.Embeddings(pair.clean.vectors, SPANS)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda m, p: m.confidence(p.clean), "no token ids: confidence"),
        (lambda m, p: interp.tasks.rank(m, [p.clean, p.corrupt]), "no token ids: rank"),
        (lambda m, p: interp.patch(m, p, m.sites("z"), metric=interp.seq_logprob, at="end"), "seq_logprob"),
        (lambda m, p: interp.ablate(m, [p, p], m.sites("z"), using="cama"), "cama"),
        (lambda m, p: interp.leave_out(m, p), "left-out span"),
        (lambda m, p: interp.trace(m, p.clean), "vectors|Facts"),
        (lambda m, p: m.run_with_cache(p.clean), "vectors"),
        (lambda m, p: m(interp.Embeddings(torch.zeros(3, 7))), "vectors of 32 numbers.*these have 7"),
        (lambda m, p: m(interp.Embeddings(torch.zeros(m.n_ctx + 1, 32))), "longer than"),
        (lambda m, p: interp.Embeddings(torch.zeros(2, 3, 4)), r"\[position, d_model\].*\(2, 3, 4\)"),
        (lambda m, p: interp.Embeddings(torch.zeros(0, 4)), "of one prompt"),
        (lambda m, p: interp.Embeddings([[1.0]]), "a tensor of floats"),
        (lambda m, p: interp.Embeddings(torch.tensor([[1, 2]])), "int64"),
        (lambda m, p: interp.Embeddings(torch.tensor([[float("nan")]])), "NaN"),
        (lambda m, p: interp.Embeddings(torch.zeros(2, 4), texts=["a"]), "2 positions, got 1"),
        (lambda m, p: m.attention_stats(interp.Embeddings(torch.zeros(2, 32), {"s": (0, 3)})), "a range"),
    ],
)
def test_what_vectors_cannot_say_is_refused_with_one_message(llama, pair, use, message) -> None:
    with pytest.raises(InterpError, match=message):
        use(llama, pair)


def test_encoders_have_statistics_and_no_answer() -> None:
    hf = tiny_hf("bert")
    prompt, model = interp.Embeddings(vectors_of(hf, CLEAN)), interp.load(hf, tokenizer=False)
    ids = interp.Prompt(CLEAN)  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(numbers(model.attention_stats(prompt)), numbers(model.attention_stats(ids)))
    with pytest.raises(PromptError, match="read at its mask token"):
        interp.ablate(model, interp.PromptPair(prompt, prompt, 8, 9), model.sites("z"), using="zero")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_models_of_two_stacks_read_no_vectors(family) -> None:
    model = interp.load(tiny_hf(family), tokenizer=False)
    with pytest.raises(PromptError):
        model.attention_stats(interp.Embeddings(torch.zeros(4, 32)))
