"""Pairs with almost no difference between the clean and the corrupt run.

Recovery divides by that difference (the gap). A pair with a hundredth of the others' gap has a recovery that is mostly
noise, and a mean over pairs gives it a hundred times the weight that it has in the ratio of means (``pooled``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SMALL = 0.1  # a gap below this share of the mean gap is small
PAIR_KEYS = ["example", "model", "task", "metric", "read_at"]


@dataclass(frozen=True)
class SmallGaps:
    """How many pairs have a small gap. ``least``, ``most``: of theirs; ``mean``: over all pairs with a recovery."""

    n: int
    n_pairs: int
    least: float
    most: float
    mean: float
    metric: str

    def __bool__(self) -> bool:
        return self.n > 0

    def __str__(self) -> str:
        gaps = f"{self.least:.2g}" if self.n == 1 else f"{self.least:.2g} to {self.most:.2g}"
        return (
            f"{self.n} of {self.n_pairs} pairs have almost no difference in {self.metric} between clean and corrupt "
            f"({gaps}, where the mean is {self.mean:.3g}): their recovery is mostly noise and weighs as much as any "
            "other in the mean (effect). The ratio of means (pooled) is not affected, and ranks the sites"
        )


def small_gaps(frame: Any) -> SmallGaps:
    """Return the pairs of a table whose gap is below `SMALL` of the mean gap, for the metric with most of them.

    Pairs without any recovery (their gap is within rounding) do not count.
    """
    pairs = frame.loc[frame["effect"].notna(), [*PAIR_KEYS, "clean", "corrupt"]].drop_duplicates(PAIR_KEYS)
    worst = SmallGaps(0, 0, np.nan, np.nan, np.nan, "")
    for keys, part in pairs.groupby(["model", "task", "read_at", "metric"], dropna=False, observed=True, sort=False):
        gap = (part["clean"] - part["corrupt"]).abs().to_numpy(dtype=float)
        small = gap[gap < SMALL * gap.mean()]
        if len(small) > worst.n:
            worst = SmallGaps(len(small), len(gap), small.min(), small.max(), gap.mean(), str(keys[-1]))
    return worst
