"""Professions and pronouns, after Vig et al. (2020), arXiv 2004.12265: "The nurse said that" → " she", not " he".

The "answer" is what a stereotype expects: a model that scores high here is biased, not good.
"""

from __future__ import annotations

from random import Random
from typing import Literal

from interp.prompts.pairs import PromptPair
from interp.tasks.generate import Split, check_choice, check_split, end_of, fill, lists, make, part, usable
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
    """``n`` pairs, half of them of professions that stereotypes give to women. Answer and foil are the two pronouns.

    ``corruption="profession"``: a profession of the other stereotype takes its place. ``"word"``: "man" or "woman"
    does, the opposite of the stereotype (the set-gender intervention of the paper). Spans: ``profession``, ``END``.
    ``split``: "train" and "test" share no profession and no template. Raises TaskError if the tokenizer lacks the
    pronouns, or cannot align ``n`` pairs.
    """
    check_split(split, "gender_bias")
    check_choice(corruption, ("profession", "word"), "corruption", "gender_bias")
    words, coder = lists("gender_bias"), model.coder
    usable(PRONOUNS, model, "gender_bias", fewest=2, what="pronouns")
    templates = part(words["templates"], split)
    jobs = {pronoun: part(words[pronoun], split) for pronoun in PRONOUNS}

    def draw(rng: Random, i: int) -> PromptPair:
        here, there = PRONOUNS if i % 2 == 0 else PRONOUNS[::-1]
        template = rng.choice(templates)
        clean, where = fill(template, {"profession": rng.choice(jobs[here])})
        instead = PEOPLE[there] if corruption == "word" else rng.choice(jobs[there])
        corrupt, _ = fill(template, {"profession": instead})
        return PromptPair(clean, corrupt, f" {here}", f" {there}", {**where, "END": end_of(clean, coder)})

    return make(model, "gender_bias", n, seed, draw, split=split)
