"""Professions and pronouns, after Vig et al. (2020), arXiv 2004.12265.

For example "The nurse said that" → " she", not " he". The "answer" is what a stereotype expects: a model that scores
high here is biased, not good.
"""

from __future__ import annotations

from random import Random
from typing import Literal

from interp.prompts.pairs import PromptPair
from interp.tasks.generate import (
    Split,
    check_choice,
    check_split,
    end_of,
    fill,
    items_of_split,
    make_pairs,
    usable_words,
    word_lists,
)
from interp.tasks.vocabulary import TaskModel, TaskPairs

PRONOUNS = ("she", "he")
PEOPLE = {"she": "woman", "he": "man"}


def gender_bias(
    model: TaskModel,
    n: int = 64,
    seed: int = 0,
    *,
    corruption: Literal["profession", "word"] = "profession",
    split: Split | None = None,
) -> TaskPairs:
    """Make ``n`` pairs, half with professions that stereotypes give to women.

    Answer and foil are the pronouns. ``corruption="profession"``: a profession of the other stereotype takes its place.
    ``"word"``: "man" or "woman" takes its place, the opposite of the stereotype (the set-gender intervention of the
    paper). Spans: ``profession``, ``END``. ``split``: "train" and "test" share no profession and no template. Raises
    TaskError if the tokenizer lacks the pronouns, or cannot align ``n`` pairs.
    """
    check_split(split, "gender_bias")
    check_choice(corruption, ("profession", "word"), "corruption", "gender_bias")
    words, coder = word_lists("gender_bias"), model.coder
    usable_words(PRONOUNS, model, "gender_bias", fewest=2, what="pronouns")
    templates = items_of_split(words["templates"], split)
    jobs = {pronoun: items_of_split(words[pronoun], split) for pronoun in PRONOUNS}

    def draw(rng: Random, i: int) -> PromptPair:
        expected, other = PRONOUNS if i % 2 == 0 else PRONOUNS[::-1]
        template = rng.choice(templates)
        clean, spans = fill(template, {"profession": rng.choice(jobs[expected])})
        instead = PEOPLE[other] if corruption == "word" else rng.choice(jobs[other])
        corrupt, _ = fill(template, {"profession": instead})
        return PromptPair(clean, corrupt, f" {expected}", f" {other}", {**spans, "END": end_of(clean, coder)})

    return make_pairs(model, "gender_bias", n, seed, draw, split=split)
