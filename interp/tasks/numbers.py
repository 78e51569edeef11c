"""Numbers: comparison, sums and differences.

They work with tokenizers that split numbers into digits and with those that do not. Most recent tokenizers have a token
for each digit and none for longer numbers; others (GPT-2's) have tokens for numbers of two digits too. The tasks test
the tokenizer, and then let the model predict the next *digit* or the next *number*; ``style`` fixes one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Literal

from interp.errors import TaskError
from interp.prompts.coder import Coder
from interp.prompts.pairs import PromptPair
from interp.prompts.ranges import Span
from interp.tasks.generate import (
    Draw,
    Split,
    check_choice,
    check_split,
    end_of,
    fill,
    items_of_split,
    make_pairs,
    word_lists,
)
from interp.tasks.vocabulary import TaskModel, TaskPairs

Style = Literal["digits", "numbers"]
Digit = Literal["tens", "units"]
STYLES = (None, "digits", "numbers")
PREFERRED: tuple[Style, ...] = ("numbers", "digits")
SAMPLE = ("27", "46", "83")


def number_style(model: TaskModel, style: Style | None, task: str) -> Style:
    """Test how the tokenizer writes two-digit numbers.

    Raises TaskError if in neither style, or not in ``style``.
    """
    check_choice(style, STYLES, "style", task)
    coder = model.coder
    split = [coder.continuation(number) for number in SAMPLE]
    digits = {d: coder.continuation(d) for d in "0123456789"}
    supported: dict[Style, bool] = {
        "digits": all(len(ids) == 1 and _is_spelled(ids, d, coder) for d, ids in digits.items())
        and all(ids == digits[number[0]] + digits[number[1]] for ids, number in zip(split, SAMPLE, strict=True)),
        "numbers": all(_glue(number, coder) is not None for number in SAMPLE),
    }
    candidates: tuple[Style, ...] = PREFERRED if style is None else (style,)
    styles: list[Style] = [s for s in candidates if supported[s]]
    if not styles:
        how = "; ".join(f"{number} is {coder.texts(ids)}" for number, ids in zip(SAMPLE, split, strict=True))
        need = f"style={style!r} was asked for" if style else "one token for each number, or one for each digit"
        raise TaskError(f"{model.name}: {task} cannot be made for how this tokenizer writes numbers ({need}): {how}")
    return styles[0]


def _is_spelled(ids: list[int], text: str, coder: Coder) -> bool:
    return "".join(coder.texts(ids)).strip() == text  # an unknown word can be a single token, namely <unk>


def _glue(number: str, coder: Coder) -> str | None:
    """The text before a number written as a single token: a space or nothing.

    None if the number is several tokens.
    """
    for glue in (" ", ""):
        ids = coder.continuation(glue + number)
        if len(ids) == 1 and _is_spelled(ids, number, coder):
            return glue
    return None


def _is_one_token_after(prompt: str, answer: str, coder: Coder) -> bool:
    """Whether the answer, written after the prompt, is still one token."""
    ids = coder.encode(prompt)
    return coder.encode(prompt + answer)[: len(ids) + 1] == [*ids, *coder.continuation(answer)]


def greater_than(
    model: TaskModel,
    n: int = 64,
    seed: int = 0,
    *,
    corruption: Literal["low", "high"] = "low",
    style: Style | None = None,
    split: Split | None = None,
) -> TaskPairs:
    """Make ``n`` pairs after Hanna et al. (2023), arXiv 2305.00586.

    An event ends in a later year than it began. With numbers as tokens: "The war lasted from the year 1732 to the year
    17" → a number above 32. With digits: "… 1732 to the year 173" → a digit above 2. ``answer`` is one of those above,
    ``foil`` one of those not above, both at random. ``corruption="low"``: the war begins in 01 (or 0), so that answer
    and foil are both possible, as published; ``"high"``: it begins so late that neither is. Spans: ``century`` and
    ``start`` (what is compared, in the first year), ``END``. ``split``: "train" and "test" share no event and no
    template. Raises TaskError for a tokenizer that writes numbers in neither way.
    """
    check_split(split, "greater_than")
    check_choice(corruption, ("low", "high"), "corruption", "greater_than")
    style, words, coder = number_style(model, style, "greater_than"), word_lists("greater_than"), model.coder
    templates, events = items_of_split(words["templates"], split), items_of_split(words["events"], split)
    probe, _ = fill(templates[0], {"event": events[0], "century": "17", "start": "32"})
    may_join = style == "digits" or _is_one_token_after(probe, "46", coder)
    glue = "" if may_join else " "  # words cannot be joined without a space

    def draw(rng: Random, i: int) -> PromptPair:
        template, event, century = rng.choice(templates), rng.choice(events), rng.randint(11, 19)
        if style == "digits":
            start = rng.randint(1, 8)
            answer, foil = rng.randint(start + 1, 9), rng.randint(1, start)
            other = 0 if corruption == "low" else rng.randint(answer, 9)
            before, width = f"{century}{rng.randint(0, 9)}", 1
        else:
            start = rng.randint(3, 97)
            answer, foil = rng.randint(start + 1, 99), rng.randint(2, start)
            other = 1 if corruption == "low" else rng.randint(answer, 99)
            before, width = f"{century}", 2

        def text(year: int) -> tuple[str, dict[str, tuple[int, int]]]:
            template_here = template.replace("{century}{start}", f"{{century}}{glue}{{start}}")
            filled, spans = fill(template_here, {"event": event, "century": before, "start": f"{year:0{width}d}"})
            first = spans["start"][0] - len(glue)
            spans["century"] = (first - len(before), first)
            return filled, spans

        clean, ranges = text(start)
        spans = {"century": ranges["century"], "start": ranges["start"], "END": end_of(clean, coder)}
        return PromptPair(clean, text(other)[0], f"{glue}{answer:0{width}d}", f"{glue}{foil:0{width}d}", spans)

    return make_pairs(model, "greater_than", n, seed, _checking_tokens(draw, coder), split=split)


def addition(
    model: TaskModel,
    n: int = 64,
    seed: int = 0,
    *,
    shots: int = 3,
    digit: Digit = "tens",
    style: Style | None = None,
    split: Split | None = None,
) -> TaskPairs:
    """Make ``n`` sums below 100 of two-digit numbers: "34 + 25 =" → " 59".

    ``shots`` (0 to 16) solved sums come first. With digits as tokens the answer is a digit: ``digit="tens"`` (the
    default), or ``"units"``, for which the prompt contains the tens. In the corrupt prompt one of the two numbers
    differs, so that another answer is right: the foil (for units: with the same tens). Spans: ``a``, ``b``, ``END``.
    ``style`` as in `greater_than`. ``split``: "train" and "test" share no sum, solved ones included. Raises TaskError
    for a tokenizer that writes numbers in neither way.
    """
    return _arithmetic(model, n, seed, "+", lambda a, b: a + b, shots, digit, style, split)


def subtraction(
    model: TaskModel,
    n: int = 64,
    seed: int = 0,
    *,
    shots: int = 3,
    digit: Digit = "tens",
    style: Style | None = None,
    split: Split | None = None,
) -> TaskPairs:
    """Make ``n`` differences, at least 10, of two-digit numbers: "59 - 25 =" → " 34".

    See `addition`.
    """
    return _arithmetic(model, n, seed, "-", lambda a, b: a - b, shots, digit, style, split)


def _arithmetic(
    model: TaskModel,
    n: int,
    seed: int,
    sign: str,
    compute: Callable[[int, int], int],
    shots: int,
    digit: Digit,
    style: Style | None,
    split: Split | None,
) -> TaskPairs:
    task = "addition" if sign == "+" else "subtraction"
    check_split(split, task)
    check_choice(digit, ("tens", "units"), "digit", task)
    check_choice(shots, range(17), "shots", task)
    style, coder = number_style(model, style, task), model.coder
    numbers = range(10, 90)
    possible = [(a, b) for a in numbers for b in numbers if 10 <= compute(a, b) <= 99 and _side(a, b, split)]
    by_operand: dict[tuple[int, int], list[tuple[int, int]]] = {}  # (place, number) -> the pairs with it
    for pair in possible:
        for place in (0, 1):
            by_operand.setdefault((place, pair[place]), []).append(pair)
    glue = " " if style == "digits" else _glue("46", coder)
    n_given = {"tens": 0, "units": 1}[digit] if style == "digits" else 0  # digits of the result in the prompt

    def expected(a: int, b: int) -> str:
        return str(compute(a, b))[n_given : n_given + 1] if style == "digits" else str(compute(a, b))

    def draw(rng: Random, i: int) -> PromptPair | str:
        a, b = rng.choice(possible)
        unchanged = i % 2
        others = [
            p
            for p in by_operand[unchanged, (a, b)[unchanged]]
            if expected(*p) != expected(a, b) and str(compute(*p))[:n_given] == str(compute(a, b))[:n_given]
        ]
        if not others:
            return "no other number changes the expected digit"
        solved = rng.sample(possible, shots)
        head = "".join(f"{x} {sign} {y} = {compute(x, y)}\n" for x, y in solved)

        def text(x: int, y: int) -> str:
            tens = str(compute(x, y))[:n_given]
            return f"{head}{x} {sign} {y} =" + (f" {tens}" if style == "digits" or glue == "" else "")

        clean = text(a, b)
        start = len(head)
        spans = {"a": (start, start + 2), "b": (start + 5, start + 7), "END": end_of(clean, coder)}
        space = "" if style == "digits" else glue
        answer, foil = (f"{space}{expected(*p)}" for p in ((a, b), rng.choice(others)))
        corrupt = text(*next(p for p in rng.sample(others, len(others)) if f"{space}{expected(*p)}" == foil))
        return PromptPair(clean, corrupt, answer, foil, spans)

    return make_pairs(model, task, n, seed, _checking_tokens(draw, coder), split=split)


def _side(a: int, b: int, split: Split | None) -> bool:
    return split is None or ((7 * a + 3 * b) % 4 == 0) == (split == "test")


def _has_own_tokens(span: Span, text: str, coder: Coder) -> bool:
    """Whether tokens begin and end where the span does.

    The first may begin with the space before it.
    """
    starts, stops = zip(*coder.offsets(text), strict=True)
    return (span[0] in starts or span[0] - 1 in starts) and span[1] in stops


def _checking_tokens(draw: Draw, coder: Coder) -> Draw:
    """Refuse pairs whose answer is a different token after the prompt than alone."""

    def checked(rng: Random, i: int) -> PromptPair | str:
        pair = draw(rng, i)
        if isinstance(pair, str):
            return pair
        if not _is_one_token_after(pair.clean, str(pair.answer), coder):
            return "the answer after the prompt is a different token than alone"
        if "start" in pair.spans and not all(
            _has_own_tokens(pair.spans["start"], t, coder) for t in (pair.clean, pair.corrupt)
        ):
            return "the year is not split after its century"
        return pair

    return checked
