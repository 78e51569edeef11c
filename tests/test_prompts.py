from __future__ import annotations

import pytest

from interp.errors import PromptError
from interp.prompts.pair_set import PairSet
from interp.prompts.pairs import Fact, PromptPair, encode_facts, encode_pairs
from interp.prompts.ranges import find_span


@pytest.fixture(scope="module")
def coder(tiny):
    return tiny("llama").coder


PAIR = PromptPair("w1 w2 w3 w2", "w1 w4 w3 w2", "w5", "w6")


def test_encoding_aligns_and_names(coder) -> None:
    (e,) = encode_pairs(PAIR.span("first", "w2").span("second", "w2", occurrence=1), coder)
    assert e.tokens == ("<bos>", "w1", "w2", "w3", "w2")
    assert e.first_difference == 2
    assert e.spans == {"first": (2, 3), "second": (4, 5)}
    assert [e.role(i) for i in range(5)] == ["", "", "first", "", "second"]


def test_the_shortest_span_names_a_position(coder) -> None:
    (e,) = encode_pairs(PAIR.span("whole", "w1 w2 w3").span("inner", "w2"), coder)
    assert e.role(2) == "inner" and e.role(1) == "whole"


def test_different_lengths_show_both_tokenisations(coder) -> None:
    with pytest.raises(PromptError) as caught:
        encode_pairs([PAIR, PromptPair("w1 w2 w3", "w1 w9", "w5", "w6")], coder)
    text = str(caught.value)
    assert "pair 1" in text and "4 and 3 tokens" in text
    assert "*   2  'w2'     'w9'" in text and "*   3  'w3'     —" in text


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (PromptPair("w1", "w2", "w3 w4", "w5"), "answer 'w3 w4' is 2 tokens"),
        (PromptPair("w1", "w2", "w3", "w4 w5"), "foil 'w4 w5' is 2 tokens"),
        (PromptPair("w1", "w2", "w3", "w3"), "same token"),
        (PromptPair("w1", "w2", "", "w3"), "answer '' is 0 tokens"),
        (PromptPair("", "w2", "w1", "w3"), "non-empty string"),
        (PromptPair("w1 w2", "w1 w3", "w5", spans={"s": (90, 95)}), "covers no token"),
        ("not a pair", "expected PromptPair"),
    ],
)
def test_bad_pairs_teach(coder, pair, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        encode_pairs([pair], coder)


def test_empty_sets_are_refused(coder) -> None:
    with pytest.raises(PromptError, match="no prompt pairs"):
        encode_pairs([], coder)
    with pytest.raises(PromptError, match="no facts"):
        encode_facts([], coder)


def test_facts_need_their_subject(coder) -> None:
    (e,) = encode_facts(Fact("w1 w2 w3 w4", "w2 w3", "w9"), coder)
    assert e.spans == {"subject": (2, 4)} and e.clean == e.corrupt
    with pytest.raises(PromptError, match="'w7'"):
        encode_facts(Fact("w1 w2", "w7", "w9"), coder)
    assert find_span("a b a", "a", 1) == (4, 5)


def test_pair_sets_slice_and_remember_their_task() -> None:
    pairs = PairSet([PAIR] * 4, task="toy", seed=3)
    assert len(pairs[1:3]) == 2 and pairs[1:3].task == "toy" and pairs[0] is PAIR
    assert "toy" in repr(pairs)


@pytest.mark.model
def test_spans_survive_byte_level_tokens(smollm2) -> None:
    pair = PromptPair("Naïve Zoë met Bob 😀 and", "Naïve Zoë met Tom 😀 and", " Mary", " Bob")
    (e,) = encode_pairs(pair.span("name", "Zoë").span("face", "😀"), smollm2.coder)
    for name in ("name", "face"):
        start, stop = e.spans[name]
        assert smollm2.tokenizer.decode(e.clean[start:stop]).strip() == {"name": "Zoë", "face": "😀"}[name]
