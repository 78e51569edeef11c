"""Statistics of each head over batch and position, that can be joined: over the batches of a corpus, over shards.

Held are count, mean and the sum of squared deviations M2. Two parts a and b join (Chan, Golub and LeVeque 1979) by
    n = n_a + n_b        d = mean_b - mean_a
    mean = mean_a + d n_b / n        M2 = M2_a + M2_b + d^2 n_a n_b / n
which loses no digits where the mean is large beside the spread, as sums of squares would.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headstats.stats import BY_NAME, over_rows, tensors

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

    from headstats.api import Attended


@dataclass(frozen=True, eq=False)
class Moments:
    """Of one statistic, for each head; float64, on the CPU. Statistics with further axes (segments, ...) keep them.

    count: of what counted.  m2: sum of (x - mean)^2.  low, high: the least and the largest; inf and -inf where count
    is 0, mean and m2 are 0 then.
    """

    count: Int[Tensor, " H"]
    mean: Float[Tensor, " H *rest"]
    m2: Float[Tensor, " H *rest"]
    low: Float[Tensor, " H *rest"]
    high: Float[Tensor, " H *rest"]

    @classmethod
    def of(cls, x: Float[Tensor, "B H P *rest"], counted: Bool[Tensor, "#B #H P"]) -> Moments:
        """Over batch rows and positions, those that are counted."""
        x = x.detach().cpu().double()  # some devices have no float64
        counted = counted.cpu().expand(x.shape[:3])
        inside, count = over_rows(counted, x), counted.sum((0, 2))
        n = over_rows(count.clamp_min(1), x[0, :, 0])
        mean = torch.where(inside, x, 0).sum((0, 2)) / n
        away = torch.where(inside, x - mean[:, None], 0)
        rest = away.sum((0, 2))  # what rounding left in the mean
        m2 = (away.square().sum((0, 2)) - rest.square() / n).clamp_min(0)
        low, high = (torch.where(inside, x, end).transpose(1, 2).flatten(0, 1) for end in (torch.inf, -torch.inf))
        return cls(count, mean + rest / n, m2, low.amin(0), high.amax(0))

    def merge(self, other: Moments) -> Moments:
        """Of both parts together."""
        count = self.count + other.count
        n_a, n_b = (over_rows(x.double(), self.mean) for x in (self.count, other.count))
        share, d = n_b / (n_a + n_b).clamp_min(1), other.mean - self.mean
        m2 = self.m2 + other.m2 + d.square() * n_a * share
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        return Moments(count, self.mean + d * share, m2, low, high)

    @property
    def variance(self) -> Float[Tensor, " H *rest"]:
        """Mean squared deviation of what was counted, m2 / count; 0 where nothing was."""
        return self.m2 / over_rows(self.count.clamp_min(1), self.m2)


PARTS = tuple(f.name for f in fields(Moments))


@dataclass(frozen=True, eq=False, repr=False)
class HeadSummary:
    """Moments of each statistic of each head. `HeadSummary()` is empty, and neutral when joined."""

    moments: dict[str, Moments] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        result: Attended,
        *,
        queries: Bool[Tensor, "#B M"] | None = None,
        keys: Bool[Tensor, "#B N"] | None = None,
    ) -> HeadSummary:
        """Of one call of `attend`.

        queries, keys: which of them count, for statistics of queries and of keys; False for padding. None = all.
            Queries that see no key are never counted.
        Places are not averaged: argmax is left out, and of topk the weights are kept.
        """
        seen = result.lse != -torch.inf
        chosen = {"query": queries, "key": keys}
        moments = {}
        for name, value in result.stats.as_dict().items():
            x, axis = tensors(value)[0], BY_NAME[name].axis
            if x.is_floating_point():
                counted = _counted("queries" if axis == "query" else "keys", chosen[axis], x)
                moments[name] = Moments.of(x, counted & seen if axis == "query" else counted)
        return cls(moments)

    def merge(self, other: HeadSummary) -> HeadSummary:
        """Of both together: exact but for rounding, whatever the order. Also written a + b."""
        if not self.moments or not other.moments:
            return self if self.moments else other
        if self.moments.keys() != other.moments.keys():
            differ = ", ".join(sorted(self.moments.keys() ^ other.moments.keys()))
            raise ValueError(f"only one of the summaries has {differ}: join summaries of the same statistics")
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
        """All numbers by name ("entropy.mean"), to be stored by whatever stores tensors."""
        return {f"{name}.{part}": getattr(x, part) for name, x in self.moments.items() for part in PARTS}

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor]) -> HeadSummary:
        """What `tensors` gave."""
        names = list(dict.fromkeys(key.rpartition(".")[0] for key in stored))
        expected = {f"{name}.{part}" for name in names for part in PARTS}
        if expected != set(stored):
            wrong = ", ".join(sorted(expected ^ set(stored)))
            raise ValueError(f"missing or unknown: {wrong}. The tensors of HeadSummary.tensors() expected")
        return cls({name: Moments(**{part: stored[f"{name}.{part}"] for part in PARTS}) for name in names})

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}{list(x.mean.shape)}" for name, x in self.moments.items())
        most = max((int(x.count.max()) for x in self.moments.values()), default=0)
        return f"HeadSummary({inner or 'empty'}; up to {most} positions a head)"


def _counted(name: str, mask: Any, x: Float[Tensor, "B H P *rest"]) -> Bool[Tensor, "#B 1 P"]:
    if mask is None:
        return torch.ones(1, 1, x.shape[2], dtype=torch.bool, device=x.device)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        given = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name} is {given}: a bool tensor expected, True = counts")
    if mask.dim() != 2 or mask.shape[0] not in (1, x.shape[0]) or mask.shape[1] != x.shape[2]:
        raise ValueError(f"{name} has shape {list(mask.shape)}: [{x.shape[0]}, {x.shape[2]}] expected")
    return mask[:, None].to(x.device)
