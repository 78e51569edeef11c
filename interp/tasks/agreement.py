"""Subject–verb agreement across an attractor (Linzen et al. 2016).

For example "The keys near the cabinet" → " are".
"""

from __future__ import annotations

from random import Random
from typing import Literal

from interp.prompts.pairs import PromptPair
from interp.tasks.generate import Split, check_choice, check_split, end_of, fill, items_of_split, make_pairs, word_lists
from interp.tasks.vocabulary import TaskModel, TaskPairs


def agreement(
    model: TaskModel,
    n: int = 64,
    seed: int = 0,
    *,
    attractor: Literal["opposite", "same"] = "opposite",
    split: Split | None = None,
) -> TaskPairs:
    """Make ``n`` pairs, half of them with a singular subject.

    The foil is the verb in the other number. Between subject and verb stands another noun, in the ``"opposite"`` number
    or the ``"same"`` one. In the corrupt prompt the subject has the other number, so that the foil is right. Spans:
    ``subject``, ``attractor``, ``END``. ``split``: "train" and "test" share no noun. Raises TaskError if the tokenizer
    cannot align ``n`` pairs: the two forms of a noun must have equally many tokens.
    """
    check_split(split, "agreement")
    check_choice(attractor, ("opposite", "same"), "attractor", "agreement")
    words, coder = word_lists("agreement"), model.coder
    nouns = items_of_split(words["nouns"], split)

    def draw(rng: Random, i: int) -> PromptPair:
        number = i % 2  # 0: singular
        template = f"{rng.choice(words['openings'])} {{subject}} {rng.choice(words['links'])} {{attractor}}"
        subject, other = rng.sample(nouns, 2)
        verb = rng.choice(words["verbs"])
        near = other[number if attractor == "same" else 1 - number]
        clean, spans = fill(template, {"subject": subject[number], "attractor": near})
        corrupt, _ = fill(template, {"subject": subject[1 - number], "attractor": near})
        spans["END"] = end_of(clean, coder)
        return PromptPair(clean, corrupt, f" {verb[number]}", f" {verb[1 - number]}", spans)

    return make_pairs(model, "agreement", n, seed, draw, split=split)
