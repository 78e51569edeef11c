"""Read JSON that somebody else may have written: any damage is one clear message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from interp.errors import InterpError


def parse_json(content: str | bytes) -> Any:
    """Return the value of a JSON text (bytes: UTF-8).

        parse_json('{"text": "a"}')     # {'text': 'a'}

    Raises ValueError, with a reason of a few words, for text that is not JSON, names a key twice, is nested too deeply,
    or holds a number of thousands of digits.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from None


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a dict. ValueError if a key is there twice: JSON does not say which one counts."""
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r:.60} is there twice")
    return table


def read_json(path: str | Path) -> Any:
    """Return the value of a JSON file. Raises InterpError, with the file's name, if it cannot be read."""
    try:
        return parse_json(Path(path).read_bytes())
    except (OSError, ValueError, MemoryError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InterpError(f"{path} cannot be read: {reason or type(error).__name__}") from None
