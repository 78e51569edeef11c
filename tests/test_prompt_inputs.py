"""What is a prompt, which token is an answer, where is a subject, and tables of pairs."""

from __future__ import annotations

import io
import logging
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import PromptError
from interp.prompts import encode_facts, encode_pairs, find_span
from interp.prompts.files import read_prompts

PAIR = interp.PromptPair("w1 w2 w3", "w1 w4 w3", "w5", "w6")
TEXTS = ["w1 w2 w3", "w4 w5"]
IDS = [[0, 4, 5, 6], [0, 7, 8]]  # the same, as the tokenizer of the tests numbers them

# ------------------------------------------------------------------ what is a prompt


def encodings(tokenizer):
    """The same two prompts, in every form that holds their tokens."""
    yield tokenizer(TEXTS)
    for side in ("left", "right"):
        padded = tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
        yield padded
        yield dict(padded)
        yield {name: x.numpy() for name, x in padded.items()}
    yield [tokenizer(t) for t in TEXTS]
    yield [tokenizer(t, return_tensors="pt") for t in TEXTS]
    yield IDS
    yield [torch.tensor(ids) for ids in IDS]
    yield tuple(np.array(ids) for ids in IDS)
    yield from (TEXTS, tuple(TEXTS), iter(TEXTS), np.array(TEXTS), pd.Series(TEXTS), pd.Series(TEXTS, dtype="string"))
    yield [interp.Prompt(TEXTS[0]), interp.PromptPair(TEXTS[1], "w4 w6", "w1", "w2")]


def test_encodings_are_the_prompts_that_they_hold(tiny, word_tokenizer) -> None:
    model = tiny("llama")
    want = model.attention_stats(TEXTS).frame()
    direction = interp.mean_difference(model, TEXTS, ["w9"], "resid_post.L0")
    for form in encodings(word_tokenizer):
        form = list(form) if hasattr(form, "__next__") else form
        pd.testing.assert_frame_equal(model.attention_stats(form).frame(), want)
        assert torch.equal(interp.mean_difference(model, form, ["w9"], "resid_post.L0"), direction)
        assert [e.runs["clean"].tokens for e in model.attention_patterns(form).examples] == [
            ["<bos>", "w1", "w2", "w3"], ["<bos>", "w4", "w5"],
        ]  # fmt: skip


def test_padding_without_a_mask_is_refused(tiny, word_tokenizer, caplog) -> None:
    """As words it would change every number. Where the padding token has another use too, several are told."""
    model, (ids, shorter) = tiny("llama"), IDS
    pad = word_tokenizer.pad_token_id
    assert pad == word_tokenizer.eos_token_id  # in this tokenizer
    model.attention_stats([ids, [*shorter, pad]])
    assert "padding token" not in caplog.text
    model.attention_stats(torch.tensor([[*ids, pad], [pad, pad, *shorter]]))
    assert "2 padding token(s) ('<pad>') at an end of token ids" in caplog.text
    own_pad = deepcopy(word_tokenizer)
    own_pad.eos_token = "w0"
    model = interp.load(tiny_hf("llama"), tokenizer=own_pad)
    for padded in ([*shorter, pad], [pad, *shorter]):
        with pytest.raises(PromptError, match=r"1 padding token.*give what the tokenizer returned, with its attention"):
            model.attention_stats(torch.tensor([ids, padded]))
    model.attention_stats({"input_ids": [ids, [pad, *shorter]], "attention_mask": [[1] * 4, [0, 1, 1, 1]]})


NO_PROMPTS = [
    (None, "NoneType"), (b"w1 w2", "decode them first"), (3.5, "float"), ({"w1", "w2"}, "a set has none"),
    ({"text": "w1"}, "with the keys"), (np.array("w1"), "ndarray"), ([None], "NoneType"),
    (pd.DataFrame({"clean": ["w1"]}), "PairSet.from_frame"),
    (torch.tensor([0.5, 1.0]), "float32 numbers"), ([["w1", "w2"]], "item 0 is list"), ([-1, 2], "from 0 on"),
    ({"input_ids": [[0, 4, 5]], "attention_mask": [[1, 0, 1]]}, "tokens between others"),
    ({"input_ids": [[0, 4]], "attention_mask": [[1]]}, "does not have the shape"),
    ({"input_ids": [[0, 4]], "token_type_ids": [[0, 1]]}, "second text"),
    ({"input_ids": [[0, 4]], "labels": [[0, 4]]}, "labels"), ([True, False], "bool"), ([], "no"), ([""], "non-empty"),
    ([10**9], "beyond"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "words"), NO_PROMPTS)
def test_what_is_no_prompt_is_refused_everywhere(tiny, wrong, words: str) -> None:
    model = tiny("llama")
    for call in (
        lambda: model.attention_stats(wrong),
        lambda: model.attention_patterns(wrong),
        lambda: interp.mean_difference(model, ["w1"], wrong, "resid_post.L0"),
        lambda: interp.circuits.attention_channels(model, wrong),
    ):
        with pytest.raises(PromptError, match=words):
            call()
    for call in (
        lambda: interp.ablate(model, PAIR, "z.L0H0", using="mean", reference=wrong),
        lambda: interp.circuits.causal_head_gating(model, wrong, steps=1),
        lambda: interp.patch(model, wrong, "z.L0H0"),
        lambda: interp.trace(model, wrong),
        lambda: interp.peek(model, wrong),
        lambda: interp.knock_out(model, wrong, 0),
        lambda: interp.steer(model, wrong, "resid_post.L0", torch.ones(model.d_model)),
        lambda: interp.circuits.attribute_edges(model, wrong),
        lambda: interp.tasks.check(model, wrong),
    ):
        if wrong is not None or "ablate" not in call.__code__.co_names:  # no reference is a choice
            with pytest.raises(PromptError):
                call()


def test_pairs_may_be_token_ids(tiny) -> None:
    model = tiny("llama")
    want = interp.patch(model, PAIR, model.sites("z")).frame().drop(columns="prompt")  # a hash of what was typed
    ids = interp.PromptPair([0, 4, 5, 6], torch.tensor([0, 4, 7, 6]), 8, 9)  # type: ignore[arg-type]
    pd.testing.assert_frame_equal(interp.patch(model, ids, model.sites("z")).frame().drop(columns="prompt"), want)
    with pytest.raises(PromptError, match="token ids, in which no words"):
        ids.span("s", "w2")
    with pytest.raises(PromptError, match="beyond"):
        encode_pairs(interp.PromptPair([0, 4], [0, 5], 10**6), model.coder)  # type: ignore[arg-type]


def test_pairs_that_cannot_be_used_are_reported_together(tiny) -> None:
    bad = [interp.PromptPair("w1 w2", "w1 w2 w3", "w5") for _ in range(30)]
    with pytest.raises(PromptError) as caught:
        encode_pairs([PAIR, *bad, interp.PromptPair("w1", "w2", "w3 w4")], tiny("llama").coder)
    lines = str(caught.value).splitlines()
    assert lines[0] == "31 of 32 pairs cannot be used:" and lines[1].startswith("pair 1: clean and corrupt have")
    assert lines[-1] == "… and 21 more" and len(lines) < 20 and "pair 10" in lines[-2]


# ------------------------------------------------------------------ which token is an answer

PIECES = ["▁", "f", "(", "x", ")", "5", "i", "s", "▁is", "is", "▁Paris", "Paris", "▁Madrid", "Madrid", "▁x", "()",
          "the", "▁the", "▁the▁", "▁)", "▁5", "▁f"]  # fmt: skip


def pieces(kind: str) -> PreTrainedTokenizerFast:
    """A vocabulary of whole pieces: SentencePiece's (a string begins with ▁) or byte-level (it does not)."""
    raw = Tokenizer(models.Unigram([("<unk>", 0.0), *((p, -1.0 - 0.01 * i) for i, p in enumerate(PIECES))], 0))
    if kind == "byte-level":
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    raw.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def written(request) -> interp.Model:
    return interp.load(tiny_hf("llama"), tokenizer=pieces(request.param))


def answers(model: interp.Model, prompt: str, answer: str, foil: str | None = None) -> list[str]:
    """Names of the pieces that are read."""
    (e,) = encode_pairs(interp.PromptPair(prompt, prompt, answer, foil), model.coder)
    return model.tokenizer.convert_ids_to_tokens([i for i in (e.answer, e.foil) if i is not None])


def test_an_answer_is_what_continues_its_prompt(written, caplog) -> None:
    assert answers(written, "f(", "x", ")") == ["x", ")"] or "()" in caplog.text
    assert answers(written, "f(", "5", "x") == ["5", "x"]
    assert answers(written, "the is", " Paris", " Madrid") == ["▁Paris", "▁Madrid"]
    assert interp.PromptPair("f(", "f(", "x", "5").answer == "x"


def test_one_leading_space_is_refused(written) -> None:
    for answer, foil in (("Paris", " Madrid"), (" Paris", "Madrid")):
        with pytest.raises(PromptError, match="has a leading space and the other has none"):
            answers(written, "the is", answer, foil)
    first, second = written.tokenizer.convert_tokens_to_ids(["Paris", "▁Madrid"])
    (e,) = encode_pairs(interp.PromptPair("the is", "the is", first, second), written.coder)
    assert (e.answer, e.foil) == (first, second)  # ids are taken as they are


def test_what_a_user_should_know_is_said_once(written, caplog) -> None:
    with caplog.at_level(logging.WARNING, "interp"):
        pairs = [interp.PromptPair("the is", "the is", "Paris", "Madrid")] * 5
        encode_pairs(pairs, written.coder)
    (record,) = caplog.records
    assert "continues the prompt's last word" in record.message and "9 more like it" in record.message
    caplog.clear()
    with pytest.raises(PromptError, match="ends with a space"):
        encode_pairs(interp.PromptPair("the is ", "the is ", "Paris", "Madrid"), written.coder)


def test_a_merge_with_the_prompt_is_said(written, caplog) -> None:
    with caplog.at_level(logging.WARNING, "interp"):
        assert answers(written, "f(", ")") == [")"]
    assert "is not what the tokenizer makes of it after 'f('" in caplog.text


def test_a_masked_model_reads_what_fills_its_mask(caplog) -> None:
    raw = pieces("byte-level")
    raw.add_special_tokens({"mask_token": "<mask>"})
    model = interp.load(tiny_hf("roberta"), tokenizer=raw)
    assert answers(model, "the<mask>", " Paris", " Madrid") == ["▁Paris", "▁Madrid"]
    assert answers(model, "f(<mask>", "x", "5") == ["x", "5"]


# ------------------------------------------------------------------ where is a subject


def test_a_subject_is_whole_words() -> None:
    assert interp.Fact("The Parisian Paris is", "Paris", " x").subject_span == (13, 18)
    assert interp.Fact("L'été à Paris, 東京は", "東京", " x").subject_span == (15, 17)
    with pytest.raises(PromptError, match=r"only inside a longer word: 'Parisian'"):
        _ = interp.Fact("The Parisian is", "Paris", " x").subject_span
    with pytest.raises(PromptError, match=r"'us' \(occurrence 0\) is not in"):
        _ = interp.Fact("The Parisian is", "us", " x").subject_span
    text = "In Paris, the mayor of Paris is"
    with pytest.raises(PromptError, match=r"stands 2 times .* at characters 3, 23: say which with occurrence=0"):
        _ = interp.Fact(text, "Paris", " x").subject_span
    places = [interp.Fact(text, "Paris", " x", occurrence=i).subject_span for i in (0, 1, -1)]
    assert places == [(3, 8), (23, 28), (23, 28)]
    with pytest.raises(PromptError, match="holds it 2 times"):
        _ = interp.Fact(text, "Paris", " x", occurrence=2).subject_span


def test_facts_of_a_model_are_refused_together(tiny) -> None:
    with pytest.raises(PromptError, match="2 of 3 facts cannot be used"):
        good, twice = interp.Fact("w1 w2", "w2", "w3"), interp.Fact("w1 w2 w1", "w1", "w3")
        encode_facts([good, twice, interp.Fact("w11 w2", "w1", "w3")], tiny("llama").coder)


def test_spans_prefer_whole_words_and_say_when_there_are_several(caplog) -> None:
    pair = interp.PromptPair("the man said he", "the man said it", " x").span("who", "he")
    assert pair.spans == {"who": (13, 15)} and not caplog.records
    assert find_span("banana", "an") == (1, 3) and find_span("a b a", "a", 1) == (4, 5)
    with caplog.at_level(logging.WARNING, "interp"):
        assert interp.Prompt("a b a").span("a").spans == {"a": (0, 1)}
    assert "stands 2 times" in caplog.text
    caplog.clear()
    assert interp.Prompt("a b a").span("a", occurrence=0).spans == {"a": (0, 1)} and not caplog.records


# ------------------------------------------------------------------ tables of pairs


def test_a_set_becomes_a_table_and_a_set_again(tmp_path) -> None:
    one = interp.PromptPair('Mary, "and" Mary', "John and Mary", " x", " y").span("second", "Mary", occurrence=-1)
    pairs = interp.PairSet([one, interp.PromptPair("a b", "a c", " z").span("b")], task="mine", seed=3)
    frame = pairs.frame()
    assert frame.columns.tolist() == ["clean", "corrupt", "answer", "foil", "span:second", "span:b"]
    assert [frame["span:second"].tolist()[0], frame["span:b"].tolist()[1]] == ["[12:16]", "b"]
    text = frame.to_csv(index=False)
    (tmp_path / "pairs.csv").write_text(text)
    for again in (interp.PairSet.from_frame(frame), interp.PairSet.from_frame(pd.read_csv(io.StringIO(text)))):
        assert list(again) == list(pairs) == read_prompts(tmp_path / "pairs.csv")
    assert interp.PairSet.from_frame(frame, task="mine", seed=3).task == "mine"


def test_sets_add() -> None:
    a, b = interp.PairSet([PAIR], task="a", seed=1), interp.PairSet([PAIR] * 2, task="b", seed=1)
    both = a + b
    assert len(both) == 3 and both.task == "a + b" and both.seed == 1
    more: list[interp.PromptPair] = [PAIR]
    assert (a + more).task == "a" and (a + interp.PairSet([PAIR], task="a", seed=2)).seed is None
    for wrong in ("text", 3, [PAIR, "text"], None):
        with pytest.raises(PromptError):
            a + wrong  # type: ignore[operator]
    assert interp.PairSet([]).frame().columns.tolist() == ["clean", "corrupt", "answer", "foil"]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"clean": ["a"], "corrupt": ["b"]}, "row 0 lacks answer"),
        ({"clean": ["a"], "corrupt": ["b"], "Answer": [" c"]}, "did you mean 'answer'"),
        (
            {"clean": ["a"], "corrupt": ["b"], "answer": [" c"], "fiol": [" d"]},
            "did you mean 'foil'",
        ),
        ({"clean": ["a"], "corrupt": ["b"], "answer": [3]}, "row 0 lacks answer"),
        ({"clean": ["a"], "corrupt": ["b"], "answer": [" c"], "span:s": ["q"]}, "row 0: 'q'"),
        ({"clean": ["a"], "corrupt": ["b"], "answer": [" c"], "span:s": ["[0:9]"]}, "up to 1"),
        ({"prompt": ["a b"], "subject": ["a"], "answer": [" c"]}, "the table has 1 facts"),
        ({"clean": [], "corrupt": [], "answer": []}, "no rows"),
    ],
)
def test_bad_tables_teach(table, words: str) -> None:
    with pytest.raises(PromptError, match=words.replace("[", r"\[")):
        interp.PairSet.from_frame(pd.DataFrame(table))
    with pytest.raises(PromptError, match="a DataFrame expected, got list"):
        interp.PairSet.from_frame([PAIR])  # type: ignore[arg-type]


def test_files_say_everything_at_once(tmp_path, caplog) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(
        "clean,corrupt,answer,note,span:who\nMary is,John is, x,mine,Mary\nMary is,,,\nMary is,John is, y,,Bob\n"
    )
    with pytest.raises(PromptError) as caught:
        read_prompts(path)
    lines = str(caught.value).splitlines()
    assert lines[0] == "2 of 3 rows cannot be used:" and "line 3 lacks corrupt, answer" in lines[1]
    assert "line 4: 'Bob'" in lines[2]
    path.write_text("clean,corrupt,answer,note,span:who\nMary is,John is, x,mine,Mary\n")
    with caplog.at_level(logging.WARNING, "interp"):
        assert read_prompts(path) == [interp.PromptPair("Mary is", "John is", " x", None, {"who": (0, 4)})]
    assert "left out: 'note'" in caplog.text
    path.write_text("prompt,subject,answer,occurrence\na b a,a, c,-1\n")
    assert read_prompts(path) == [interp.Fact("a b a", "a", " c", -1)]
