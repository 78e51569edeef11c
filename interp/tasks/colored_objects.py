"""Colored objects: three things of three colors, and a question about one of them.

After the task of BIG-bench that Merullo et al. (2024), arXiv 2310.08744, compare with IOI, with one solved example in
front: "Q: On the table, I see a red cup, a blue pen, and a black hat. What color is the pen?\\nA:" → " blue".
"""

from __future__ import annotations

from random import Random
from typing import Literal

from interp.prompts.pairs import PromptPair
from interp.tasks.generate import Split, check_choice, check_split, end_of, fill, lists, make, part, usable
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
    """``n`` pairs about the color of one of three things; the foil is the color of another one.

    ``corruption="object"``: the other thing is asked for. ``"color"``: the two things exchange their colors. Either way
    answer and foil change roles. ``shots`` (0 to 8) solved examples of the same template stand in front, the same in
    both prompts. Spans: ``object`` and ``color`` (of what is asked for, in the list), ``foil`` (the other color),
    ``asked`` (the thing in the question), ``END``. ``split``: "train" and "test" share no object and no template.
    Raises TaskError if the tokenizer lacks colors, or cannot align ``n`` pairs.
    """
    check_split(split, "colored_objects")
    check_choice(corruption, ("object", "color"), "corruption", "colored_objects")
    check_choice(shots, range(MOST_SHOTS + 1), "shots", "colored_objects")
    words, coder = lists("colored_objects"), model.coder
    colors, dropped = usable(words["colors"], model, "colored_objects", fewest=3, what="colors")
    templates, objects = part(words["templates"], split), part(words["objects"], split)

    def draw(rng: Random, i: int) -> PromptPair:
        template = rng.choice(templates)
        solved = [_example(rng, colors, objects) for _ in range(shots)]
        head = "".join(fill(template, slots)[0] + f" {slots[_color_of(slots)]}\n" for slots in solved)
        slots = _example(rng, colors, objects)
        here = _color_of(slots)
        there = rng.choice([c for c in ("c1", "c2", "c3") if c != here])
        if corruption == "object":
            change = {"asked": slots["o" + there[1]]}
        else:
            change = {here: slots[there], there: slots[here]}
        clean, where = fill(head + template, slots)
        corrupt, _ = fill(head + template, {**slots, **change})
        spans = {
            "object": where["o" + here[1]], "color": where[here], "foil": where[there], "asked": where["asked"],
            "END": end_of(clean, coder),
        }  # fmt: skip
        return PromptPair(clean, corrupt, f" {slots[here]}", f" {slots[there]}", spans)

    return make(model, "colored_objects", n, seed, draw, split=split, dropped=dropped)


def _example(rng: Random, colors: list[str], objects: list[str]) -> dict[str, str]:
    """Three things of three colors, and which of them is asked for."""
    color, thing = rng.sample(colors, 3), rng.sample(objects, 3)
    slots = {f"c{i}": c for i, c in enumerate(color, 1)} | {f"o{i}": o for i, o in enumerate(thing, 1)}
    return {**slots, "asked": rng.choice(thing)}


def _color_of(slots: dict[str, str]) -> str:
    """The slot of the color that is right."""
    return next(f"c{i}" for i in "123" if slots[f"o{i}"] == slots["asked"])
