"""Checks of values from a config: each returns the value as it is used, or raises ValueError with what is expected."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from interp.utils.arguments import is_number, is_whole

Check = Callable[[Any], Any]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+@=-]{0,99}")


def text(value: Any) -> str:
    """A string that is not empty."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text expected")
    return value


def name(value: Any) -> str:
    """A label: of results, and of a folder."""
    if not isinstance(value, str) or not NAME.fullmatch(value) or ".." in value:
        raise ValueError(
            "a plain name expected: letters, digits, spaces and . _ + @ = - (it names results and folders)"
        )
    return value


def flag(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false expected")
    return value


def whole(least: int, most: int | None = None) -> Check:
    """An integer in a range."""

    def check(value: Any) -> int:
        if not is_whole(value, least, most):
            between = f"from {least}" + ("" if most is None else f" to {most}")
            raise ValueError(f"a whole number {between} expected")
        return value

    return check


def number(least: float, most: float = float("inf"), *, above: bool = False) -> Check:
    """A finite number in a range; ``above``: the lower end excluded."""

    def check(value: Any) -> float:
        fine = is_number(value) and least <= value <= most
        if not fine or (above and value == least) or value == float("inf"):
            raise ValueError(
                f"a number {'above' if above else 'from'} {least:g}"
                + (f" to {most:g} expected" if most < 1e9 else " expected")
            )
        return float(value)

    return check


def one_of(*values: str) -> Check:
    """One of some words."""

    def check(value: Any) -> str:
        if value not in values:
            close = difflib.get_close_matches(str(value), values, 1)
            raise ValueError((f"did you mean {close[0]!r}? " if close else "") + f"one of {', '.join(values)} expected")
        return value

    return check


def either(*checks: Check) -> Check:
    """The first check that accepts the value."""

    def check(value: Any) -> Any:
        said = []
        for one in checks:
            try:
                return one(value)
            except ValueError as error:
                said.append(str(error))
        raise ValueError(", or ".join(said))

    return check


def list_of(check: Check, least: int = 1) -> Check:
    """A list without repetition."""

    def checked(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise ValueError(f"a list of at least {least} expected")
        found = [check(v) for v in value]
        if len({repr(v) for v in found}) < len(found):
            raise ValueError("the same value twice: its results would be counted twice")
        return found

    return checked


def dotted_key(path: Iterable[str | int]) -> str:
    """``("recipes", 0, "mode")`` as ``recipes[0].mode``."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def without_none(value: Any) -> Any:
    """Tables without the keys that say nothing: TOML has no null."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value
