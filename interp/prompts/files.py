"""Read prompts from files.

Pairs and facts are CSV or JSON lines, plain texts one per line.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interp.errors import PromptError
from interp.prompts.pairs import Fact, PromptPair
from interp.prompts.rows import prompts_of_rows
from interp.utils.json_text import parse_json


def read_prompts(path: str | Path) -> list[PromptPair | Fact]:
    """Read prompt pairs or facts from a CSV or JSON-lines file.

    Pairs have columns clean, corrupt, answer and optionally foil; facts have prompt, subject, answer and optionally
    occurrence. A ``.csv`` file has these names as its header, and may name spans by a column each: ``span:subject``
    holds words of the clean prompt, or a range of its characters, ``[4:8]``. A ``.jsonl`` (or ``.json``) file has one
    JSON object per line, in which spans are an object: ``"spans": {"subject": "Mary"}``. Answers keep their leading
    space. Other columns are named in a warning. Raises one PromptError, which names the lines, for all prompts that
    cannot be read.
    """
    path = Path(path)
    read_rows = {".csv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}.get(path.suffix.lower())
    if read_rows is None:
        raise PromptError(f"{path}: a .csv or .jsonl file expected")
    prompts = prompts_of_rows((f"{path}, line {number}", row) for number, row in read_rows(path))
    if not prompts:
        raise PromptError(f"{path} holds no prompts")
    return prompts


def read_texts(path: str | Path) -> list[str]:
    """Read the non-empty lines of a text file; PromptError if it has none."""
    lines = [line for line in _text(Path(path)).splitlines() if line.strip()]
    if not lines:
        raise PromptError(f"{path} holds no text")
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # not UTF-8, or a name that no file can have
        raise PromptError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _text(path)
    before = csv.field_size_limit(max(len(text), 131_072))  # a prompt may be longer than the module's default
    try:
        # only line ends divide lines: U+2028 and the like are part of a prompt
        reader = csv.DictReader(io.StringIO(text))
        names = reader.fieldnames or []
        if twice := sorted({n for n in names if names.count(n) > 1 and n}):
            raise PromptError(f"{path}: its first line names the column {twice[0]!r} twice")
        for row in reader:
            if None in row:
                raise PromptError(
                    f"{path}, line {reader.line_num} has more fields than the first line has names: put text that "
                    "contains commas in double quotes"
                )
            yield reader.line_num, {k: v for k, v in row.items() if k and v}
    except csv.Error as error:
        raise PromptError(f"{path} cannot be read as CSV: {error}") from None
    finally:
        csv.field_size_limit(before)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, MemoryError) as error:
            why = str(error).removeprefix("it is not JSON: ")
            raise PromptError(f"{path}, line {number} is not JSON ({why}): one object a line expected") from None
        if not isinstance(row, dict):
            raise PromptError(f"{path}, line {number}: an object with clean, corrupt, answer expected, got {row!r:.60}")
        yield number, row
