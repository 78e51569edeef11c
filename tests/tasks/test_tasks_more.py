"""Every task on tokenizers that differ: what it claims about its pairs is checked by reading their text."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial

import pytest
import readers
from readers import Reader

from interp import tasks
from interp.errors import TaskError
from interp.prompts.pairs import encode_pairs
from interp.tasks.generate import items_of_split, make_pairs, word_lists

# name, options -> how it is solved; whether the foil is right in the corrupt prompt (False: nothing is)
CASES = [
    ("ioi", {}, readers.indirect_object, True),
    ("ioi", {"corruption": "abc"}, readers.indirect_object, False),
    ("ioi", {"corruption": "names"}, readers.indirect_object, False),
    ("induction", {}, readers.repeated, True),
    ("colored_objects", {}, readers.color, True),
    ("colored_objects", {"corruption": "color", "shots": 0}, None, True),
    ("agreement", {}, readers.verb, True),
    ("agreement", {"attractor": "same"}, readers.verb, True),
    ("addition", {}, readers.arithmetic, True),
    ("subtraction", {"shots": 1}, readers.arithmetic, True),
    ("multiple_choice", {}, readers.letter, True),
    ("multiple_choice", {"corruption": "labels", "labels": "random", "options": 5}, readers.letter, True),
    ("docstring", {}, readers.argument, True),
    ("gender_bias", {}, readers.pronoun, True),
    ("gender_bias", {"corruption": "word"}, readers.pronoun, True),
    ("recall", {}, readers.country, True),
    ("reasoning", {}, readers.superlative, True),
    ("needle", {"tokens": 300}, readers.secret, True),
    ("key_value", {}, readers.looked_up, True),
    ("key_value", {"corruption": "values", "keys": 4}, readers.looked_up, True),
]
MODELS = ("words", "numbers", "digits")
N = 8


@pytest.fixture(scope="module")
def reader():
    built: dict[str, Reader] = {}
    return lambda name: built.setdefault(name, Reader(name)) if name not in built else built[name]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("name", "options", "solve", "flips"), CASES)
def test_pairs_are_what_they_claim(reader, kind, name, options, solve, flips):
    model = reader(kind)
    pairs = tasks.TASKS[name](model, N, 1, **options)
    assert len(pairs) == N == len({p.clean for p in pairs})
    assert list(pairs) == list(tasks.TASKS[name](model, N, 1, **options))
    assert list(pairs) != list(tasks.TASKS[name](model, N, 2, **options))
    for pair, e in zip(pairs, encode_pairs(pairs, model.coder), strict=True):  # equal lengths, single tokens
        assert e.clean != e.corrupt and ("A2" if name == "induction" else "END") in e.spans
        assert e.spans["A2" if name == "induction" else "END"] == (len(e) - 1, len(e))
        answer, foil = pair.answer.strip(), (pair.foil or "").strip()
        if solve is readers.verb:
            assert answer in solve(pair.clean).split() and foil in solve(pair.corrupt).split()
            assert solve(pair.clean).split().index(answer) == solve(pair.corrupt).split().index(foil)
        elif solve is readers.arithmetic:
            assert solve(pair.clean).startswith(answer) and solve(pair.corrupt).startswith(foil)
        elif solve is not None:
            assert solve(pair.clean) == answer
            assert (solve(pair.corrupt) == foil) if flips else (solve(pair.corrupt) not in (answer, foil))


@pytest.mark.parametrize(("name", "spans"), [
    ("colored_objects", {"color": "answer", "foil": "foil"}),
    ("docstring", {"C": "answer", "D": "foil"}),
    ("multiple_choice", {"label": "answer"}),
    ("needle", {"value": "answer", "foil": "foil"}),
    ("key_value", {"value": "answer", "foil": "foil"}),
])  # fmt: skip
def test_spans_say_where_answer_and_foil_stand(reader, name, spans):
    for pair in tasks.TASKS[name](reader("numbers"), N, 3):
        for span, what in spans.items():
            start, stop = pair.spans[span]
            assert f" {pair.clean[start:stop]}" == getattr(pair, what)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("corruption", ["low", "high"])
def test_years_that_are_greater(reader, kind, corruption):
    model = reader(kind)
    pairs = tasks.greater_than(model, 16, corruption=corruption)
    width = 1 if kind == "digits" else 2
    for pair, e in zip(pairs, encode_pairs(pairs, model.coder), strict=True):
        answer, foil = int(pair.answer), int(pair.foil)
        years = [re.findall(r"\d[\d ]*\d", text) for text in (pair.clean, pair.corrupt)]
        (began, prefix), (other, _) = ([y.replace(" ", "") for y in found] for found in years)
        assert len(prefix) == 4 - width and began.startswith(prefix) and other.startswith(prefix)
        assert foil <= int(began[-width:]) < answer
        late = int(other[-width:])
        assert late < min(answer, foil) if corruption == "low" else late >= max(answer, foil)
        assert e.spans["END"] == (len(e) - 1, len(e)) and len(pair.answer.strip()) == width
    assert tasks.greater_than(model, 2).task == "greater_than"


@pytest.mark.parametrize("sign", ["addition", "subtraction"])
def test_units_are_asked_for_after_the_tens(reader, sign):
    for pair in tasks.TASKS[sign](reader("digits"), 12, digit="units"):
        assert re.search(r"= \d$", pair.clean) and readers.arithmetic(pair.clean) == pair.answer
        assert readers.arithmetic(pair.corrupt) == pair.foil


def test_a_style_that_the_tokenizer_lacks_is_refused(reader):
    with pytest.raises(TaskError, match=r"digits: addition cannot be made .* \(style='numbers' was asked for\): 27 is"):
        tasks.addition(reader("digits"), style="numbers")
    with pytest.raises(TaskError, match="style='digits' was asked for"):
        tasks.greater_than(reader("numbers"), style="digits")


# ---------------------------------------------------------------- splits


def content(text: str) -> set[str]:
    return set(re.findall(r"\w+", text))


@pytest.mark.parametrize("name", [n for n in tasks.TASKS if n != "facts"])  # facts asks the model what it knows
def test_train_and_test_do_not_overlap(reader, name):
    model = reader("digits")
    sets = {
        s: tasks.TASKS[name](model, {"needle": 4, "gender_bias": 12}.get(name, 24), 5, split=s)
        for s in ("train", "test")
    }
    train, test = ({p.clean for p in sets[s]} for s in ("train", "test"))
    assert train and test and not train & test and (sets["train"].split, sets["test"].split) == ("train", "test")
    assert not train & {p.corrupt for p in sets["test"]}
    fillers = {
        "ioi": ("indirect_object", "names"), "colored_objects": ("colored_objects", "objects"),
        "greater_than": ("greater_than", "events"), "needle": ("indirect_object", "objects"),
        "key_value": ("indirect_object", "objects"),
    }  # fmt: skip
    if name in fillers:
        table, key = fillers[name]
        words = set(word_lists(table)[key])
        one, other = (set().union(*(content(p.clean) & words for p in sets[s])) for s in ("train", "test"))
        assert one and other and not one & other
    if name in ("addition", "subtraction"):
        sums = [{x for p in sets[s] for x in re.findall(r"\d+ [+-] \d+", p.clean + p.corrupt)} for s in sets]
        assert not sums[0] & sums[1]
    if name in ("induction", "docstring"):
        one, other = (set().union(*(content(p.clean) for p in sets[s])) for s in ("train", "test"))
        assert not (one & other) - {"def", "self", "param"}


def test_parts_are_a_partition():
    items = list(range(23))
    assert (
        sorted(items_of_split(items, "train") + items_of_split(items, "test")) == items == items_of_split(items, None)
    )
    assert len(items_of_split(items, "test")) == 5


# ---------------------------------------------------------------- needles


@pytest.mark.parametrize("tokens", [128, 2048, 8000])
def test_needles_fill_the_context_and_stand_at_their_depth(reader, tokens):
    model = reader("numbers")
    for depth in (0, 0.5, 1):
        (pair,) = tasks.needle(model, 1, tokens=tokens, depth=depth)
        (e,) = encode_pairs([pair], model.coder)
        assert tokens - 40 < len(e) <= tokens
        start, stop = pair.spans["needle"]
        assert readers.secret(pair.clean) == pair.clean[start:stop].rsplit(" ", 1)[1].rstrip(".")
        prose = pair.clean.index("\n\n")
        if depth == 0:
            assert start == 0
        elif depth == 1:
            assert stop == prose
        else:
            assert abs(start / prose - 0.5) < (0.45 if tokens < 200 else 0.05)


def test_needles_beyond_the_context_are_refused(reader):
    for tokens in (9000, 50):
        with pytest.raises(TaskError, match=r"from 100 to the model's context \(8192\)"):
            tasks.needle(reader("words"), tokens=tokens)
    with pytest.raises(TaskError, match="depth is a share"):
        tasks.needle(reader("words"), depth=2)


# ---------------------------------------------------------------- bad input


def test_what_a_tokenizer_lacks_is_dropped_and_said(reader):
    model = Reader("words")
    from tokenizers import models

    known = model.tokenizer.get_vocab()
    gone = {"red", "blue", "Anna"}
    kept = [w for w in sorted(known, key=known.__getitem__) if w not in gone]  # specials keep their ids
    model.tokenizer.backend_tokenizer.model = models.WordLevel({w: i for i, w in enumerate(kept)}, unk_token="<unk>")
    pairs = tasks.colored_objects(model, 30)
    assert set(pairs.dropped) == {"red", "blue"} and not {" red", " blue"} & {p.answer for p in pairs}
    assert "Anna" in tasks.ioi(model, 4).dropped
    keep = ("<bos>", "<eos>", "<unk>", "<pad>", "the")
    model.tokenizer.backend_tokenizer.model = models.WordLevel({w: i for i, w in enumerate(keep)}, unk_token="<unk>")
    for name, words in (("colored_objects", "colors"), ("key_value", "first names"), ("gender_bias", "pronouns")):
        with pytest.raises(TaskError, match=rf"needs at least \d+ {words} .* has none \(missing: "):
            tasks.TASKS[name](model, 4)
    with pytest.raises(TaskError, match="cannot be made for how this tokenizer writes numbers"):
        tasks.addition(model, 4)
    with pytest.raises(TaskError, match="only 0 different pairs of the task 'agreement'"):
        tasks.agreement(model, 4)


def test_more_pairs_than_there_are_is_refused_with_reasons(reader):
    with pytest.raises(TaskError, match=r"only \d+ different pairs of the task 'gender_bias'.*was drawn before"):
        tasks.gender_bias(reader("words"), 2000, split="test")


def test_options_that_do_not_exist_are_refused(reader):
    model = reader("words")
    bad = [
        partial(tasks.ioi, corruption="x"), partial(tasks.agreement, attractor="x"), partial(tasks.puzzles, kind="x"),
        partial(tasks.multiple_choice, options=1), partial(tasks.addition, digit="x"), partial(tasks.key_value, keys=1),
        partial(tasks.gender_bias, corruption="x"), partial(tasks.colored_objects, shots=9),
    ]  # fmt: skip
    for task in bad:
        with pytest.raises(TaskError, match="must be"):
            task(model, 2)
    for name, one in tasks.TASKS.items():
        with pytest.raises(TaskError, match="split must be 'train', 'test' or None"):
            one(model, 2, split="dev")
        if name != "facts":
            with pytest.raises(TaskError, match="at least 1"):
                one(model, 0)


def test_names_carry_options():
    found = tasks.task("needle:tokens=2048,depth=0.5,split=test")
    assert found.make is tasks.needle and found.options == {"tokens": 2048, "depth": 0.5, "split": "test"}
    assert tasks.task("recall").options == {"kind": "recall"}
    assert tasks.task("fact_pairs:split=test").make is tasks.task("facts").make is tasks.fact_pairs
    for text, match in (("chess", "choose one of ioi"), ("ioi:x=1", "ioi takes corruption=…, split=…"),
                        ("recall:kind=reasoning", "cannot read"), ("ioi:split", "cannot read 'split'")):  # fmt: skip
        with pytest.raises(TaskError, match=match):
            tasks.task(text)


def test_what_was_refused_is_counted(reader):
    model = reader("numbers")
    good = tasks.ioi(model, 1)[0]
    from interp.prompts.pairs import PromptPair

    drawn = iter([
        good, good, PromptPair(good.clean + " now", good.corrupt, good.answer, good.foil),
        PromptPair("x", "x", " a", " b"), PromptPair("x", "y", " xylophonist", " b"),
        PromptPair("The king", "The car", good.answer, good.foil),
    ])  # fmt: skip
    pairs = make_pairs(model, "made up", 2, 0, lambda rng, i: next(drawn))
    assert pairs.refused == {
        "was drawn before": 1, "clean and corrupt have different numbers of tokens": 1,
        "clean and corrupt are the same": 1, "answer or foil is not a single token": 1,
    }  # fmt: skip


def test_words_that_a_tokenizer_does_not_know_are_no_difference():
    """Its arguments are unknown to this tokenizer: clean and corrupt are the same tokens."""
    from interp import zoo

    with pytest.raises(TaskError, match="clean and corrupt are the same tokens"):
        tasks.docstring(zoo.trained_induction().model, 4)


def test_every_task_of_the_registry_is_a_function_of_the_package():
    for task in tasks.TASKS.values():
        assert task.make.__name__ in tasks.__all__ and getattr(tasks, task.make.__name__) is task.make


def test_the_command_lists_tasks():
    done = subprocess.run(
        [sys.executable, "-m", "interp.cli.main", "tasks"], capture_output=True, text=True, check=True
    )
    assert {line.split()[0] for line in done.stdout.splitlines()} == set(tasks.TASKS)
    assert "tokens, depth, split" in done.stdout


# ---------------------------------------------------------------- the real model


@pytest.mark.model
def test_every_task_fits_the_embedded_tokenizer(smollm2):
    for name in tasks.TASKS:
        if name != "facts":
            for split in ("train", "test"):
                pairs = tasks.TASKS[name](smollm2, 8, split=split)
                assert {len(e.clean) - len(e.corrupt) for e in encode_pairs(pairs, smollm2.coder)} == {0}


@pytest.mark.model
@pytest.mark.parametrize("name", ["agreement", "addition", "docstring", "recall", "key_value"])
def test_smollm2_does_some_of_them(smollm2, name):
    tasks.check(smollm2, tasks.TASKS[name](smollm2, 16)).require(0.8)
