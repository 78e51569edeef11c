"""Generate the pairs of a task.

They are drawn by seed, checked with one tokenizer, and split into training and test. A pair is kept if clean and
corrupt differ and have equally many tokens, if answer and foil are single tokens and differ, and if the set does not
have its clean prompt yet. The result's ``refused`` counts the other draws by reason.
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
from interp.prompts.coder import Coder
from interp.prompts.pairs import PromptPair
from interp.prompts.ranges import Span, token_spans
from interp.tasks.vocabulary import TaskModel, TaskPairs, check_count, single_tokens

Split = Literal["train", "test"]
Draw = Callable[[Random, int], PromptPair | str]  # returns a pair, or the reason why this draw gives none
T = TypeVar("T")

EVERY = 4  # one item in so many of each list belongs to the test split
PATIENCE = 1000  # a task gives up after so many refused draws in a row


def make_pairs(
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
    """Draw ``n`` different pairs that the tokenizer aligns.

    Each is a result of ``draw(rng, number of pairs so far)``. ``rng``: by default a generator seeded with task, seed
    and split.

    Raises TaskError, with the reasons, if not that many can be drawn.
    """
    check_count(n, task)
    rng = rng or Random(f"{task}/{seed}" + (f"/{split}" if split else ""))
    pairs: dict[str, PromptPair] = {}  # by clean prompt
    refused: Counter[str] = Counter()
    tries = 0
    while tries < PATIENCE:
        pair = draw(rng, len(pairs))
        reason = pair if isinstance(pair, str) else _reason_refused(pair, pairs, model.coder)
        if isinstance(pair, str) or reason:
            refused[reason] += 1
            tries += 1
            continue
        pairs[pair.clean], tries = pair, 0
        if len(pairs) == n:
            return TaskPairs(pairs.values(), task=task, seed=seed, dropped=dropped, split=split, refused=refused)
    why = ", ".join(f"{count} × {reason}" for reason, count in refused.most_common())
    raise TaskError(
        f"{model.name}: only {len(pairs)} different pairs of the task {task!r} could be made for this tokenizer, and "
        f"{n} were asked for; draws refused: {why}. Ask for fewer"
        + (", or leave split=None" if split else "")
        + ", or use another task."
    )


def _reason_refused(pair: PromptPair, pairs: Mapping[str, PromptPair], coder: Coder) -> str:
    return "was drawn before" if pair.clean in pairs else reason_unusable(pair, coder)


def reason_unusable(pair: PromptPair, coder: Coder) -> str:
    """Return why a pair cannot be used with a tokenizer; '' if it can."""
    if pair.clean == pair.corrupt:
        return "clean and corrupt are the same"
    one, other = (coder.continuation(str(t)) for t in (pair.answer, pair.foil or ""))
    if len(one) != 1 or (pair.foil is not None and len(other) != 1):
        return "answer or foil is not a single token"
    if one == other:
        return "answer and foil are the same token"
    clean, corrupt = (coder.encode(t) for t in (pair.clean, pair.corrupt))
    if len(clean) != len(corrupt):
        return "clean and corrupt have different numbers of tokens"
    if clean == corrupt:  # the words in which they differ are unknown to the tokenizer
        return "clean and corrupt are the same tokens"
    try:
        token_spans(pair.spans, coder.offsets(pair.clean))
    except PromptError:
        return "a named span covers no token"
    return ""


def check_split(split: str | None, task: str) -> None:
    """Raise TaskError unless ``split`` is "train", "test" or None."""
    if split not in (None, "train", "test"):
        raise TaskError(f"{task}: split must be 'train', 'test' or None (everything), got {split!r}")


def check_choice(value: Any, allowed: Sequence[Any], what: str, task: str) -> None:
    """Raise TaskError unless the value of the option ``what`` is an allowed one."""
    if value not in allowed:
        raise TaskError(f"{task}: {what} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def items_of_split(items: Sequence[T], split: Split | None) -> list[T]:
    """Select the items of a split.

    Every fourth belongs to the test, the others to training; None selects all.
    """
    if split is None:
        return list(items)
    return [x for i, x in enumerate(items) if (i % EVERY == EVERY - 1) == (split == "test")]


@cache
def word_lists(task: str) -> dict[str, Any]:
    """Read the word lists of a task from words.toml."""
    text = resources.files("interp.tasks").joinpath("words.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)[task]


def usable_words(
    words: Sequence[str], model: TaskModel, task: str, *, fewest: int, what: str, split: Split | None = None
) -> tuple[list[str], list[str]]:
    """Divide the words of a split into single tokens after a space and others.

    Raises TaskError for too few of the first.
    """
    single, dropped = single_tokens(items_of_split(words, split), model.coder)
    if len(single) < fewest:
        side = f" of the split {split!r}" if split else ""
        raise TaskError(
            f"{model.name}: {task} needs at least {fewest} {what} that are single tokens after a space, but of its "
            f"{len(single) + len(dropped)}{side} the tokenizer has {', '.join(single) or 'none'} (missing: "
            f"{', '.join(dropped[:6])}{', …' if len(dropped) > 6 else ''})"
        )
    return single, dropped


def fill(template: str, slots: dict[str, str]) -> tuple[str, dict[str, Span]]:
    """Fill ``{slots}`` of a template.

    Returns the text and each filling's character range (of its last occurrence).
    """
    text, spans = "", {}
    for literal, slot, _, _ in Formatter().parse(template):
        text += literal
        if slot is not None:
            spans[slot] = (len(text), len(text) + len(slots[slot]))
            text += slots[slot]
    return text, spans


def end_of(text: str, coder: Coder) -> Span:
    """Character range of the last token with characters."""
    return next(o for o in reversed(coder.offsets(text)) if o[1] > o[0])


def span_of(words: str, text: str, after: int = 0) -> Span:
    """Character range of the first ``words`` in ``text``, from ``after`` on."""
    start = text.index(words, after)
    return start, start + len(words)
