"""Read one table of a config key by key, typed.

Errors name the key, the line and the remedy.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from interp.errors import InterpError
from interp.utils.checks import Check, dotted_key

REQUIRED: Any = object()


class Source:
    """The file that a config was read from, and the line of each key."""

    def __init__(self, file: str, lines: Mapping[tuple[str | int, ...], int]):
        self.file, self.lines = file, lines

    def refuse(self, path: tuple[str | int, ...], message: str) -> InterpError:
        """Return the error to raise about the key at ``path``."""
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), None)
        where = self.file if line is None else f"{self.file}, line {line}"
        return InterpError(f"{where}: {dotted_key(path)}{message}")


class Table:
    """One table of the config.

    Its keys are taken one by one; `done` refuses keys that were not taken.
    """

    def __init__(self, source: Source, path: tuple[str | int, ...], table: Any):
        if not isinstance(table, dict):
            raise source.refuse(path, f" must be a table, got {table!r:.60}")
        self.source, self.path, self.table = source, path, dict(table)
        self.taken: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.table

    def take(self, key: str, check: Check, default: Any = REQUIRED) -> Any:
        """Return the checked value of a key, or its default if it is missing.

        InterpError for anything else.
        """
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
        """Return the error to raise about one of its keys."""
        return self.source.refuse((*self.path, key), message)

    def done(self) -> None:
        """Raise InterpError if the table has a key that was not taken."""
        for key in self.table:
            if key not in self.taken:
                close = difflib.get_close_matches(key, self.taken, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"keys: {', '.join(self.taken)}"
                raise self.refuse(key, f" is not a known key; {hint}")
