"""Tokens of a prompt, named by positions and spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from interp.errors import PromptError
from interp.sites import Tokens


class NamedTokens(Protocol):
    """A prompt whose positions can be named, such as `interp.prompts.pairs.Encoded`."""

    @property
    def tokens(self) -> Sequence[str]:
        """The text of every token."""
        ...

    @property
    def spans(self) -> Mapping[str, tuple[int, int]]:
        """Named ranges [start, stop) of tokens."""
        ...


def row_range(position: int | str, prompt: NamedTokens, what: str) -> tuple[int, int]:
    """Token rows [start, stop) of a position or a span; ``"name:first"`` and ``"name:last"`` are the span's ends.

    ``what``: who names it, for messages. Raises PromptError if the prompt does not have it.
    """
    n, spans = len(prompt.tokens), prompt.spans
    if isinstance(position, str):
        name, colon, end = position.rpartition(":")
        if colon and position not in spans and end in ("first", "last") and name in spans:
            start, stop = spans[name]
            return (start, start + 1) if end == "first" else (stop - 1, stop)
        if position not in spans:
            names = ", ".join(map(repr, spans)) or "none"
            raise PromptError(f"{what} names the span {position!r}, but the prompt's spans are: {names}")
        return spans[position]
    if not -n <= position < n:
        raise PromptError(f"{what}: position {position} is outside a prompt of {n} tokens {list(prompt.tokens)}")
    return position % n, position % n + 1


def token_rows(tokens: Tokens | None, prompt: NamedTokens, what: str) -> Sequence[int]:
    """All token rows that ``tokens`` names, in ascending order; None: every one.

    Raises PromptError for what is neither a position nor a span of the prompt, and for an empty list.
    """
    if tokens is None:
        return range(len(prompt.tokens))
    if isinstance(tokens, int | str):
        return range(*row_range(tokens, prompt, what))
    rows: set[int] = set()
    for item in tokens:
        if isinstance(item, bool) or not isinstance(item, int | str):
            raise PromptError(f"{what} names the token {item!r}: a position or the name of a span expected")
        rows.update(range(*row_range(item, prompt, what)))
    if not rows:
        raise PromptError(f"{what} is an empty list of tokens")
    return tuple(sorted(rows))
