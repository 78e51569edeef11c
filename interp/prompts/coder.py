"""Prompts as token ids of one tokenizer, and the functions of a tokenizer that make them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from interp.prompts.model_input import as_listed
from interp.prompts.ranges import Span


@dataclass(frozen=True)
class Encoded:
    """One prompt (or aligned pair) as token ids of one tokenizer.

    ``spans`` are token ranges. For a `Fact` the corrupt ids equal the clean ones; noise is added later.
    ``changed_from``: the first position whose input differs although the ids agree (where another image begins).
    ``corrupt_side``: the corrupt prompt with its own spans, for pairs that are compared span by span; the two prompts
    may then differ in length. ``answer`` and ``foil``: their first tokens; ``answer_rest`` and ``foil_rest``: the
    others. `followed_by` appends tokens to the ids; ``tokens`` and ``spans`` remain those of the prompt.
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    foil: int | None
    tokens: tuple[str, ...]
    spans: Mapping[str, Span]
    changed_from: int | None = None
    corrupt_side: Encoded | None = None
    answer_rest: tuple[int, ...] = ()
    foil_rest: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """All tokens of the answer."""
        return (self.answer, *self.answer_rest)

    @property
    def foil_ids(self) -> tuple[int, ...]:
        """All tokens of the foil; empty without a foil."""
        return () if self.foil is None else (self.foil, *self.foil_rest)

    @property
    def appended(self) -> tuple[int, ...]:
        """The tokens that stand behind those of the prompt."""
        return tuple(self.clean[len(self.tokens) :])

    def followed_by(self, ids: tuple[int, ...]) -> Encoded:
        """Return the prompts with token ids behind them."""
        if not ids:
            return self
        other = None if self.corrupt_side is None else self.corrupt_side.followed_by(ids)
        return replace(self, clean=(*self.clean, *ids), corrupt=(*self.corrupt, *ids), corrupt_side=other)

    @property
    def longest(self) -> int:
        """Tokens of the longer one of the two prompts."""
        return max(len(self.clean), len(self.corrupt))

    @property
    def ids(self) -> list[Any]:
        """All token ids, for hashing: clean, corrupt, answer and foil."""
        answer = list(self.answer_ids) if self.answer_rest else self.answer
        foil = list(self.foil_ids) if self.foil_rest else self.foil
        return [as_listed(self.clean), as_listed(self.corrupt), answer, foil]

    @property
    def first_difference(self) -> int:
        """First position at which clean and corrupt differ.

        Returns their length if they are the same.
        """
        first = first_difference(self.clean, self.corrupt)
        return first if self.changed_from is None else min(first, self.changed_from)

    def role(self, position: int) -> str:
        """Name of the shortest span that covers a token, or ''."""
        inside = [(b - a, name) for name, (a, b) in self.spans.items() if a <= position < b]
        return min(inside)[1] if inside else ""


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """First index at which two equally long rows of token ids differ.

    Returns their length if they are the same.
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


class Following(NamedTuple):
    """The token ids of a text after a prompt.

    ``note``: what a user should know, "" if nothing. ``is_exact``: the tokenizer makes of prompt and text together the
    prompt's tokens and these.
    """

    ids: list[int]
    note: str = ""
    is_exact: bool = True


@dataclass(frozen=True)
class Coder:
    """The functions of a tokenizer that encoding needs; `Model.coder` provides them.

    ``encode(text)`` gives ids with the model's special tokens (token ids are checked and stay as they are);
    ``texts(ids)`` gives one string per token; ``offsets(text)`` the character range of each token of ``encode(text)``,
    (0, 0) for specials; ``continuation(text)`` the ids of a continuation, without special tokens.
    ``following(prompt, text)`` gives the ids of a text after this prompt.
    ``encode_image_pair(index, pair)`` encodes a pair of prompts with images, for a model that reads images.
    ``unknown``: the id that stands for every word that the vocabulary lacks; None if it can spell all words.
    ``name(ids, tokens, spans)``: told the named spans of every prompt that is encoded, for `Model.edited`.
    ``one_token``: why an answer of this model can have one token alone; "" if it can have several.
    """

    encode: Callable[[Any], list[int]]
    texts: Callable[[Sequence[int]], list[str]] = field(repr=False)
    offsets: Callable[[Any], list[Span]] = field(repr=False)
    continuation: Callable[[str], list[int]] = field(repr=False)
    encode_image_pair: Callable[[int, Any], Encoded] | None = field(default=None, repr=False)
    unknown: int | None = None
    following: Callable[[Any, str], Following] | None = field(default=None, repr=False)
    name: Callable[[Sequence[int], Sequence[str], Mapping[str, Span]], None] | None = field(default=None, repr=False)
    one_token: str = ""
