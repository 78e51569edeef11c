"""Confidence along prompts and ranked statements, against untouched Hugging Face models and arithmetic."""

from __future__ import annotations

import math

import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, ModelError, PromptError
from interp.model import likelihood

TEXTS = ["w1 w2 w3 w4 w5", "w7", "w3 w3 w9 w1 w5", "w8 w20 w30 w2"]


def hand(kind: str, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [position, vocab] of an untouched model."""
    with torch.no_grad():
        return tiny_hf(kind)(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "neox", "gemma2", "opt"])
@pytest.mark.parametrize("at_a_time", [1, 2**24])
def test_confidence_is_that_of_an_untouched_model(tiny, kind: str, at_a_time: int, monkeypatch) -> None:
    monkeypatch.setattr(likelihood, "LOGITS_AT_A_TIME", at_a_time)
    model = tiny(kind)
    table = model.confidence(TEXTS)
    assert table.columns.tolist() == [
        "example", "position", "token", "next", "probability", "logprob", "entropy", "margin", "best",
    ]  # fmt: skip
    for example, text in enumerate(TEXTS):
        rows, ids = table[table["example"] == example], model.coder.encode(text)
        logprobs = hand(kind, ids)
        top = logprobs.exp().sort(descending=True).values
        want = {
            "entropy": -(logprobs.exp() * logprobs).sum(-1), "margin": top[:, 0] - top[:, 1],
            "logprob": torch.tensor([*(logprobs[i, t] for i, t in enumerate(ids[1:])), math.nan]),
        }  # fmt: skip
        for column, values in want.items():
            assert rows[column].to_numpy() == pytest.approx(values.numpy(), abs=1e-5, nan_ok=True)
        assert rows["probability"].to_numpy() == pytest.approx(want["logprob"].exp().numpy(), abs=1e-6, nan_ok=True)
        tokens = model.coder.texts(ids)
        assert rows["token"].tolist() == tokens and rows["next"].tolist()[:-1] == tokens[1:]
        assert rows["best"].tolist() == model.coder.texts(logprobs.argmax(-1).tolist())
    assert "forward" not in vars(model.bridge.original_model.base_model)


def test_long_prompts_hold_few_logits(tiny, monkeypatch) -> None:
    """Layers run once for a batch, the head on a few positions at a time."""
    model, blocks, heads = tiny("llama"), [], []
    monkeypatch.setattr(likelihood, "LOGITS_AT_A_TIME", 700)
    hf = model.bridge.original_model
    handles = [
        hf.model.layers[0].register_forward_hook(lambda *_: blocks.append(1)),
        hf.get_output_embeddings().register_forward_hook(lambda _m, _a, out: heads.append(out.numel())),
    ]
    model.confidence(["w1 " * 40])
    for handle in handles:
        handle.remove()
    assert len(blocks) == 1 and max(heads) <= 700 and sum(heads) == 41 * 100


def test_confidence_under_edits_and_without_a_tokenizer(tiny) -> None:
    model = tiny("llama")
    ids = interp.Prompt([0, 4, 5, 6], {"s": (1, 2)})  # type: ignore[arg-type]
    plain = model.confidence(ids)
    with model.edited(interp.AttentionEdit(keys="s", gain=0.0)):
        cut = model.confidence(ids)
    assert plain["logprob"][0] == cut["logprob"][0] and abs(plain["logprob"][2] - cut["logprob"][2]) > 1e-3
    bare = interp.load(tiny_hf("llama"), tokenizer=False).confidence([0, 4, 5, 6])
    assert (
        bare["token"].tolist() == ["0", "4", "5", "6"] and bare["logprob"][:3].tolist() == plain["logprob"][:3].tolist()
    )


def test_what_has_no_next_token_is_refused(tiny) -> None:
    for kind, error, words in (
        ("bert", PromptError, "predicts no next token"), ("bert_headless", ModelError, "no language model with a head"),
        ("t5", ModelError, "no language model with a head"), ("vit", ModelError, "no language model with a head"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            tiny(kind).confidence("w1 w2")
    for wrong in ((), 3, ""):
        with pytest.raises(PromptError):
            tiny("llama").confidence(wrong)


# ------------------------------------------------------------------ ranked statements


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_statements_are_ranked_by_the_sums_of_an_untouched_model(tiny, kind: str) -> None:
    model = tiny(kind)
    table = interp.tasks.rank(model, TEXTS)
    sums = {}
    for text in TEXTS:
        ids = model.coder.encode(text)
        sums[text] = sum(hand(kind, ids)[i, t].item() for i, t in enumerate(ids[1:]))
    assert table["statement"].tolist() == sorted(TEXTS, key=lambda t: -sums[t])
    assert table["logprob"].tolist() == pytest.approx(sorted(sums.values(), reverse=True), abs=1e-5)
    assert table["tokens"].tolist() == [len(t.split()) for t in table["statement"]]
    assert table["mean_logprob"].tolist() == (table["logprob"] / table["tokens"]).tolist()
    assert table["rank"].tolist() == [1, 2, 3, 4] and sorted(table["mean_rank"]) == [1, 2, 3, 4]
    by_mean = table.sort_values("mean_rank")["mean_logprob"].tolist()
    assert by_mean == sorted(by_mean, reverse=True)


def test_nulls_identical_statements_and_a_random_model(tiny) -> None:
    table = interp.tasks.rank(tiny("llama"), ["w1 w2", "w5 w6 w7", "w1 w2", "w1 w2"])
    same = table[table["statement"] == "w1 w2"]
    assert all(len(set(same[column])) == 1 for column in ("rank", "mean_rank", "logprob"))
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 97, (200, 4, 3), generator=generator).tolist()
    questions = {i: [" ".join(f"w{w}" for w in row) for row in group] for i, group in enumerate(words)}
    ranked = interp.tasks.rank(tiny("gpt2"), questions)
    first = ranked[ranked["number"] == 0]  # any of the four: chance is a quarter
    assert len(first) == 200 and abs((first["rank"] == 1).mean() - 0.25) < 3 * (0.25 * 0.75 / 200) ** 0.5


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_pseudo_likelihood_masks_one_word_at_a_time(kind: str, word_tokenizer) -> None:
    from copy import deepcopy

    tokenizer = deepcopy(word_tokenizer)
    tokenizer.add_special_tokens({"mask_token": "w96"})
    model, mask = interp.load(tiny_hf(kind), tokenizer=tokenizer), tokenizer.mask_token_id
    texts = ["w1 w2 w3", "w9 w8"]
    table = interp.tasks.rank(model, texts).set_index("statement")
    for text in texts:
        ids = model.coder.encode(text)
        assert ids[0] == 0  # <bos>, which is not scored
        want = [hand(kind, [*ids[:i], mask, *ids[i + 1 :]])[i, ids[i]].item() for i in range(1, len(ids))]
        assert table.loc[text, "logprob"] == pytest.approx(sum(want), abs=1e-5)
        assert table.loc[text, "mean_logprob"] == pytest.approx(sum(want) / len(want), abs=1e-5)
    with pytest.raises(PromptError, match="holds the mask token"):
        interp.tasks.rank(model, ["w1 w96", "w2 w3"])


def test_later_pieces_of_a_word_are_masked_with_it(tiny) -> None:
    """Words "ab" and "cb" of the pieces a, ##b, c."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"[MASK]": 0, "[UNK]": 1, "a": 2, "##b": 3, "c": 4}
    raw = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, mask_token="[MASK]", unk_token="[UNK]")
    model = interp.load(tiny_hf("bert"), tokenizer=tokenizer)
    ids = model.coder.encode("ab cb")
    assert ids == [2, 3, 4, 3]
    by_word = [([0, 0, 4, 3], 0), ([2, 0, 4, 3], 1), ([2, 3, 0, 0], 2), ([2, 3, 4, 0], 3)]
    (scores,) = model.token_logprobs("ab cb")
    want = [hand("bert", masked)[i, ids[i]].item() for masked, i in by_word]
    assert scores.tolist() == pytest.approx(want, abs=1e-5)
    (scores,) = model.token_logprobs("ab cb", masking="token")
    want = [hand("bert", [*ids[:i], 0, *ids[i + 1 :]])[i, ids[i]].item() for i in range(4)]
    assert scores.tolist() == pytest.approx(want, abs=1e-5)


def test_bad_statements_teach(tiny, word_tokenizer, caplog) -> None:
    model = tiny("llama")
    for wrong, words in (
        (["w1 w2"], "one statement has nothing to be ranked with"), ({}, "no statements"), ({"q": []}, "no prompts"),
        ({"q": ["w1"]}, "question 'q': one statement"), (3, "expected"), (["w1", 3], "expected"),
    ):  # fmt: skip
        with pytest.raises(PromptError, match=words):
            interp.tasks.rank(model, wrong)
    with pytest.raises(InterpError, match="masking='words'"):
        interp.tasks.rank(model, TEXTS, masking="words")  # type: ignore[arg-type]
    assert "begin with different tokens" not in caplog.text
    without = interp.load(tiny_hf("gpt2"), tokenizer=word_tokenizer, bos=False)
    assert interp.tasks.rank(without, ["w1 w2", "w3 w2"])["tokens"].tolist() == [1, 1]
    assert "begin with different tokens" in caplog.text
    with pytest.raises(PromptError, match="no token whose probability"):
        interp.tasks.rank(without, ["w1", "w3"])
