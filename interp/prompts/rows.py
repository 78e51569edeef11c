"""Rows of a table as prompts: those of a CSV or JSON-lines file, and those of a DataFrame."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from interp.errors import PromptError
from interp.prompts.pairs import Fact, PromptPair, in_one_message
from interp.prompts.ranges import Span, find_words

log = logging.getLogger("interp")

PAIR, PAIR_OPTIONS = ("clean", "corrupt", "answer"), ("foil", "spans", "corrupt_spans")
FACT, FACT_OPTIONS = ("prompt", "subject", "answer"), ("occurrence",)
SPAN = "span:"  # a column that names a span: "span:subject" holds its words in the clean prompt, or "[start:stop]"
CORRUPT_SPAN = "corrupt_span:"  # the same for the corrupt prompt
RANGE = re.compile(r"\[(\d+):(\d+)\]")


def prompts_of_rows(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> list[PromptPair | Fact]:
    """Return the prompts of rows; each row comes with the words for its place, e.g. "pairs.csv, line 3".

    Columns that say nothing about a prompt are named in a warning. Raises one PromptError for all rows that cannot be
    read, and for columns whose names are nearly right.
    """
    prompts: list[PromptPair | Fact] = []
    problems: list[str] = []
    ignored: dict[str, None] = {}
    for where, row in rows:
        try:
            ignored |= dict.fromkeys(_other_columns(where, row))
            prompts.append(_prompt(where, row))
        except PromptError as error:
            problems.append(str(error))
    if problems:
        raise PromptError(
            in_one_message(problems, f"{len(problems)} of {len(problems) + len(prompts)} rows cannot be used")
        )
    if ignored:
        log.warning("columns that say nothing about a prompt are left out: %s", ", ".join(map(repr, ignored)))
    return prompts


def row_of(pair: PromptPair) -> dict[str, Any]:
    """Return a pair as a row that `prompts_of_rows` reads back."""
    row: dict[str, Any] = {"clean": pair.clean, "corrupt": pair.corrupt, "answer": pair.answer, "foil": pair.foil}
    row |= {f"{SPAN}{name}": _written(pair.clean, span) for name, span in pair.spans.items()}
    return row | {f"{CORRUPT_SPAN}{name}": _written(pair.corrupt, span) for name, span in pair.corrupt_spans.items()}


def _written(text: str, span: Span) -> str:
    """Return the words of a span if they stand in the text once, else its range of characters."""
    words = text[slice(*span)]
    is_clear = find_words(text, words) == [span] and words == words.strip() and not RANGE.fullmatch(words)
    return words if is_clear else f"[{span[0]}:{span[1]}]"


def _is_fact(row: Mapping[str, Any]) -> bool:
    return "prompt" in row


def _other_columns(where: str, row: Mapping[str, Any]) -> list[str]:
    """Return the columns that say nothing about a prompt; PromptError if one is nearly the name of one that does."""
    known = (*FACT, *FACT_OPTIONS) if _is_fact(row) else (*PAIR, *PAIR_OPTIONS)
    prefixes = () if _is_fact(row) else (SPAN, CORRUPT_SPAN)
    others = [str(n) for n in row if n not in known and not str(n).startswith(prefixes)]
    for name in others:
        plain = name.strip().lower()
        close = difflib.get_close_matches(plain, [n for n in known if n not in row], 1, 0.75)
        if close or plain in known:
            raise PromptError(f"{where}: the column {name!r} is unknown: did you mean {(close or [plain])[0]!r}?")
    return others


def _prompt(where: str, row: Mapping[str, Any]) -> PromptPair | Fact:
    kind = FACT if _is_fact(row) else PAIR
    missing = [name for name in kind if not isinstance(row.get(name), str) or not row[name]]
    if missing:
        raise PromptError(
            f"{where} lacks {', '.join(missing)} (it has {', '.join(map(repr, row)) or 'nothing'}): pairs have clean, "
            "corrupt, answer and perhaps foil; facts have prompt, subject, answer"
        )
    if kind is FACT:
        occurrence = row.get("occurrence")
        return Fact(row["prompt"], row["subject"], row["answer"], _whole(where, "occurrence", occurrence))
    foil = row.get("foil") or None
    if foil is not None and not isinstance(foil, str):
        raise PromptError(f"{where}: foil must be a text, got {foil!r:.60}")
    pair = PromptPair(row["clean"], row["corrupt"], row["answer"], foil)
    try:
        for name, place in _spans(where, row, "spans", SPAN).items():
            pair = _with_span(pair, name, place)
        # found as the spans of a clean prompt are, in a pair whose clean prompt is the corrupt one
        other = PromptPair(pair.corrupt, pair.corrupt, pair.answer)
        for name, place in _spans(where, row, "corrupt_spans", CORRUPT_SPAN).items():
            other = _with_span(other, name, place)
        pair = replace(pair, corrupt_spans=other.spans)
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from None
    return pair


def _spans(where: str, row: Mapping[str, Any], key: str, prefix: str) -> dict[str, Any]:
    """Return the places of named spans: under ``key``, and in columns whose names begin with ``prefix``."""
    spans = row.get(key) or {}
    if not isinstance(spans, Mapping):
        raise PromptError(
            f'"{key}" must name words of the prompt, {{"subject": "Mary"}}, got {spans!r:.60}; in a CSV file a '
            f"span is a column of its own, {prefix}subject"
        )
    columns = {n.removeprefix(prefix): v for n, v in row.items() if str(n).startswith(prefix) and v not in (None, "")}
    return {**spans, **columns}


def _with_span(pair: PromptPair, name: str, place: Any) -> PromptPair:
    """Return a copy with one more span, given by its words, "[start:stop]", (start, stop), or (words, occurrence)."""
    if isinstance(place, str) and (match := RANGE.fullmatch(place)):
        place = (int(match[1]), int(match[2]))
    if isinstance(place, str) and place:
        return pair.span(name, place)
    if isinstance(place, Sequence) and len(place) == 2 and isinstance(place[1], int):
        if isinstance(place[0], str):
            return pair.span(name, place[0], occurrence=place[1])
        if isinstance(place[0], int) and 0 <= place[0] < place[1] <= len(pair.clean):
            return replace(pair, spans={**pair.spans, name: (place[0], place[1])})
    raise PromptError(
        f"span {name!r} must name words of the clean prompt, or characters of it as [start:stop] up to "
        f"{len(pair.clean)}, got {place!r:.60}"
    )


def _whole(where: str, name: str, value: Any) -> int | None:
    if value is None or value == "":
        return None
    try:
        number = float(value)
        if number == int(number) and not isinstance(value, bool):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise PromptError(f"{where}: {name} must be a whole number, got {value!r:.60}")
