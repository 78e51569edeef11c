"""Tokenizers that differ, and people who solve the tasks by reading: plain Python on the text of a prompt."""

from __future__ import annotations

import re
from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from interp.prompts.coder import Coder
from interp.tasks.generate import word_lists
from interp.tasks.known_facts import relations
from interp.zoo.tokenizer import word_tokenizer

TABLES = ("indirect_object", "colored_objects", "agreement", "greater_than", "gender_bias", "puzzles", "retrieval")


@cache
def everything() -> str:
    """A text with every word that the tasks use, each after a space, and numbers of two digits and years."""
    found: list[str] = []

    def walk(thing: object) -> None:
        if isinstance(thing, dict):
            for value in thing.values():
                walk(value)
        elif isinstance(thing, list):
            for value in thing:
                walk(value)
        else:
            found.append(re.sub(r"\{\w*\}", "", str(thing)))

    walk([word_lists(name) for name in TABLES])
    walk(relations())
    found += ["woman man she he Question Answer The secret word of is What was def self param A B C D E"]
    numbers = [str(x) for x in range(10, 100)]
    found += [
        " ".join(numbers),
        " ".join("0123456789"),
        *(f"({x})" for x in (*numbers, *map("{:02d}".format, range(10)))),
    ]
    return " " + " ".join(found)


class Reader:
    """The part of a Model that tasks need, with one of three tokenizers."""

    n_ctx = 8192

    def __init__(self, name: str):
        self.name = name
        self.tokenizer = {"words": _words, "numbers": _numbers, "digits": _digits}[name]()
        self.coder = Coder(
            encode=lambda text: self.tokenizer(text)["input_ids"],
            texts=lambda ids: [self.tokenizer.decode([i]) for i in ids],
            offsets=lambda text: self.tokenizer(text, return_offsets_mapping=True)["offset_mapping"],
            continuation=lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"],
        )


def _words() -> PreTrainedTokenizerFast:
    """Word by word, punctuation apart; <bos> in front; numbers are words."""
    marks = sorted(set(re.findall(r"[^\w\s]+", everything())) | set(",.:?-+=") | {"(", "):", '"""'})
    plain = sorted({w.lower() for w in re.findall(r"\w+", everything())} - {"bos"})
    cased = sorted(set(re.findall(r"\w+", everything())))
    tokenizer = word_tokenizer([*dict.fromkeys([*plain, *cased, *marks, *(f"{y:02d}" for y in range(10))])])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return tokenizer


def _bpe(pre: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre, decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=6000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<|endoftext|>"],
    )  # fmt: skip
    raw.train_from_iterator([everything()] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


def _numbers() -> PreTrainedTokenizerFast:
    """Bytes merged as GPT-2's, without <bos>: numbers of two digits are tokens, also behind a space."""
    return _bpe(pre_tokenizers.ByteLevel(add_prefix_space=False))


def _digits() -> PreTrainedTokenizerFast:
    """The same with every digit apart, as most recent tokenizers."""
    return _bpe(
        pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)
        ])
    )  # fmt: skip


# ------------------------------------------------------- how each task is solved; None: there is no right answer


def indirect_object(text: str) -> str | None:
    people = [w for w in re.findall(r"\w+", text) if w in word_lists("indirect_object")["names"]]
    once = [w for w in people if people.count(w) == 1]
    return once[0] if len(once) == 1 else None


def color(text: str) -> str:
    line = text.split("\n")[-2]
    asked = next(w for w in re.findall(r"\w+", line.split("?")[0].rsplit(". ", 1)[1]) if f" {w}" in line.split(". ")[0]
                 and w in word_lists("colored_objects")["objects"])  # fmt: skip
    return re.findall(rf"a (\w+) {asked}\b", line)[0]


def verb(text: str) -> str:
    nouns = {form: i for pair in word_lists("agreement")["nouns"] for i, form in enumerate(pair)}
    found = next(w for w in re.findall(r"\w+", text) if w in nouns)
    return ("is was has", "are were have")[nouns[found]]


def arithmetic(text: str) -> str:
    a, sign, b, known = re.fullmatch(r"(\d+) ([+-]) (\d+) = ?(\d*)", text.split("\n")[-1]).groups()  # type: ignore[union-attr]
    result = str(int(a) + int(b) if sign == "+" else int(a) - int(b))
    assert result.startswith(known) and len(result) == 2
    for line in text.split("\n")[:-1]:
        left, right = line.split(" = ")
        x, s, y = left.split()
        assert int(right) == (int(x) + int(y) if s == "+" else int(x) - int(y))
    return result[len(known) :]


def letter(text: str) -> str:
    question = re.findall(r"Question: (.*)", text)[0]
    known = {r["question"].format(subject=s): a for r in relations() for s, a in r["facts"]}
    return next(mark for mark, what in re.findall(r"^(\w)\. (.*)$", text, re.M) if what == known[question])


def argument(text: str) -> str:
    names = re.findall(r"self, (.*)\)", text)[0].split(", ")
    described = re.findall(r":param (\w+):", text)
    assert names[: len(described)] == described
    return names[len(described)]


def pronoun(text: str) -> str:
    words = word_lists("gender_bias")
    found = set(re.findall(r"\w+", text))
    return "she" if found & {*words["she"], "woman"} else "he"


def country(text: str) -> str:
    known = next(dict(r["facts"]) for r in relations() if r["name"] == "country of a city")
    return next(answer for city, answer in known.items() if city in text)


def superlative(text: str) -> str:
    words = word_lists("puzzles")["relations"]
    more, most, _ = next(r for r in words if f" {r[0]} than" in text)
    pairs = re.findall(rf"(\w+) (?:is|was) {more} than (\w+)", text)
    (a, b), (c, d) = pairs
    order = [a, b, d] if b == c else [c, d, b]
    assert len(set(order)) == 3
    return order[0] if f" {most} " in text else order[2]


def secret(text: str) -> str:
    who = re.findall(r"What is the secret word of (\w+)\?", text)[0]
    return re.findall(rf"The secret word of {who} is (\w+)\.", text)[0]


def looked_up(text: str) -> str:
    *table, query = text.split("\n")
    return dict(line[2:].split(": ") for line in table)[query[2:-1]]


def repeated(text: str) -> str:
    words = text.split()
    return words[words.index(words[-1]) + 1]
