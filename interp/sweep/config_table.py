"""Reading one table of a config key by key: typed, with messages that name the key, the line and the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from interp.errors import InterpError

Check = Callable[[Any], Any]  # the value as it is to be used, or ValueError with what was expected
REQUIRED: Any = object()
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+@=-]{0,99}")


class Source:
    """Where a config was read: its file and the line of each key."""

    def __init__(self, file: str, lines: Mapping[tuple[str | int, ...], int]):
        self.file, self.lines = file, lines

    def refuse(self, path: tuple[str | int, ...], message: str) -> InterpError:
        """The error to raise about the key at ``path``."""
        known = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        where = self.file if known is None else f"{self.file}, line {known}"
        return InterpError(f"{where}: {spelled(path)}{message}")


def spelled(path: Iterable[str | int]) -> str:
    """``("recipes", 0, "mode")`` as ``recipes[0].mode``."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


class Table:
    """One table of the config; keys are taken out of it, and none may be left."""

    def __init__(self, source: Source, path: tuple[str | int, ...], table: Any):
        if not isinstance(table, dict):
            raise source.refuse(path, f" must be a table, got {table!r:.60}")
        self.source, self.path, self.table = source, path, dict(table)
        self.taken: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.table

    def take(self, key: str, check: Check, default: Any = REQUIRED) -> Any:
        """The value of a key, checked; its default if it is not there. InterpError for anything else."""
        self.taken.append(key)
        if key not in self.table:
            if default is REQUIRED:
                raise self.source.refuse(
                    self.path, f" lacks the key {key!r}" if self.path else f"the key {key!r} is missing"
                )
            return default
        try:
            return check(self.table[key])
        except ValueError as error:
            raise self.refuse(key, f" = {self.table[key]!r:.80}: {error}") from None

    def refuse(self, key: str, message: str) -> InterpError:
        """The error to raise about one of its keys."""
        return self.source.refuse((*self.path, key), message)

    def done(self) -> None:
        """InterpError if a key was not asked for."""
        for key in self.table:
            if key not in self.taken:
                close = difflib.get_close_matches(key, self.taken, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(self.taken)}"
                raise self.refuse(key, f" is not a known key; {hint}")


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
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or value < least
            or (most is not None and value > most)
        ):
            between = f"from {least}" + ("" if most is None else f" to {most}")
            raise ValueError(f"a whole number {between} expected")
        return value

    return check


def number(least: float, most: float = float("inf"), *, above: bool = False) -> Check:
    """A finite number in a range; ``above``: the lower end excluded."""

    def check(value: Any) -> float:
        fine = isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most
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
