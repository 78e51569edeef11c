"""Properties of the task generators, on word-level tokenizers made here and on models that surely can or cannot."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp import tasks, zoo
from interp.errors import PromptError, TaskError
from interp.prompts.coder import Coder
from interp.prompts.pairs import Fact, PromptPair, encode_facts, encode_pairs
from interp.tasks import indirect_object, known_facts
from interp.tasks.indirect_object import NAMES, OBJECTS, PLACES, TEMPLATES
from interp.zoo.tokenizer import word_tokenizer


class StandIn:
    """The part of a Model that tasks need: a word-level tokenizer, and logits by a rule given in plain Python.

    ``says(words) -> word`` is what it answers; that word's logit is 5, the others' are 0.
    """

    name = "stand-in"

    def __init__(self, words, says=lambda words: "none"):
        self.tokenizer = word_tokenizer(sorted(set(words)))
        self.says = says
        self.ids = self.tokenizer.get_vocab()
        self.coder = Coder(
            encode=lambda text: self.tokenizer(text)["input_ids"],
            texts=lambda ids: [self.tokenizer.decode([i]) for i in ids],
            offsets=lambda text: self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"],
            continuation=lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
        )

    def next_token_logits(self, ids):
        logits = torch.zeros(len(ids), len(self.ids))
        for row, prompt in zip(logits, ids, strict=True):
            word = self.says([self.tokenizer.decode([i]) for i in prompt[1:]])
            row[self.ids.get(word, 0)] = 5.0
        return logits


def words_of(text):
    return text.replace(",", " ,").replace(".", " .").split()


class Punctuated(StandIn):
    """Also splits off commas and full stops, so that names are the same token before them."""

    def __init__(self, words, says=lambda words: "none"):
        super().__init__([*words, ",", "."], says)
        from tokenizers.pre_tokenizers import Whitespace

        self.tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()


def english():
    text = " ".join(TEMPLATES) + " "
    return [w for w in words_of(text) if "{" not in w] + [*NAMES, *PLACES, *OBJECTS]


@pytest.fixture(scope="module")
def reader():
    """Answers IOI by counting: the name that occurs once."""

    def once(words):
        names = [w for w in words if w in NAMES]
        return next((w for w in names if names.count(w) == 1), "none")

    return Punctuated(english(), once)


# ---------------------------------------------------------------- IOI


def test_there_is_enough_variety():
    assert len(TEMPLATES) >= 12 and len(NAMES) >= 40 and len(PLACES) >= 20 and len(OBJECTS) >= 20
    for group in (TEMPLATES, NAMES, PLACES, OBJECTS):
        assert len(set(group)) == len(group)
    for t in TEMPLATES:
        assert t.index("{A}") < t.index("{B}") < t.index("{S}") and t.endswith("{object} to")
        assert not t.startswith("{") and all(t[t.index(slot) - 1] == " " for slot in ("{A}", "{B}", "{S}"))
        assert "a {object}" in t  # so no object may start with a vowel


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 70), seed=st.integers(0, 10**6), corruption=st.sampled_from(["swap", "abc"]))
def test_ioi_pairs_are_what_they_claim(n, seed, corruption):
    model = Punctuated(english())
    pairs = tasks.ioi(model, n, seed, corruption=corruption)
    assert len(pairs) == n and pairs.seed == seed
    abba = 0
    for pair, e in zip(pairs, encode_pairs(pairs, model.coder), strict=True):
        io, s = pair.answer.strip(), pair.foil.strip()
        text = {name: pair.clean[a:b] for name, (a, b) in pair.spans.items()}
        assert text["IO"] == io and text["S1"] == text["S2"] == s and text["END"] == "to"
        assert words_of(pair.clean).count(io) == 1 and words_of(pair.clean).count(s) == 2
        changed = [i for i, (a, b) in enumerate(zip(e.clean, e.corrupt, strict=True)) if a != b]
        assert changed == [e.spans["S2"][0]]
        third = e.corrupt[changed[0]]
        assert third == e.answer if corruption == "swap" else third not in (e.answer, e.foil)
        assert e.spans["S1+1"] == (e.spans["S1"][1], e.spans["S1"][1] + 1)
        assert e.spans["END"] == (len(e) - 1, len(e))
        abba += e.spans["IO"] < e.spans["S1"]
    assert abba == (n + 1) // 2


def test_ioi_is_the_same_for_a_seed_and_uses_every_template(reader):
    assert list(tasks.ioi(reader, 30, 3)) == list(tasks.ioi(reader, 30, 3)) != list(tasks.ioi(reader, 30, 4))
    openings = {p.clean.split()[0] for p in tasks.ioi(reader, 2 * len(TEMPLATES))}
    assert openings == {t.split()[0] for t in TEMPLATES}


def test_ioi_leaves_out_names_that_are_not_single_tokens():
    model = Punctuated([w for w in english() if w not in NAMES[5:]])
    pairs = tasks.ioi(model, 40)
    assert set(pairs.dropped) == set(NAMES[5:]) and f"{len(NAMES) - 5} words" in repr(pairs)
    assert {p.answer.strip() for p in pairs} <= set(NAMES[:5])


def test_ioi_refuses_a_tokenizer_without_names_and_wrong_arguments():
    with pytest.raises(TaskError, match=r"at least 4 first names .* has none \(missing: Adam"):
        tasks.ioi(StandIn(["a"]))
    with pytest.raises(TaskError, match="'swap', 'abc', 'names'"):
        tasks.ioi(Punctuated(english()), corruption="abba")  # type: ignore[arg-type]
    for n in (0, -1, 2.5, True):
        with pytest.raises(TaskError, match="at least 1"):
            tasks.ioi(Punctuated(english()), n)  # type: ignore[arg-type]


def test_fill_says_where():
    text, where = indirect_object.fill("x {A} y {B}", {"A": "one", "B": "two"})
    assert text == "x one y two" and {k: text[a:b] for k, (a, b) in where.items()} == {"A": "one", "B": "two"}


# ---------------------------------------------------------------- induction


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_induction_pairs_are_what_they_claim(seed):
    model = StandIn(zoo.known.WORDS)
    for pair, e in zip(tasks.induction(model, 5, seed), encode_pairs(tasks.induction(model, 5, seed), model.coder),
                       strict=True):  # fmt: skip
        clean, corrupt = pair.clean.split(), pair.corrupt.split()
        at = {name: e.spans[name][0] - 1 for name in e.spans}  # word index; <bos> is token 0
        a, b, c, d = (clean[at[k]] for k in ("A1", "B1", "C1", "D1"))
        assert len({a, b, c, d}) == 4 and clean[-1] == corrupt[-1] == a and at["A2"] == len(clean) - 1
        assert (pair.answer, pair.foil) == (f" {b}", f" {d}")
        assert at["B1"] == at["A1"] + 1 and at["D1"] == at["C1"] + 1
        assert len(clean) == 17 and [clean.count(w) for w in (a, b, c, d)] == [
            2,
            1,
            1,
            1,
        ]  # the second part does not give it away
        assert [i for i, (x, y) in enumerate(zip(clean, corrupt, strict=True)) if x != y] == sorted(
            (at["A1"], at["C1"])
        )
        assert corrupt[corrupt.index(a) + 1] == d  # in the corrupt prompt the foil is right


def test_the_hand_set_induction_model_does_the_induction_task():
    model = zoo.induction().model
    found = tasks.check(model, tasks.induction(model, 16))
    assert found.accuracy == 1.0 and found.mean_logit_diff == pytest.approx(20, abs=1e-3)
    assert tasks.check(model, zoo.induction().pairs(16)).accuracy == 1.0


def test_induction_says_what_a_tokenizer_lacks():
    with pytest.raises(TaskError, match=r"needs 24 lower-case words .* only 3 among its 7 tokens"):
        tasks.induction(StandIn(["one", "two", "three"]))


# ---------------------------------------------------------------- facts


def fact_words():
    facts = known_facts.all_facts()
    return [w for f in facts for w in (f.prompt + f.answer).split()]


def test_the_list_of_facts():
    facts = known_facts.all_facts()
    assert len(facts) >= 60 and len({f.prompt for f in facts}) == len(facts)
    for f in facts:
        start, stop = f.subject_span
        assert f.prompt[start:stop] == f.subject and stop < len(f.prompt)  # the last token is not the subject's
        assert f.answer.startswith(" ") and len(f.answer.split()) == 1
        assert f.answer.strip() not in f.prompt.split()


def test_facts_are_those_the_model_knows():
    answers = {f.prompt: f.answer.strip() for f in known_facts.all_facts()}
    model = StandIn(fact_words(), lambda words: answers[" ".join(words)] if "capital" in words else "France")
    found = tasks.facts(model)
    assert found and all("capital" in f.prompt or f.answer == " France" for f in found)
    assert len(found) + len(found.dropped) == len(answers)
    assert tasks.check(model, found).accuracy == 1.0
    some = tasks.facts(model, 5, seed=1)
    assert len(some) == 5 and some == tasks.facts(model, 5, seed=1) != tasks.facts(model, 5, seed=2)
    assert encode_facts(some, model.coder)[0].spans["subject"]


def test_fact_pairs_are_split_by_fact():
    answers = {f.prompt: f.answer.strip() for f in known_facts.all_facts()}
    model = StandIn(fact_words(), lambda words: answers[" ".join(words)])
    sides = [tasks.fact_pairs(model, 20, split=split) for split in ("train", "test")]
    train, test = ({p.clean for p in pairs} | {p.corrupt for p in pairs} for pairs in sides)
    assert len(train) > len(test) > 8 and not train & test


def test_facts_whose_answer_is_not_a_token_are_dropped_and_counted():
    answers = {f.prompt: f.answer.strip() for f in known_facts.all_facts()}
    words = [w for w in fact_words() if w not in ("Paris", "Rome")]
    found = tasks.facts(StandIn(words, lambda words: answers.get(" ".join(words), "none")))
    gone = {p for p, why in found.dropped.items() if why == known_facts.NOT_A_TOKEN}
    assert gone == {p for p, a in answers.items() if a in ("Paris", "Rome")}


def test_facts_refuses_when_too_few_are_known():
    model = StandIn(fact_words(), lambda words: "Paris")
    with pytest.raises(TaskError, match=r"knows \d+ of the \d+ facts, and 50 were asked for: \d+ left out"):
        tasks.facts(model, 50)
    with pytest.raises(TaskError, match="knows 0 of"):
        tasks.facts(StandIn(["a"]))


# ---------------------------------------------------------------- check


def test_check_reports_accuracy_difference_and_interval(reader):
    good = tasks.check(reader, tasks.ioi(reader, 20))
    assert (good.n, good.accuracy, good.mean_logit_diff, good.interval) == (20, 1.0, 5.0, (5.0, 5.0))
    assert good.require() is good and "accuracy 100.0%" in str(good) and good.task == "ioi"
    wrong = [PromptPair(p.clean, p.corrupt, p.foil, p.answer) for p in tasks.ioi(reader, 20)]
    mixed = tasks.check(reader, [*wrong[:5], *tasks.ioi(reader, 15)])
    assert mixed.accuracy == 0.75 and mixed.mean_logit_diff == pytest.approx(2.5)
    lo, hi = mixed.interval
    half = 1.96 * np.std([-5] * 5 + [5] * 15) / math.sqrt(20)  # normal theory, to within the bootstrap's grain
    assert lo == pytest.approx(2.5 - half, abs=0.6) and hi == pytest.approx(2.5 + half, abs=0.6)


def test_check_without_a_foil_means_top_1(reader):
    pair = tasks.ioi(reader, 1)[0]
    assert tasks.check(reader, PromptPair(pair.clean, pair.corrupt, pair.answer)).accuracy == 1.0
    one = tasks.check(reader, PromptPair(pair.clean, pair.corrupt, pair.foil))
    assert one.accuracy == 0.0 and all(map(math.isnan, one.interval))


def test_a_model_that_fails_the_task_is_stopped_with_the_numbers():
    silent = Punctuated(english())
    with pytest.raises(TaskError, match=r"stand-in does not do the task 'ioi': .* 0.0% of 8 prompts .* 0.00"):
        tasks.check(silent, tasks.ioi(silent, 8)).require(min_accuracy=0.9)


def test_check_refuses_nothing_and_mixtures(reader):
    with pytest.raises(PromptError, match="no prompt pairs"):
        tasks.check(reader, [])
    with pytest.raises(PromptError, match="mixture"):
        tasks.check(reader, [PromptPair("a", "b", " c"), Fact("a b", "a", " c")])  # type: ignore[list-item]


def test_importing_tasks_does_not_import_the_heavy_libraries():
    code = "import sys, json, interp.tasks, interp.zoo; print(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert not {"transformers", "transformer_lens", "tokenizers"} & set(json.loads(done.stdout))


# ---------------------------------------------------------------- the real model


@pytest.fixture(scope="module")
def smollm2():
    import interp

    return interp.load("smollm2")


@pytest.mark.model
@pytest.mark.parametrize("corruption", ["swap", "abc"])
def test_smollm2_does_ioi(smollm2, corruption):
    pairs = tasks.ioi(smollm2, 64, 0, corruption=corruption)
    found = tasks.check(smollm2, pairs)
    assert found.accuracy >= 0.95 and found.interval[0] > 3
    assert {len(e.clean) - len(e.corrupt) for e in encode_pairs(pairs, smollm2.coder)} == {0}


@pytest.mark.model
def test_smollm2_does_induction(smollm2):
    found = tasks.check(smollm2, tasks.induction(smollm2, 64, 0)).require(0.95)
    assert found.interval[0] > 5


@pytest.mark.model
def test_smollm2_knows_facts(smollm2):
    found = tasks.facts(smollm2)
    assert len(found) >= 60 and tasks.check(smollm2, found).accuracy == 1.0
