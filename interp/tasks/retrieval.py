"""Retrieval tasks: find something in the context.

A needle in 500 to 8,000 tokens of prose, or the value of a key in a list.
"""

from __future__ import annotations

from random import Random
from typing import Literal

from interp.errors import TaskError
from interp.prompts.coder import Coder
from interp.prompts.pairs import PromptPair
from interp.tasks.generate import (
    Split,
    check_choice,
    check_split,
    end_of,
    make_pairs,
    span_of,
    usable_words,
    word_lists,
)
from interp.tasks.vocabulary import TaskModel, TaskPairs

FEWEST_TOKENS = 100
MOST_KEYS = 16


def needle(
    model: TaskModel,
    n: int = 16,
    seed: int = 0,
    *,
    tokens: int = 512,
    depth: float | None = None,
    split: Split | None = None,
) -> TaskPairs:
    """Make ``n`` long prompts in which one sentence matters.

    They have at most ``tokens`` tokens, and at most a sentence less. Two sentences, "The secret word of Anna is apple."
    and another person's, stand in random prose; the question at the end is about Anna's word. The needle stands at the
    share ``depth`` of the prose (0: first, 1: last; default: anywhere), the other person's sentence anywhere. In the
    corrupt prompt the two have exchanged their words, so that answer and foil change roles. Spans: ``needle`` (the
    sentence), ``value`` (its word), ``foil`` (the other's word), ``question``, ``END``. ``split``: "train" and "test"
    share no secret word and no person. Raises TaskError for tokens below 100 or beyond the model's context, and for a
    tokenizer without the words.
    """
    check_split(split, "needle")
    if depth is not None and not (isinstance(depth, int | float) and 0 <= depth <= 1):
        raise TaskError(f"needle: depth is a share of the text from 0 to 1, got {depth!r}")
    limit = getattr(model, "n_ctx", None)
    if not isinstance(tokens, int) or not tokens >= FEWEST_TOKENS or (limit is not None and tokens > limit):
        raise TaskError(f"needle: tokens must be from {FEWEST_TOKENS} to the model's context ({limit}), got {tokens!r}")
    coder = model.coder
    names, dropped_names = usable_words(
        word_lists("indirect_object")["names"], model, "needle", fewest=2, what="first names", split=split
    )  # fmt: skip
    secrets, dropped_secrets = usable_words(
        word_lists("indirect_object")["objects"], model, "needle", fewest=2, what="things", split=split
    )  # fmt: skip

    def draw(rng: Random, i: int) -> PromptPair:
        (who, other), (word, foil) = rng.sample(names, 2), rng.sample(secrets, 2)
        question = f"Question: What is the secret word of {who}?\nAnswer: The secret word of {who} is"
        templates = [f"The secret word of {who} is {{}}.", f"The secret word of {other} is {{}}."]
        prose = _prose(
            rng, tokens, " ".join([templates[0].format(word), templates[1].format(foil)]) + f"\n\n{question}", coder
        )
        place = round(len(prose) * (rng.random() if depth is None else depth))
        sentences = [*prose[:place], templates[0], *prose[place:]]
        far = rng.randrange(len(sentences) + 1)
        far += depth == 0 and far == 0
        far -= depth == 1 and far == len(sentences)
        sentences.insert(far, templates[1])

        def text(mine: str, theirs: str) -> str:
            words = {templates[0]: mine, templates[1]: theirs}
            return " ".join(s.format(words[s]) if s in words else s for s in sentences) + f"\n\n{question}"

        clean = text(word, foil)
        spans = {"needle": span_of(templates[0].format(word), clean), "question": span_of(question, clean)}
        start = span_of(templates[1].format(foil), clean)[1] - 1
        spans |= {
            "value": (spans["needle"][1] - 1 - len(word), spans["needle"][1] - 1), "foil": (start - len(foil), start),
            "END": end_of(clean, coder),
        }  # fmt: skip
        return PromptPair(clean, text(foil, word), f" {word}", f" {foil}", spans)

    return make_pairs(model, "needle", n, seed, draw, split=split, dropped=[*dropped_names, *dropped_secrets])


def _prose(rng: Random, tokens: int, rest: str, coder: Coder) -> list[str]:
    """Draw sentences until one more would exceed the limit.

    The limit is ``tokens`` tokens together with ``rest``.
    """
    words, sentences = word_lists("retrieval"), []
    while True:
        left = tokens - len(coder.encode(" ".join([*sentences, rest])))
        if left < 0:  # sentences may take more tokens together than one by one
            sentences.pop()
            return sentences
        before = len(sentences)
        while True:
            opening, who, deed, what = (rng.choice(words[k]) for k in ("openings", "people", "deeds", "things"))
            sentence = f"{opening} {who} {deed} {what}."
            left -= len(coder.continuation(f" {sentence}"))
            if left < 0:
                break
            sentences.append(sentence)
        if len(sentences) == before:
            return sentences


def key_value(
    model: TaskModel,
    n: int = 64,
    seed: int = 0,
    *,
    keys: int = 8,
    corruption: Literal["query", "values"] = "query",
    split: Split | None = None,
) -> TaskPairs:
    """Make ``n`` lists of people with a thing each, then one of them again.

    A list has ``keys`` (2 to 16) people: "Anna: apple". ``corruption="query"``: another person of the list stands at
    the end. ``"values"``: these two people exchange their things. Either way answer and foil change roles. Spans:
    ``key``, ``value`` (of the person at the end), ``foil`` (the other's thing), ``query``, ``END``. ``split``: "train"
    and "test" share no thing. Raises TaskError if the tokenizer lacks names or things.
    """
    check_split(split, "key_value")
    check_choice(keys, range(2, MOST_KEYS + 1), "keys", "key_value")
    check_choice(corruption, ("query", "values"), "corruption", "key_value")
    coder, words = model.coder, word_lists("indirect_object")
    names, dropped_names = usable_words(words["names"], model, "key_value", fewest=keys, what="first names")
    candidates = [*dict.fromkeys([*words["objects"], *words["places"]])]
    things, dropped_things = usable_words(candidates, model, "key_value", fewest=keys, what="things", split=split)

    def draw(rng: Random, i: int) -> PromptPair:
        people, values = rng.sample(names, keys), rng.sample(things, keys)
        mine, other = rng.sample(range(keys), 2)

        def text(values: list[str], query: str) -> str:
            lines = "".join(f"- {who}: {what}\n" for who, what in zip(people, values, strict=True))
            return f"{lines}- {query}:"

        clean = text(values, people[mine])
        exchanged = list(values)
        exchanged[mine], exchanged[other] = values[other], values[mine]
        corrupt = text(values, people[other]) if corruption == "query" else text(exchanged, people[mine])
        line, theirs = clean.index(f"- {people[mine]}: "), clean.index(f"- {people[other]}: ")
        spans = {
            "key": span_of(people[mine], clean, line), "value": span_of(values[mine], clean, line),
            "foil": span_of(values[other], clean, theirs), "query": span_of(people[mine], clean, clean.rindex("- ")),
            "END": end_of(clean, coder),
        }  # fmt: skip
        return PromptPair(clean, corrupt, f" {values[mine]}", f" {values[other]}", spans)

    return make_pairs(model, "key_value", n, seed, draw, split=split, dropped=[*dropped_names, *dropped_things])
