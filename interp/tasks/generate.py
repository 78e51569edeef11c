"""How the tasks are made: drawn by seed, checked pair by pair against one tokenizer, and split for training and test.

A pair is kept if clean and corrupt have equally many tokens and differ, and answer and foil are single tokens and
differ; and if its clean prompt is not in the set already. What was drawn and not kept is counted by reason in the
result's ``refused``.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from random import Random
from string import Formatter
from typing import Any, Literal, TypeVar

from interp.errors import PromptError, TaskError
from interp.prompts.pairs import Coder, PromptPair, Span, token_spans
from interp.tasks.vocabulary import TaskModel, TaskPairs, at_least_one, single_tokens

Split = Literal["train", "test"]
Draw = Callable[[Random, int], PromptPair | str]  # a pair; or why this one cannot be made
T = TypeVar("T")

EVERY = 4  # of each list, this fraction's inverse is kept for the test
PATIENCE = 1000  # draws in a row that are refused before a task gives up


def make(
    model: TaskModel,
    task: str,
    n: int,
    seed: int,
    draw: Draw,
    *,
    split: Split | None = None,
    dropped: Sequence[str] = (),
    rng: Random | None = None,
) -> TaskPairs:
    """``n`` different pairs of ``draw(rng, number of pairs so far)`` that the tokenizer aligns.

    ``rng``: by default from task, seed and split.

    Raises TaskError, with the reasons, if there are not that many.
    """
    at_least_one(n, task)
    rng = rng or Random(f"{task}/{seed}" + (f"/{split}" if split else ""))
    found: dict[str, PromptPair] = {}
    refused: Counter[str] = Counter()
    tries = 0
    while tries < PATIENCE:
        pair = draw(rng, len(found))
        reason = pair if isinstance(pair, str) else _unwanted(pair, found, model.coder)
        if isinstance(pair, str) or reason:
            refused[reason] += 1
            tries += 1
            continue
        found[pair.clean], tries = pair, 0
        if len(found) == n:
            return TaskPairs(found.values(), task=task, seed=seed, dropped=dropped, split=split, refused=refused)
    why = ", ".join(f"{count} × {reason}" for reason, count in refused.most_common())
    raise TaskError(
        f"{model.name}: only {len(found)} different pairs of the task {task!r} could be made for this tokenizer, and "
        f"{n} were asked for; drawn and refused: {why}. Ask for fewer"
        + (", or leave split=None" if split else "")
        + ", or use another task."
    )


def _unwanted(pair: PromptPair, found: Mapping[str, PromptPair], coder: Coder) -> str:
    return "was drawn before" if pair.clean in found else unfit(pair, coder)


def unfit(pair: PromptPair, coder: Coder) -> str:
    """Why a pair cannot be used with a tokenizer; '' if it can."""
    if pair.clean == pair.corrupt:
        return "clean and corrupt are the same"
    one, other = (coder.continuation(t) for t in (pair.answer, pair.foil or ""))
    if len(one) != 1 or (pair.foil is not None and len(other) != 1):
        return "answer or foil is not a single token"
    if one == other:
        return "answer and foil are the same token"
    clean, corrupt = (coder.encode(t) for t in (pair.clean, pair.corrupt))
    if len(clean) != len(corrupt):
        return "clean and corrupt have different numbers of tokens"
    if clean == corrupt:  # where they differ, both have words that the tokenizer does not know
        return "clean and corrupt are the same tokens"
    try:
        token_spans(pair.spans, coder.offsets(pair.clean))
    except PromptError:
        return "a named span covers no token"
    return ""


def check_split(split: str | None, task: str) -> None:
    """Refuse what is no split."""
    if split not in (None, "train", "test"):
        raise TaskError(f"{task}: split must be 'train', 'test' or None (everything), got {split!r}")


def check_choice(value: Any, allowed: Sequence[Any], what: str, task: str) -> None:
    """Refuse an option that the task does not have."""
    if value not in allowed:
        raise TaskError(f"{task}: {what} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def part(items: Sequence[T], split: Split | None) -> list[T]:
    """The items of a split: every fourth for the test, the others for training; all of them if there is no split."""
    if split is None:
        return list(items)
    return [x for i, x in enumerate(items) if (i % EVERY == EVERY - 1) == (split == "test")]


@cache
def lists(task: str) -> dict[str, Any]:
    """What words.toml has for a task."""
    text = resources.files("interp.tasks").joinpath("words.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)[task]


def usable(
    words: Sequence[str], model: TaskModel, task: str, *, fewest: int, what: str, split: Split | None = None
) -> tuple[list[str], list[str]]:
    """Words of a split that are single tokens after a space, and those that are not. TaskError for too few."""
    kept, dropped = single_tokens(part(words, split), model.coder)
    if len(kept) < fewest:
        side = f" of the split {split!r}" if split else ""
        raise TaskError(
            f"{model.name}: {task} needs at least {fewest} {what} that are single tokens after a space, but of its "
            f"{len(kept) + len(dropped)}{side} the tokenizer has {', '.join(kept) or 'none'} (missing: "
            f"{', '.join(dropped[:6])}{', …' if len(dropped) > 6 else ''})"
        )
    return kept, dropped


def fill(template: str, slots: dict[str, str]) -> tuple[str, dict[str, Span]]:
    """Fill ``{slots}`` and say at which characters each filling stands (the last, if it stands more than once)."""
    text, where = "", {}
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot is not None:
            where[slot] = (len(text), len(text) + len(slots[slot]))
            text += slots[slot]
    return text, where


def end_of(text: str, coder: Coder) -> Span:
    """Character range of the last token that has characters."""
    return next(o for o in reversed(coder.offsets(text)) if o[1] > o[0])


def span_of(words: str, text: str, after: int = 0) -> Span:
    """Character range of the first occurrence of words in a text, from a character on."""
    start = text.index(words, after)
    return start, start + len(words)
