"""Summaries of each head's statistics over batch and position.

They can be merged over batches and shards. A summary stores count, mean and the sum of squared deviations M2. Two parts
a and b are merged (Chan, Golub and LeVeque 1979) by
    n = n_a + n_b        d = mean_b - mean_a
    mean = mean_a + d n_b / n        M2 = M2_a + M2_b + d^2 n_a n_b / n
Unlike sums of squares, this loses no digits where the mean is large compared with the spread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstats.stats import BY_NAME, broadcast_rows, tensors

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from headstats.api import Attended


@dataclass(frozen=True, eq=False)
class Moments:
    """Moments of one statistic for each head; float64, on the CPU.

    Further axes (segments, ...) are kept.

    count: number of values that were counted.  m2: sum of (x - mean)^2.  low, high: the smallest and the largest value.
    Where count is 0, mean and m2 are 0, low is inf and high is -inf.
    """

    count: Int[Tensor, " H"]
    mean: Float[Tensor, " H *rest"]
    m2: Float[Tensor, " H *rest"]
    low: Float[Tensor, " H *rest"]
    high: Float[Tensor, " H *rest"]

    @classmethod
    def of(cls, x: Float[Tensor, "B H P *rest"], counted: Bool[Tensor, "#B #H P"]) -> Moments:
        """Compute the moments over the batch rows and positions that are counted."""
        x = x.detach().cpu().double()  # some devices have no float64
        counted = counted.cpu().expand(x.shape[:3])
        is_counted, count = broadcast_rows(counted, x), counted.sum((0, 2))
        n = broadcast_rows(count.clamp_min(1), x[0, :, 0])
        mean = torch.where(is_counted, x, 0).sum((0, 2)) / n
        deviation = torch.where(is_counted, x - mean[:, None], 0)
        residual = deviation.sum((0, 2))  # the rounding error of the mean, times n
        m2 = (deviation.square().sum((0, 2)) - residual.square() / n).clamp_min(0)
        low, high = (torch.where(is_counted, x, fill).transpose(1, 2).flatten(0, 1) for fill in (torch.inf, -torch.inf))
        return cls(count, mean + residual / n, m2, low.amin(0), high.amax(0))

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both parts together."""
        count = self.count + other.count
        n_a, n_b = (broadcast_rows(x.double(), self.mean) for x in (self.count, other.count))
        share, d = n_b / (n_a + n_b).clamp_min(1), other.mean - self.mean
        m2 = self.m2 + other.m2 + d.square() * n_a * share
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Moments(count, self.mean + d * share, m2, low, high)

    @property
    def variance(self) -> Float[Tensor, " H *rest"]:
        """Mean squared deviation of the counted values, m2 / count; 0 where count is 0."""
        return self.m2 / broadcast_rows(self.count.clamp_min(1), self.m2)


PARTS = tuple(f.name for f in fields(Moments))


@dataclass(frozen=True, eq=False, repr=False)
class HeadSummary:
    """Moments of each statistic of each head.

    `HeadSummary()` is empty; merging it changes nothing.

        total = HeadSummary()
        total += HeadSummary.of(headstats.attend(q, k, v))
        total["entropy"].mean  # [H]
    """

    moments: dict[str, Moments] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        result: Attended,
        *,
        queries: Bool[Tensor, "#B M"] | None = None,
        keys: Bool[Tensor, "#B N"] | None = None,
    ) -> HeadSummary:
        """Summarise the result of one call of `attend`.

        queries, keys: which of them count, for statistics of queries and of keys; False for padding. None = all.
            Queries that see no key are never counted.
        Indices are not averaged: argmax is left out, and topk is summarised by its weights.
        """
        seen = result.lse != -torch.inf
        masks = {"query": queries, "key": keys}
        moments = {}
        for name, value in result.stats.as_dict().items():
            x, axis = tensors(value)[0], BY_NAME[name].axis
            if x.is_floating_point():
                counted = _counted("queries" if axis == "query" else "keys", masks[axis], x)
                moments[name] = Moments.of(x, counted & seen if axis == "query" else counted)
        return cls(moments)

    def merge(self, other: HeadSummary) -> HeadSummary:
        """Merge two summaries: exact except for rounding, in any order.

        Also written a + b.
        """
        if not self.moments or not other.moments:
            return self if self.moments else other
        if self.moments.keys() != other.moments.keys():
            differing = ", ".join(sorted(self.moments.keys() ^ other.moments.keys()))
            raise ValueError(f"only one of the summaries has {differing}: join summaries of the same statistics")
        for name, mine in self.moments.items():
            if mine.mean.shape != other[name].mean.shape:
                raise ValueError(
                    f"{name} is {list(mine.mean.shape)} in one summary and {list(other[name].mean.shape)} in the "
                    "other: join summaries with the same heads and segments"
                )
        return HeadSummary({name: mine.merge(other[name]) for name, mine in self.moments.items()})

    __add__ = merge

    def __getitem__(self, name: str) -> Moments:
        if name not in self.moments:
            raise KeyError(f"{name!r} is not in this summary, which has {', '.join(self.moments) or 'nothing'}")
        return self.moments[name]

    def tensors(self) -> dict[str, Tensor]:
        """Return all numbers as tensors by name ("entropy.mean"), for storage."""
        return {f"{name}.{part}": getattr(x, part) for name, x in self.moments.items() for part in PARTS}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> HeadSummary:
        """Rebuild a summary from what `tensors` returned."""
        names = list(dict.fromkeys(key.rpartition(".")[0] for key in stored))
        expected = {f"{name}.{part}" for name in names for part in PARTS}
        if expected != set(stored):
            unexpected = ", ".join(sorted(expected ^ set(stored)))
            raise ValueError(f"missing or unknown: {unexpected}. The tensors of HeadSummary.tensors() expected")
        return cls({name: Moments(**{part: stored[f"{name}.{part}"] for part in PARTS}) for name in names})

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}{list(x.mean.shape)}" for name, x in self.moments.items())
        largest_count = max((int(x.count.max()) for x in self.moments.values()), default=0)
        return f"HeadSummary({inner or 'empty'}; up to {largest_count} positions a head)"


def _counted(name: str, mask: Any, x: Float[Tensor, "B H P *rest"]) -> Bool[Tensor, "#B 1 P"]:
    if mask is None:
        return torch.ones(1, 1, x.shape[2], dtype=torch.bool, device=x.device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} is {kind}: a bool tensor expected, True = counts")
    if mask.dim() != 2 or mask.shape[0] not in (1, x.shape[0]) or mask.shape[1] != x.shape[2]:
        raise ValueError(f"{name} has shape {list(mask.shape)}: [{x.shape[0]}, {x.shape[2]}] expected")
    return mask[:, None].to(x.device)
