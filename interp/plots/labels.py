"""Token labels with visible spaces, newlines and control characters."""

from __future__ import annotations

import unicodedata

import pandas as pd

ELLIPSIS = "…"
_NAMED = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡", "\u200d": "\u200d"}


def visible(token: str | None, limit: int = 24) -> str:
    """Return a token as a visible label: ``" John\\n"`` → ``"·John⏎"``.

    A label has at most ``limit`` characters.

    Control characters and characters that change the text direction are written as their code points, so that no token
    can hide, reorder or break the text around it. The zero-width joiner stays, because emoji need it.
    """
    if token is None or token is pd.NA:
        return ""
    if token == "":
        return "∅"
    shown = "".join(_visible_character(c) for c in token[: limit + 1])
    if unicodedata.category(token[0]).startswith("M"):
        shown = "◌" + shown  # a combining mark needs a base character
    return shown if len(shown) <= limit else shown[: limit - 1] + ELLIPSIS


def _visible_character(c: str) -> str:
    if c in _NAMED:
        return _NAMED[c]
    if ord(c) < 0x20:
        return chr(0x2400 + ord(c))
    if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"):
        return f"⟨{ord(c):X}⟩"
    return c
