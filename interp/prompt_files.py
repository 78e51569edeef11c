"""Prompts from files: pairs and facts as CSV or JSON lines, plain texts one a line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interp.errors import PromptError
from interp.prompts import Fact, PromptPair

PAIR = ("clean", "corrupt", "answer")
FACT = ("prompt", "subject", "answer")


def read_prompts(path: str | Path) -> list[PromptPair | Fact]:
    """Pairs (columns clean, corrupt, answer, and foil if there is one) or facts (prompt, subject, answer).

    ``.csv`` has these as its header; ``.jsonl`` (or ``.json``) has one JSON object a line, which for pairs may name
    spans by their words in the clean prompt: ``"spans": {"subject": "Mary"}``. Answers keep their leading space.
    Raises PromptError, naming the line, for what cannot be read.
    """
    path = Path(path)
    read = {".csv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}.get(path.suffix.lower())
    if read is None:
        raise PromptError(f"{path}: a .csv or .jsonl file expected")
    found = [_prompt(f"{path}, line {number}", row) for number, row in read(path)]
    if not found:
        raise PromptError(f"{path} holds no prompts")
    return found


def read_texts(path: str | Path) -> list[str]:
    """The lines of a text file, empty ones left out. Raises PromptError if there are none."""
    lines = [line for line in _text(Path(path)).splitlines() if line.strip()]
    if not lines:
        raise PromptError(f"{path} holds no text")
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(_text(path).splitlines(keepends=True))
    for row in reader:
        yield reader.line_num, {k: v for k, v in row.items() if k and v}


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}, line {number} is not JSON ({error.msg}): one object a line expected") from None
        if not isinstance(row, dict):
            raise PromptError(f"{path}, line {number}: an object with clean, corrupt, answer expected, got {row!r:.60}")
        yield number, row


def _prompt(where: str, row: dict[str, Any]) -> PromptPair | Fact:
    kind = FACT if "prompt" in row else PAIR
    lacking = [name for name in kind if not isinstance(row.get(name), str) or not row[name]]
    if lacking:
        raise PromptError(
            f"{where} lacks {', '.join(lacking)}: pairs have clean, corrupt, answer and perhaps foil; facts have "
            "prompt, subject, answer"
        )
    if kind is FACT:
        return Fact(row["prompt"], row["subject"], row["answer"])
    pair = PromptPair(row["clean"], row["corrupt"], row["answer"], row.get("foil") or None)
    for name, words in (row.get("spans") or {}).items():
        pair = pair.span(name, words)
    return pair
