"""Rules of attention masks on token rows, without an n×n table.

A rule gives every query and every key a number, its class, and says for pairs of classes whether their cells are
opened or hidden. A mask is then a table over pairs of classes, and it is known without an
n×n table whether it changes anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Rows = Sequence[int]
Numbers = Int[Tensor, " tokens"]
Cells = Bool[Tensor, "queries keys"]
MOST_CLASSES = 256  # a rule with more classes of queries or keys costs as much as a dense mask


class Rule(Protocol):
    """What is opened (``opens``) or hidden, by classes of queries and keys."""

    opens: ClassVar[bool]

    def queries(self, rows: Numbers) -> Numbers:
        """The class of each query, by its token row; rows of padding are negative."""
        ...

    def keys(self, rows: Numbers) -> Numbers:
        """The class of each key."""
        ...

    def cells(self, queries: Int[Tensor, "queries 1"], keys: Int[Tensor, "1 keys"]) -> Cells:
        """Which pairs of a query's class and a key's are opened or hidden."""
        ...

    def changed(self, length: int) -> Bool[Tensor, " length"]:
        """The queries of a prompt of ``length`` tokens whose visible keys may change."""
        ...

    @property
    def opens_later(self) -> bool:
        """Whether a query may see a key that comes after it."""
        ...


def _is_in(rows: Numbers, tokens: Rows | None) -> Bool[Tensor, " tokens"]:
    """Which rows are among the tokens; None: all but padding."""
    if tokens is None:
        return rows >= 0
    if isinstance(tokens, range) and tokens.step == 1:
        return (rows >= tokens.start) & (rows < tokens.stop)
    return torch.isin(rows, torch.tensor(list(tokens), dtype=rows.dtype))


@dataclass(frozen=True)
class Opened:
    """Every query of one set of tokens sees every key of another."""

    of_queries: Rows | None
    of_keys: Rows | None
    opens: ClassVar[bool] = True

    def queries(self, rows: Numbers) -> Numbers:
        """1 for its queries."""
        return _is_in(rows, self.of_queries).long()

    def keys(self, rows: Numbers) -> Numbers:
        """1 for its keys."""
        return _is_in(rows, self.of_keys).long()

    def cells(self, queries: Tensor, keys: Tensor) -> Cells:
        """Both belong to the pair."""
        return (queries > 0) & (keys > 0)

    def changed(self, length: int) -> Bool[Tensor, " length"]:
        """All its queries; not a token that sees itself."""
        every = torch.arange(length)
        acts, keys = _is_in(every, self.of_queries), _is_in(every, self.of_keys)
        return acts & ~(keys & (keys.sum() == 1)) if self.opens else acts & keys.any()

    @property
    def opens_later(self) -> bool:
        """Whether its last key comes after its first query."""
        return self.of_keys is None or max(self.of_keys) > (0 if self.of_queries is None else min(self.of_queries))


@dataclass(frozen=True)
class Closed(Opened):
    """No query of one set of tokens sees a key of another."""

    opens: ClassVar[bool] = False

    @property
    def opens_later(self) -> bool:
        """Whether a query may see a later key: never."""
        return False


@dataclass(frozen=True)
class OpenedPast(Opened):
    """Every query sees those keys of a set of tokens that do not come after it."""

    @property
    def opens_later(self) -> bool:
        """Whether a query may see a later key: never."""
        return False

    @property
    def needs_rows(self) -> bool:
        """Whether there are too many keys for a class each."""
        return self.of_keys is None or len(self.of_keys) > MOST_CLASSES

    def queries(self, rows: Numbers) -> Numbers:
        """How many of the keys do not come after a query, for its queries; else 0."""
        if self.needs_rows:
            return torch.where(_is_in(rows, self.of_queries), rows + 1, 0)
        keys = torch.tensor(list(self.of_keys or ()), dtype=rows.dtype)
        return torch.where(_is_in(rows, self.of_queries), torch.searchsorted(keys, rows, right=True), 0)

    def keys(self, rows: Numbers) -> Numbers:
        """The number of a key among its keys, from 1; 0 for others."""
        if self.needs_rows:
            return torch.where(_is_in(rows, self.of_keys), rows + 1, 0)
        keys = torch.tensor(list(self.of_keys or ()), dtype=rows.dtype)
        return torch.where(_is_in(rows, self.of_keys), torch.searchsorted(keys, rows, right=True), 0)

    def cells(self, queries: Tensor, keys: Tensor) -> Cells:
        """The key is one of those that the query may see."""
        return (keys > 0) & (keys <= queries)


@dataclass(frozen=True)
class Blocks:
    """Tokens of one block see each other: blocks of one length, or ranges and lists of rows."""

    of: int | tuple[Rows, ...]
    opens: ClassVar[bool] = True

    @property
    def opens_later(self) -> bool:
        """Whether a query may see a later key: in every block of several tokens."""
        return self.of != 1

    def queries(self, rows: Numbers) -> Numbers:
        """The number of a token's block; −1 in none."""
        if isinstance(self.of, int):
            return torch.where(rows >= 0, rows // self.of, -1)
        return _number(rows, self.of)

    keys = queries

    def cells(self, queries: Tensor, keys: Tensor) -> Cells:
        """Both are in one block."""
        return (queries == keys) & (queries >= 0)

    def changed(self, length: int) -> Bool[Tensor, " length"]:
        """The tokens of blocks of more than one token."""
        numbers = self.queries(torch.arange(length))
        return (numbers >= 0) & (torch.bincount(numbers + 1, minlength=length + 1)[numbers + 1] > 1)


@dataclass(frozen=True)
class Segments:
    """A token sees no other segment than its own, and those that ``sees`` pairs with it."""

    of: tuple[Rows, ...]
    sees: frozenset[tuple[int, int]] = frozenset()
    last: int | None = None  # the prompt's last row, whose segment later rows are in
    opens: ClassVar[bool] = False

    @property
    def opens_later(self) -> bool:
        """Whether a query may see a later key: never."""
        return False

    def queries(self, rows: Numbers) -> Numbers:
        """The number of a token's segment; −1 in none."""
        return _number(rows if self.last is None else rows.clamp(max=self.last), self.of)

    keys = queries

    def cells(self, queries: Tensor, keys: Tensor) -> Cells:
        """They are in two segments, and the query's does not see the key's."""
        n = len(self.of)
        seen = torch.eye(n, dtype=torch.bool)
        for query, key in self.sees:
            seen[query, key] = True
        return (queries >= 0) & (keys >= 0) & ~seen[queries.clamp(min=0), keys.clamp(min=0)]

    def changed(self, length: int) -> Bool[Tensor, " length"]:
        """The tokens of a segment that does not see every other one."""
        numbers = self.queries(torch.arange(length))
        present = numbers[numbers >= 0].unique()
        hidden = self.cells(present[:, None], present[None]).any(-1)
        return torch.isin(numbers, present[hidden])


@dataclass(frozen=True)
class Strided:
    """A query sees keys at distances that are multiples of ``stride``, and with a window those inside it."""

    stride: int
    window: int | None = None
    opens: ClassVar[bool] = False

    @property
    def opens_later(self) -> bool:
        """Whether a query may see a later key: never."""
        return False

    @property
    def needs_rows(self) -> bool:
        """Whether the distance itself counts."""
        return self.window is not None

    def queries(self, rows: Numbers) -> Numbers:
        """The row's remainder; with a window the row itself."""
        return rows if self.needs_rows else torch.where(rows >= 0, rows % self.stride, -1)

    keys = queries

    def cells(self, queries: Tensor, keys: Tensor) -> Cells:
        """The distance is no multiple, and outside the window."""
        if self.window is None:
            return queries != keys
        distance = queries - keys
        return (distance % self.stride != 0) & (distance.abs() >= self.window)

    def changed(self, length: int) -> Bool[Tensor, " length"]:
        """All tokens, unless all distances are multiples or inside the window."""
        return torch.full((length,), self.stride > 1 and length > (self.window or 1))


def _number(rows: Numbers, sets: Sequence[Rows]) -> Numbers:
    """The number of the set in which each row is; −1 in none."""
    out = torch.full_like(rows, -1)
    for i, tokens in enumerate(sets):
        out[_is_in(rows, tokens)] = i
    return out
