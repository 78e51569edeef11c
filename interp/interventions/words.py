"""Tokens, layers and heads as words: read from the text of an intervention, and written into it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.sites import Tokens


def read_flag(text: str) -> bool:
    """Read ``true`` or ``false``."""
    if text not in ("true", "false"):
        raise ValueError
    return text == "true"


def read_items(text: str) -> Sequence[int | str]:
    """Read comma-separated numbers, ranges (``8-19``) and names."""
    if match := re.fullmatch(r"(\d+)-(\d+)", text):
        return range(int(match[1]), int(match[2]) + 1)
    items: list[int | str] = []
    for item in text.split(","):
        if match := re.fullmatch(r"(\d+)-(\d+)", item):
            items += range(int(match[1]), int(match[2]) + 1)
        elif re.fullmatch(r"-?\d+", item):
            items.append(int(item))
        elif item:
            items.append(item)
        else:
            raise ValueError
    return items


def read_tokens(text: str) -> Tokens:
    """Read one position or name, or a list of them."""
    items = read_items(text)
    return items[0] if len(items) == 1 else items


def written(value: Any) -> str:
    """Write a value in the form that these functions read."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str):
        return format(value, ".17g") if isinstance(value, float) else str(value)
    if hasattr(value, "shape"):
        return f"<{'×'.join(map(str, value.shape))}>"
    if isinstance(value, range) and value.step == 1 and len(value) > 1 and value.start >= 0:
        return f"{value.start}-{value.stop - 1}"
    return ",".join(f"L{x[0]}H{x[1]}" if isinstance(x, tuple) else str(x) for x in value)


def say(tokens: Any) -> str:
    """Write tokens, layers or heads in words."""
    if tokens is None:
        return "all"
    if isinstance(tokens, range):
        return f"{tokens.start}–{tokens.stop - 1}" if tokens.step == 1 and len(tokens) > 1 else say(list(tokens))
    if isinstance(tokens, str | int):
        return str(tokens)
    return ", ".join(map(str, tokens))
