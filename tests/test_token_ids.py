"""Models without a tokenizer: every call that needs no text gives the numbers of the model with one."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import ModelError, PromptError

CLEAN, CORRUPT = [0, 4, 5, 6, 9, 12], [0, 4, 7, 6, 9, 12]
PAIR = interp.PromptPair(CLEAN, CORRUPT, 8, 9, {"changed": (2, 3), "end": (4, 6)})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def bare() -> interp.Model:
    return interp.load(tiny_hf("llama"), tokenizer=False)


def numbers(effects: interp.Effects) -> pd.DataFrame:
    return effects.frame().drop(columns=["prompt", "token"], errors="ignore")


def test_a_model_object_without_tokenizer_is_loaded_and_said(caplog) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=None)
    assert model.tokenizer is None and "loaded without a tokenizer" in caplog.text
    caplog.clear()
    assert interp.load(tiny_hf("gpt2"), tokenizer=False).tokenizer is None and not caplog.records
    logits = model(torch.tensor([CLEAN]))
    assert torch.allclose(logits, tiny_hf("llama")(torch.tensor([CLEAN])).logits, atol=1e-5)


def test_recipes_give_the_numbers_of_the_model_with_a_tokenizer(bare, tiny) -> None:
    model = tiny("llama")
    recipes = (
        lambda m: interp.patch(m, PAIR, m.sites("z") | m.sites("resid_pre", positions=["changed", "end:last", "each"])),
        lambda m: interp.ablate(m, PAIR, m.sites("z"), using="zero"),
        lambda m: interp.mediate(m, PAIR, m.sites("mlp_out", positions="changed")),
        lambda m: interp.knock_out(m, PAIR, keys="changed", queries="end:last"),
        lambda m: interp.edit(m, PAIR, {"half": interp.AttentionEdit(keys="changed", gain=0.5)}),
        lambda m: interp.path_patch(m, PAIR, m.sites("z")),
        lambda m: interp.leave_out(m, PAIR),
        lambda m: interp.steer(
            m, PAIR, m.sites("resid_pre", positions="all"),
            interp.mean_difference(m, [CLEAN], [CORRUPT], "resid_pre.L1@-1"),
        ),
    )  # fmt: skip
    for recipe in recipes:
        pd.testing.assert_frame_equal(numbers(recipe(bare)), numbers(recipe(model)), rtol=1e-9)
    stats, want = bare.attention_stats(PAIR).frame(), model.attention_stats(PAIR).frame()
    pd.testing.assert_frame_equal(stats.drop(columns="token"), want.drop(columns="token"))
    assert stats["token"][:6].tolist() == list(map(str, CLEAN))


def test_circuits_and_the_page_need_no_tokenizer(bare, tmp_path) -> None:
    scores = interp.circuits.attribute_edges(bare, [PAIR])
    effects, patterns = interp.patch(bare, PAIR, bare.sites("z")), bare.attention_patterns(interp.Prompt(CLEAN))  # type: ignore[arg-type]
    page = tmp_path / "page.html"
    interp.report(effects, bare.attention_stats(PAIR), patterns).write(page)
    assert len(scores.frame()) > 0 and page.stat().st_size > 10_000


def test_spans_of_token_ids_are_ranges_of_tokens(bare) -> None:
    (row,) = interp.patch(bare, PAIR, ["resid_pre.L1@changed"]).frame().to_dict("records")
    (same,) = interp.patch(bare, PAIR, ["resid_pre.L1@2"]).frame().to_dict("records")
    assert row["patched"] == same["patched"] and row["role"] == "changed"
    for span in ((4, 7), (3, 3), (-1, 2), "ab", (0.0, 1.0)):
        wrong = interp.PromptPair(CLEAN, CORRUPT, 8, 9, {"s": span})  # type: ignore[arg-type,dict-item]
        with pytest.raises(PromptError, match=r"a range .start, stop. of the 6 tokens expected"):
            interp.patch(bare, wrong, bare.sites("z"))


def test_text_is_refused_with_one_message(bare) -> None:
    text = interp.PromptPair("a b", "a c", " d")
    uses_text = (
        lambda: bare("a b"), lambda: bare(["a", "b"]), lambda: bare.run_with_cache("a b"),
        lambda: bare.attention_stats("a b"), lambda: bare.attention_patterns("a b"),
        lambda: interp.patch(bare, text, bare.sites("z")),
        lambda: interp.patch(bare, interp.PromptPair(CLEAN, CORRUPT, " d"), bare.sites("z")),  # type: ignore[arg-type]
        lambda: interp.leave_out(bare, PAIR, instead={"changed": "words"}),
        lambda: interp.tasks.ioi(bare, n=4), lambda: interp.tasks.induction(bare, n=4),
        lambda: interp.tasks.docstring(bare, n=4),
    )  # fmt: skip
    for use in uses_text:
        with pytest.raises(PromptError, match="has no tokenizer, so that prompts and answers cannot be texts"):
            use()
    with pytest.raises(PromptError, match="in which no words can be found: name its range"):
        interp.Prompt(CLEAN).span("s")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="sentences are found in a text"):
        interp.spans.with_sentences(interp.Prompt(CLEAN))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no BOS token"):
        interp.load(tiny_hf("llama"), tokenizer=False, bos=True)


def test_ids_outside_the_vocabulary_are_refused(bare) -> None:
    for ids in ([0, 100], [0, -2]):
        with pytest.raises(PromptError, match=f"token {ids[1]} is outside"):
            bare(torch.tensor([ids]))
    for use in (
        lambda: bare.attention_stats([0, 100]),
        lambda: interp.patch(bare, interp.PromptPair([0, 100], [0, 1], 2), bare.sites("z")),  # type: ignore[arg-type]
        lambda: interp.patch(bare, interp.PromptPair([0, 3], [0, 1], 100), bare.sites("z")),  # type: ignore[arg-type]
    ):
        with pytest.raises(PromptError, match=r"token 100 is beyond .* vocabulary of 100 tokens, 0 to 99"):
            use()


def test_other_families_without_a_tokenizer() -> None:
    masked = interp.load(tiny_hf("bert"), tokenizer=False)
    assert len(masked.attention_stats([0, 4, 5]).frame()) == 36
    with pytest.raises(PromptError, match=r"masked language model.* it has no tokenizer"):
        interp.patch(masked, interp.PromptPair([0, 4], [0, 5], 2, 3), masked.sites("z"))  # type: ignore[arg-type]
    t5 = interp.load(tiny_hf("t5"), tokenizer=False)
    stats = t5.attention_stats([[0, 4, 5], [6, 7]], target=[[8, 9], [3]], stack="decoder").frame()  # type: ignore[list-item]
    assert list(dict.fromkeys(stats[stats["example"] == 0]["token"])) == ["0", "8", "9"]
    with pytest.raises(PromptError, match="has no tokenizer"):
        t5.attention_stats([0, 4, 5], target="text")
