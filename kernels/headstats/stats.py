"""What each statistic means. This table is the one place where a statistic is defined.

Every entry gives its formula on the full pattern (`dense`), which is what the reference backend runs and
what every other backend is tested against. To add a statistic: add a field to `StatSpec` and to
`AttentionStats`, and a row to `STATISTICS`. The reference and blocked backends then compute it, and the tests
over the table cover it; a faster form for blocked tiles (`blocked.FAST`) or for Triton is optional.

One rule holds for all of them: they describe the weights p_ij that multiply the values, after mask, bias and
softcap and before the gate. A learned sink takes mass away from the row (sum_j p_ij < 1) but is no key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass
class Pattern:
    """A pattern, or the part of one that holds all keys visible to some queries; any leading dimensions."""

    p: Float[Tensor, "*lead m n"]  # weights, 0 where hidden
    scores: Float[Tensor, "*lead m n"]  # logits after scale, softcap, bias; about -1e30 where hidden
    log_norm: Float[Tensor, "*lead m"]  # log-sum-exp of the row (with the learned sink); 0 where no key is visible
    visible: Bool[Tensor, "*#lead m n"]
    distance: Float[Tensor, "m n"]  # i + N - M - j, in tokens
    key_rank: Int[Tensor, "*#lead #m n"]  # 0, 1, ... counts real keys from the left; N for padded keys
    real_query: Bool[Tensor, "*#lead m #n"]


@dataclass(frozen=True)
class Statistic:
    """One row of the table.

    axis: "query" gives one number for each [B, H, M]; "key" one for each [B, H, N].
    empty: the value for a query that sees no key, or for a key that no query sees.
    dense: (pattern, the value given in StatSpec) -> statistic over the last axis; for axis="key", the sum over
        the pattern's queries, which is then divided by the number of real queries that can see the key.
    default: what StatSpec() asks for.  full: what StatSpec.all() asks for.
    """

    name: str
    axis: Literal["query", "key"]
    unit: str
    range: str
    definition: str
    source: str
    dense: Callable[[Pattern, int | bool], Tensor]
    empty: float = 0
    default: int | bool = False
    full: int | bool = True


def _entropy(a: Pattern, _) -> Tensor:
    # log p = score - log_norm keeps its accuracy where p underflows; hidden cells carry no p.
    log_p = torch.where(a.visible, a.scores - a.log_norm[..., None], 0.0)
    return -(a.p * log_p).sum(-1)


def _argmax(a: Pattern, _) -> Tensor:
    n = a.scores.shape[-1]
    keys = torch.arange(n, device=a.scores.device)
    best = a.scores.amax(-1, keepdim=True)
    first = torch.where(a.visible & (a.scores == best), keys, n).amin(-1)  # ties go to the leftmost key
    return torch.where(first == n, -1, first)


def _max_prob(a: Pattern, _) -> Tensor:
    return a.p.amax(-1)


def _at_distance(a: Pattern, d: int) -> Tensor:
    return (a.p * (a.distance == d)).sum(-1)


STATISTICS: tuple[Statistic, ...] = (
    Statistic(
        "entropy", "query", "nats", "[0, ln n_visible]", "-sum_j p_ij ln p_ij", "Shannon 1948", _entropy, default=True
    ),
    Statistic("max_prob", "query", "probability", "[0, 1]", "max_j p_ij", "", _max_prob, default=True),
    Statistic(
        "argmax", "query", "key index", "-1 ... N-1", "the leftmost j with the largest p_ij", "", _argmax,
        empty=-1, default=True,
    ),
    Statistic(
        "sink", "query", "probability", "[0, 1]", "sum of p_ij over the first k real keys of the row (sink=k)",
        "after Gu et al. 2024, When Attention Sink Emerges",
        lambda a, k: (a.p * (a.key_rank < int(k))).sum(-1), default=4, full=4,
    ),
    Statistic(
        "distance", "query", "tokens", "[1-M, N-1]", "sum_j p_ij (i + N - M - j); never negative when causal",
        "head span, Attention Illuminates LLM Reasoning (arXiv 2510.13554), Eq. 7",
        lambda a, _: (a.p * a.distance).sum(-1), default=True,
    ),
    Statistic(
        "diagonal", "query", "probability", "[0, 1]", "p_ij at j = i + N - M, the query's own position", "",
        lambda a, _: _at_distance(a, 0),
    ),
    Statistic(
        "previous", "query", "probability", "[0, 1]", "p_ij at j = i + N - M - 1, the position before the query",
        "previous-token score, Olsson et al. 2022", lambda a, _: _at_distance(a, 1),
    ),
    Statistic(
        "participation", "query", "probability", "[0, 1]", "sum_j p_ij^2; its inverse is the effective number of keys",
        "inverse participation ratio", lambda a, _: a.p.square().sum(-1),
    ),
    Statistic(
        "received", "key", "probability", "[0, 1]", "mean of p_ij over the real queries i that can see key j",
        "alpha_k of Gu et al. 2024, When Attention Sink Emerges", lambda a, _: (a.p * a.real_query).sum(-2),
    ),
)  # fmt: skip
BY_NAME = {s.name: s for s in STATISTICS}


@dataclass(frozen=True)
class StatSpec:
    """Which statistics to compute. What is not asked for is None in the result and costs nothing.

    `sink` is the number of leading keys whose mass is summed (0 or False: not computed); the others are switches.
    """

    entropy: bool = True
    max_prob: bool = True
    argmax: bool = True
    sink: int = 4
    distance: bool = True
    diagonal: bool = False
    previous: bool = False
    participation: bool = False
    received: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "sink":
                if isinstance(value, int) and (value is False or (value is not True and value >= 0)):
                    continue
                raise ValueError(f"StatSpec(sink={value!r}): the number of leading keys, an int >= 0 (0 turns it off)")
            if not isinstance(value, bool):
                raise ValueError(f"StatSpec({f.name}={value!r}): True or False expected")

    @classmethod
    def none(cls) -> StatSpec:
        """No statistics: attention alone."""
        switches: dict[str, Any] = dict.fromkeys(BY_NAME, False)
        return cls(**switches)

    @classmethod
    def all(cls) -> StatSpec:
        """Every statistic in the table, with sink=4."""
        switches: dict[str, Any] = {s.name: s.full for s in STATISTICS}
        return cls(**switches)

    def requested(self) -> dict[str, int | bool]:
        """The statistics asked for, in table order, with the value given for each."""
        return {s.name: getattr(self, s.name) for s in STATISTICS if getattr(self, s.name)}


@dataclass(eq=False)
class AttentionStats:
    """The statistics of one call. Float statistics are float32 (float64 for float64 inputs), argmax int64."""

    entropy: Float[Tensor, "B H M"] | None = None
    max_prob: Float[Tensor, "B H M"] | None = None
    argmax: Int[Tensor, "B H M"] | None = None
    sink: Float[Tensor, "B H M"] | None = None
    distance: Float[Tensor, "B H M"] | None = None
    diagonal: Float[Tensor, "B H M"] | None = None
    previous: Float[Tensor, "B H M"] | None = None
    participation: Float[Tensor, "B H M"] | None = None
    received: Float[Tensor, "B H N"] | None = None

    def as_dict(self) -> dict[str, Tensor]:
        """The statistics that were computed, by name."""
        return {s.name: getattr(self, s.name) for s in STATISTICS if getattr(self, s.name) is not None}

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}{list(value.shape)}" for name, value in self.as_dict().items())
        return f"AttentionStats({inner})"
