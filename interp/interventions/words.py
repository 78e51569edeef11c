"""Tokens, layers and heads as words: read from the text of an intervention, and written into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from interp.errors import InterpError
from interp.utils.provenance import weights_hash

if TYPE_CHECKING:
    from interp.sites import Tokens


def parse_fields(
    text: str, readers: Mapping[str, Callable[[str], Any]], what: str, bare: Sequence[str] = ()
) -> dict[str, Any]:
    """Read ``name=value`` fields, separated by spaces; those of ``bare`` may be written without a value, as true.

    Raises InterpError for a name that has no reader, a repeated one, and a value that its reader refuses.
    """
    values: dict[str, Any] = {}
    for word in text.split():
        name, equals, value = word.partition("=")
        read = readers.get(name)
        if read is None or name in values or not (equals or name in bare):
            raise InterpError(
                f"cannot read {word!r} in the {what} {text!r}: fields are written name=value, once each, separated by "
                f"spaces; they are {', '.join(readers)}"
            )
        try:
            values[name] = read(value or "true" if name in bare else value)
        except ValueError:
            why = "tensors are given in Python alone" if value.startswith("<") else "bad value"
            raise InterpError(f"cannot read {word!r} in the {what} {text!r}: {why}") from None
    return values


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


def read_shares(text: str) -> dict[int | str, float]:
    """Read numbers by position or span: ``S1=0.5,-4=0.5``."""
    shares: dict[int | str, float] = {}
    for item in text.split(","):
        name, equals, share = item.rpartition("=")
        if not (name and equals) or name in shares:
            raise ValueError
        shares[int(name) if re.fullmatch(r"-?\d+", name) else name] = float(share)
    return shares


def written(value: Any) -> str:
    """Write a value in the form that these functions read; of a tensor, which they do not, its shape and a hash."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | str):
        return format(value, ".17g") if isinstance(value, float) else str(value)
    if isinstance(value, Mapping):
        return ",".join(f"{name}={written(float(share))}" for name, share in value.items())
    if hasattr(value, "shape"):
        return f"<{'×'.join(map(str, value.shape))}:{weights_hash([('', value)])[:12]}>"
    if isinstance(value, range) and value.step == 1 and len(value) > 1 and value.start >= 0:
        return f"{value.start}-{value.stop - 1}"
    return ",".join(f"L{x[0]}H{x[1]}" if isinstance(x, tuple) else str(x) for x in value)


def shortened(text: str, most: int = 60) -> str:
    """Cut a text that is longer than ``most`` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def say(tokens: Any) -> str:
    """Write tokens, layers or heads in words."""
    if tokens is None:
        return "all"
    if isinstance(tokens, range):
        return f"{tokens.start}–{tokens.stop - 1}" if tokens.step == 1 and len(tokens) > 1 else say(list(tokens))
    if isinstance(tokens, str | int):
        return str(tokens)
    return ", ".join(map(str, tokens))
