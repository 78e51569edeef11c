"""Bytes and characters of a token, also of part of a character.

Byte-level vocabularies split rare characters into tokens that are not text by themselves; decoding one gives "\ufffd".
In this module such a token keeps its bytes: its label shows them, and its range is that of the character it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

Span = tuple[int, int]
REPLACEMENT = "\ufffd"


@cache
def byte_alphabet() -> dict[str, int]:
    """The printable characters that stand for bytes in byte-level vocabularies.

    The mapping is GPT-2's (Radford et al. 2019).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """The bytes of text that a token stands for.

    A special token stands for the bytes of its name.
    """
    text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
    if REPLACEMENT not in text or token_id in tokenizer.all_special_ids:
        return text.encode()
    name = tokenizer.convert_ids_to_tokens(token_id)
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):  # SentencePiece's byte fallback
        return bytes([int(byte[1], 16)])
    alphabet = byte_alphabet()
    return bytes(alphabet[c] for c in name) if all(c in alphabet for c in name) else text.encode()


def label(tokenizer: Any, token_id: int) -> str:
    r"""A token's text; bytes that are not a whole character are written ``\xf0\x9f``."""
    return token_bytes(tokenizer, token_id).decode("utf-8", errors="backslashreplace")


def offsets_by_bytes(text: str, pieces: Sequence[bytes]) -> list[Span] | None:
    """Character range of each piece of a text.

    A split character counts for every piece with a part of it. None if the pieces do not spell the text (a tokenizer
    that changes case, spaces or accents).
    """
    if b"".join(pieces) != text.encode():
        return None
    owner = [i for i, character in enumerate(text) for _ in character.encode()]  # byte -> character
    ranges, at = [], 0
    for piece in pieces:
        stop = at + len(piece)
        ranges.append((owner[at], owner[stop - 1] + 1) if piece else (0, 0))
        at = stop
    return ranges
