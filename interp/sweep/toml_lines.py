"""Find the line of each key of a TOML text, for error messages.

`tomllib` does not report lines.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable

Path = tuple[str | int, ...]
_SPACE = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_SCALAR = re.compile(r"[^,\]\}\n#]*")


def key_lines(text: str) -> dict[Path, int]:
    """Return the line (from 1) of every key and table of a valid TOML text.

    Keys are paths such as ``("recipes", 0, "mode")``.
    """
    return _Scanner(text).scan()


class _Scanner:
    """Reads a TOML text once, from start to end."""

    def __init__(self, text: str):
        self.text, self.at = text, 0
        self.line_ends = [match.start() for match in re.finditer("\n", text)]
        self.lines: dict[Path, int] = {}
        self.arrays: dict[Path, int] = {}  # [[…]] tables seen so far, by path

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        self._space()
        while self.at < len(self.text):
            if self.text.startswith("[[", self.at):
                self.at += 2
                line, names = self._line(), self._key()
                path = (*self._resolve(names[:-1]), names[-1])
                self.arrays[path] = self.arrays.get(path, -1) + 1
                table = (*path, self.arrays[path])
                self.at += 2
            elif self.text[self.at] == "[":
                self.at += 1
                line, names = self._line(), self._key()
                table = self._resolve(names)
                self.at += 1
            else:
                self._assignment(table)
                self._space()
                continue
            for n in range(1, len(table) + 1):
                self.lines.setdefault(table[:n], line)
            self._space()
        return self.lines

    def _resolve(self, names: list[str]) -> Path:
        """Return a header's names as a path: after ``[[a]]``, ``[a.b]`` belongs to the latest a."""
        path: Path = ()
        for name in names:
            path = (*path, name)
            if path in self.arrays:
                path = (*path, self.arrays[path])
        return path

    def _assignment(self, table: Path) -> None:
        line = self._line()
        path = table
        for name in self._key():
            path = (*path, name)
            self.lines.setdefault(path, line)
        self.at += 1  # =
        self._value(path)

    def _key(self) -> list[str]:
        names = []
        while True:
            self._space()
            quote = self.text[self.at]
            if quote in "\"'":
                start = self.at
                self._string(quote)
                names.append(self.text[start + 1 : self.at - 1])
            else:
                match = _BARE.match(self.text, self.at)
                assert match is not None
                names.append(match[0])
                self.at = match.end()
            self._space()
            if self.text[self.at] != ".":
                return names
            self.at += 1

    def _value(self, path: Path) -> None:
        self._space()
        first = self.text[self.at]
        if first in "\"'":
            triple = self.text.startswith(first * 3, self.at)
            self._string(first * 3 if triple else first)
        elif first == "[":
            self._members("]", lambda n: self._element((*path, n)))
        elif first == "{":
            self._members("}", lambda n: self._assignment(path))
        else:
            match = _SCALAR.match(self.text, self.at)
            assert match is not None
            self.at = match.end()

    def _element(self, path: Path) -> None:
        self.lines[path] = self._line()
        self._value(path)

    def _members(self, end: str, read: Callable[[int], None]) -> None:
        """Read comma-separated members up to ``end``; ``read`` reads the n-th."""
        self.at += 1
        n = 0
        while True:
            self._space()
            if self.text[self.at] == end:
                break
            read(n)
            n += 1
            self._space()
            if self.text[self.at] == ",":
                self.at += 1
        self.at += 1

    def _string(self, quote: str) -> None:
        """Move behind the string that begins at the current position."""
        self.at += len(quote)
        while not self.text.startswith(quote, self.at):
            self.at += 2 if self.text[self.at] == "\\" and quote[0] == '"' else 1
        self.at += len(quote)
        if len(quote) == 3:  # up to two quotes may precede the closing ones directly
            while self.text.startswith(quote[0], self.at):
                self.at += 1

    def _space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def _line(self) -> int:
        return bisect_left(self.line_ends, self.at) + 1
