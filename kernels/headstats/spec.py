"""What to compute (StatSpec), and what came out (AttentionStats): one field for each row of `stats.STATISTICS`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from headstats.stats import ARGUMENT, BY_NAME, STATISTICS, Result, TopK, Value, tensors

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

COUNTS = {
    "sink": "the number of leading keys",
    "topk": "the number of keys",
    "local": "the window, which counts the query's own position",
    "waad": "the distance at which to clip",
}


@dataclass(frozen=True)
class StatSpec:
    """Which statistics to compute. What is not asked for is None in the result and costs nothing.

    sink, topk, local, waad: a number, 0 or False for off.  fai: (nearest, farthest) distance of the queries that
    count, or False.  segments, targets, key_features, segment_value_norms, segment_outputs: None computes them when
    `attend` is given the argument they need (k_segments, targets or key_features); True insists, False switches off.
    The others are switches.
    """

    entropy: bool = True
    entropy_normalised: bool = False
    max_prob: bool = True
    argmax: bool = True
    topk: int = 0
    participation: bool = False
    effective_keys: bool = False
    distance: bool = True
    distance_var: bool = False
    waad: int = 0
    sink: int = 4
    diagonal: bool = False
    previous: bool = False
    local: int = 0
    segments: bool | None = None
    targets: bool | None = None
    key_features: bool | None = None
    value_norm: bool = False
    segment_value_norms: bool | None = False
    segment_outputs: bool | None = False
    received: bool = False
    received_max: bool = False
    fai: tuple[int, int] | Literal[False] = False
    column_norm: bool = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if allowed := _wrong(f.name, value):
                raise ValueError(f"StatSpec({f.name}={value!r}): {allowed}")

    @classmethod
    def none(cls) -> StatSpec:
        """No statistics: attention alone."""
        switches: dict[str, Any] = dict.fromkeys(BY_NAME, False)
        return cls(**switches)

    @classmethod
    def all(cls) -> StatSpec:
        """Every statistic in the table: sink=4, topk=8, local=8, waad=10, fai=(10, 100), and those given arguments."""
        switches: dict[str, Any] = {s.name: s.full for s in STATISTICS}
        return cls(**switches)

    def requested(self) -> dict[str, Value]:
        """The statistics asked for, in table order, with the value given for each."""
        return {s.name: getattr(self, s.name) for s in STATISTICS if getattr(self, s.name)}


def _wrong(name: str, value: Any) -> str | None:
    """What is allowed, if the value is not."""
    if name in COUNTS:
        if isinstance(value, int) and (value is False or (value is not True and value >= 0)):
            return None
        return f"{COUNTS[name]}, an int >= 0 (0 turns it off)"
    if name == "fai":
        if value is False or (isinstance(value, tuple) and len(value) == 2 and all(type(x) is int for x in value)
                              and 0 <= value[0] <= value[1]):  # fmt: skip
            return None
        return "(nearest, farthest) distance in tokens, two ints with 0 <= nearest <= farthest, or False expected"
    if isinstance(value, bool) or (name in ARGUMENT and value is None):
        return None
    return (
        f"True, False or None (when {ARGUMENT[name]} is given) expected"
        if name in ARGUMENT
        else "True or False expected"
    )


@dataclass(eq=False)
class AttentionStats:
    """The statistics of one call. Float statistics are float32 (float64 for float64 inputs), indices int64."""

    entropy: Float[Tensor, "B H M"] | None = None
    entropy_normalised: Float[Tensor, "B H M"] | None = None
    max_prob: Float[Tensor, "B H M"] | None = None
    argmax: Int[Tensor, "B H M"] | None = None
    topk: TopK | None = None
    participation: Float[Tensor, "B H M"] | None = None
    effective_keys: Float[Tensor, "B H M"] | None = None
    distance: Float[Tensor, "B H M"] | None = None
    distance_var: Float[Tensor, "B H M"] | None = None
    waad: Float[Tensor, "B H M"] | None = None
    sink: Float[Tensor, "B H M"] | None = None
    diagonal: Float[Tensor, "B H M"] | None = None
    previous: Float[Tensor, "B H M"] | None = None
    local: Float[Tensor, "B H M"] | None = None
    segments: Float[Tensor, "B H M S"] | None = None
    targets: Float[Tensor, "B H M T"] | None = None
    key_features: Float[Tensor, "B H M F"] | None = None
    value_norm: Float[Tensor, "B H M"] | None = None
    segment_value_norms: Float[Tensor, "B H M S"] | None = None
    segment_outputs: Float[Tensor, "B H M S Dv"] | None = None
    received: Float[Tensor, "B H N"] | None = None
    received_max: Float[Tensor, "B H N"] | None = None
    fai: Float[Tensor, "B H N"] | None = None
    column_norm: Float[Tensor, "B H N"] | None = None

    def as_dict(self) -> dict[str, Result]:
        """The statistics that were computed, by name."""
        return {s.name: getattr(self, s.name) for s in STATISTICS if getattr(self, s.name) is not None}

    def __repr__(self) -> str:
        inner = ", ".join(f"{name}{list(tensors(value)[0].shape)}" for name, value in self.as_dict().items())
        return f"AttentionStats({inner})"
