"""A set of prompt pairs, with its task's name and seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from interp.prompts.pairs import PromptPair


class PairSet(Sequence[PromptPair]):
    """An immutable list of PromptPairs, with its task's name and seed."""

    def __init__(self, pairs: Iterable[PromptPair], *, task: str = "custom", seed: int | None = None):
        self._pairs = tuple(pairs)
        self.task = task
        self.seed = seed

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> PromptPair: ...
    @overload
    def __getitem__(self, index: slice) -> PairSet: ...
    def __getitem__(self, index: int | slice) -> PromptPair | PairSet:
        if isinstance(index, slice):
            return PairSet(self._pairs[index], task=self.task, seed=self.seed)
        return self._pairs[index]

    def __iter__(self) -> Iterator[PromptPair]:
        return iter(self._pairs)

    def __repr__(self) -> str:
        first = f"; first: {self[0].clean!r} → {self[0].answer!r}" if self._pairs else ""
        return f"PairSet({self.task}, {len(self)} pairs{first})"
