"""Checks of values from a config.

Each check returns the value as it is used, or raises ValueError with what is expected.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from interp.utils.arguments import is_number, is_whole

Check = Callable[[Any], Any]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+@=-]{0,99}")


def text(value: Any) -> str:
    """Check that a value is a string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text expected")
    return value


def name(value: Any) -> str:
    """Check that a value is a plain label, which names results and folders."""
    if not isinstance(value, str) or not NAME.fullmatch(value) or ".." in value:
        raise ValueError(
            "a plain name expected: letters, digits, spaces and . _ + @ = - (it names results and folders)"
        )
    return value


def flag(value: Any) -> bool:
    """Check that a value is true or false."""
    if not isinstance(value, bool):
        raise ValueError("true or false expected")
    return value


def whole(least: int, most: int | None = None) -> Check:
    """Return a check for an integer in a range."""

    def check(value: Any) -> int:
        if not is_whole(value, least, most):
            between = f"from {least}" + ("" if most is None else f" to {most}")
            raise ValueError(f"a whole number {between} expected")
        return value

    return check


def number(least: float, most: float = float("inf"), *, above: bool = False) -> Check:
    """Return a check for a finite number in a range.

    ``above``: the lower end is excluded.
    """

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
    """Return a check for one of some words."""

    def check(value: Any) -> str:
        if value not in values:
            raise ValueError(f"{did_you_mean(value, values)}one of {', '.join(values)} expected")
        return value

    return check


def did_you_mean(value: Any, names: Iterable[str]) -> str:
    """Return ``"did you mean 'mean'? "`` for a misspelt name, or "" if none is close."""
    by_lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(str(value).lower(), by_lower, 1)
    return f"did you mean {by_lower[close[0]]!r}? " if close else ""


def either(*checks: Check) -> Check:
    """Return a check that applies the first check that accepts the value."""

    def check(value: Any) -> Any:
        reasons = []
        for alternative in checks:
            try:
                return alternative(value)
            except ValueError as error:
                reasons.append(str(error))
        raise ValueError(", or ".join(reasons))

    return check


def list_of(check: Check, least: int = 1, *, distinct: bool = True) -> Check:
    """Return a check for a list of at least ``least`` values (``distinct``: all different), each checked."""

    def check_list(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) < least:
            raise ValueError(f"a list of at least {least} expected")
        values = [check(v) for v in value]
        if distinct and len({repr(v) for v in values}) < len(values):
            raise ValueError("the same value twice: its results would be counted twice")
        return values

    return check_list


def dotted_key(path: Iterable[str | int]) -> str:
    """Return a path such as ``("recipes", 0, "mode")`` as ``recipes[0].mode``."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def without_none(value: Any) -> Any:
    """Return tables without the keys whose value is None: TOML has no null."""
    if isinstance(value, Mapping):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value
