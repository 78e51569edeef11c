"""Colored objects: three things of three colors, and a question about one of them.

After the BIG-bench task that Merullo et al. (2024), arXiv 2310.08744, compare with IOI; one solved example precedes it:
"Q: On the table, I see a red cup, a blue pen, and a black hat. What color is the pen?\\nA:" → " blue".
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

MOST_SHOTS = 8


def colored_objects(
    model: TaskModel,
    n: int = 64,
    seed: int = 0,
    *,
    corruption: Literal["object", "color"] = "object",
    shots: int = 1,
    split: Split | None = None,
) -> TaskPairs:
    """Make ``n`` pairs about the color of one of three things.

    The foil is the color of another one. ``corruption="object"``: the question is about the other thing. ``"color"``:
    the two things exchange their colors. Either way answer and foil change roles. ``shots`` (0 to 8) solved examples of
    the same template come first, the same in both prompts. Spans: ``object`` and ``color`` (of the thing in the
    question, in the list), ``foil`` (the other color), ``asked`` (the thing in the question), ``END``. ``split``:
    "train" and "test" share no object and no template. Raises TaskError if the tokenizer lacks colors, or cannot align
    ``n`` pairs.
    """
    check_split(split, "colored_objects")
    check_choice(corruption, ("object", "color"), "corruption", "colored_objects")
    check_choice(shots, range(MOST_SHOTS + 1), "shots", "colored_objects")
    words, coder = word_lists("colored_objects"), model.coder
    colors, dropped = usable_words(words["colors"], model, "colored_objects", fewest=3, what="colors")
    templates, objects = items_of_split(words["templates"], split), items_of_split(words["objects"], split)

    def draw(rng: Random, i: int) -> PromptPair:
        template = rng.choice(templates)
        solved = [_example(rng, colors, objects) for _ in range(shots)]
        head = "".join(fill(template, slots)[0] + f" {slots[_color_of(slots)]}\n" for slots in solved)
        slots = _example(rng, colors, objects)
        right = _color_of(slots)
        wrong = rng.choice([c for c in ("c1", "c2", "c3") if c != right])
        if corruption == "object":
            change = {"asked": slots["o" + wrong[1]]}
        else:
            change = {right: slots[wrong], wrong: slots[right]}
        clean, ranges = fill(head + template, slots)
        corrupt, _ = fill(head + template, {**slots, **change})
        spans = {
            "object": ranges["o" + right[1]], "color": ranges[right], "foil": ranges[wrong], "asked": ranges["asked"],
            "END": end_of(clean, coder),
        }  # fmt: skip
        return PromptPair(clean, corrupt, f" {slots[right]}", f" {slots[wrong]}", spans)

    return make_pairs(model, "colored_objects", n, seed, draw, split=split, dropped=dropped)


def _example(rng: Random, colors: list[str], objects: list[str]) -> dict[str, str]:
    """Draw three things of three colors, and the one in the question."""
    color, thing = rng.sample(colors, 3), rng.sample(objects, 3)
    slots = {f"c{i}": c for i, c in enumerate(color, 1)} | {f"o{i}": o for i, o in enumerate(thing, 1)}
    return {**slots, "asked": rng.choice(thing)}


def _color_of(slots: dict[str, str]) -> str:
    """The slot of the right color."""
    return next(f"c{i}" for i in "123" if slots[f"o{i}"] == slots["asked"])
