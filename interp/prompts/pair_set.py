"""A set of prompt pairs, with its task's name and seed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, overload

from interp.errors import PromptError
from interp.prompts.pairs import PromptPair, listed_prompts
from interp.prompts.rows import PAIR, prompts_of_rows, row_of

if TYPE_CHECKING:
    import pandas as pd


class PairSet(Sequence[PromptPair]):
    """An immutable list of PromptPairs, with its task's name and seed.

        pairs = interp.PairSet.from_frame(pandas.read_csv("pairs.csv"))     # columns clean, corrupt, answer, foil
        both  = pairs + interp.tasks.ioi(model, n=8)
        both.frame().to_csv("all.csv", index=False)

    Raises PromptError for items that are no PromptPairs.
    """

    def __init__(self, pairs: Iterable[PromptPair], *, task: str = "custom", seed: int | None = None):
        self._pairs = tuple(listed_prompts(pairs, "PromptPairs"))
        wrong = next((p for p in self._pairs if not isinstance(p, PromptPair)), None)
        if wrong is not None:
            raise PromptError(f"a PairSet holds PromptPairs, got {type(wrong).__name__}: {wrong!r:.80}")
        self.task = task
        self.seed = seed

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, *, task: str = "custom", seed: int | None = None) -> PairSet:
        """Make a set of the rows of a table.

        Columns: clean, corrupt, answer, and optionally foil and one ``span:NAME`` for each span, which holds its words
        in the clean prompt or a range of characters, ``"[4:8]"``. Answers keep their leading space: read a file with
        ``pandas.read_csv(path, skipinitialspace=False)``, the default. Other columns are named in a warning. Raises one
        PromptError, which names the rows, for all that cannot be read.
        """
        if not hasattr(frame, "columns") or not hasattr(frame, "iterrows"):
            raise PromptError(f"a DataFrame expected, got {type(frame).__name__}: interp.PairSet(pairs) takes pairs")
        names = [str(name) for name in frame.columns]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise PromptError(f"the table has the column {twice[0]!r} twice")
        rows = (
            (f"row {label}", {n: v for n, v in zip(names, values, strict=True) if not _is_missing(v)})
            for label, values in zip(frame.index, frame.itertuples(index=False, name=None), strict=True)
        )
        pairs = prompts_of_rows(rows)
        if facts := [p for p in pairs if not isinstance(p, PromptPair)]:
            raise PromptError(f"a PairSet holds PromptPairs, and the table has {len(facts)} facts (a column prompt)")
        if not pairs:
            raise PromptError(f"the table has no rows (columns: {', '.join(names) or 'none'})")
        return cls([p for p in pairs if isinstance(p, PromptPair)], task=task, seed=seed)

    def frame(self) -> pd.DataFrame:
        """Return one row per pair, which `from_frame` reads back: clean, corrupt, answer, foil and ``span:NAME``."""
        import pandas as pd

        for i, pair in enumerate(self):
            if not all(isinstance(x, str) or x is None for x in (pair.clean, pair.corrupt, pair.answer, pair.foil)):
                raise PromptError(f"pair {i} is not text alone, so that a table cannot hold it")
        return pd.DataFrame([row_of(pair) for pair in self], columns=None if self._pairs else [*PAIR, "foil"])

    def __add__(self, other: Iterable[PromptPair]) -> PairSet:
        """Join two sets; the task's names are joined too if they differ, and a seed stays only if both have it."""
        if not isinstance(other, PairSet):
            other = PairSet(other, task=self.task, seed=self.seed)
        task = self.task if self.task == other.task else f"{self.task} + {other.task}"
        return PairSet((*self, *other), task=task, seed=self.seed if self.seed == other.seed else None)

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


def _is_missing(value: Any) -> bool:
    """Whether a table's cell is empty: None, NaN or pandas' NA."""
    import pandas as pd

    return value is None or (pd.api.types.is_scalar(value) and bool(pd.isna(value)))
