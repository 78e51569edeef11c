"""`StatSpec`, which statistics to compute, and `AttentionStats`, the results.

Both have one field per row of `stats.STATISTICS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from headstats.stats import BY_NAME, STATISTICS, Result, Statistic, Value, tensors

if TYPE_CHECKING:
    from dataclasses import Field

LARGEST = 2**31 - 1  # of a number in StatSpec: backends count in 32 or 64 bits

Class = TypeVar("Class", bound=type)


def _dataclass_of(types: dict[str, str], defaults: dict[str, Any], frozen: bool) -> Callable[[Class], Class]:
    """A class decorator that adds one dataclass field for each name."""

    def add_fields(cls: Class) -> Class:
        cls.__annotations__ = types
        for name, default in defaults.items():
            setattr(cls, name, default)
        return dataclass(frozen=frozen, eq=frozen)(cls)

    return add_fields


def _type_in_spec(s: Statistic) -> str:
    if s.count:
        return "int"
    if isinstance(s.full, tuple):
        return "tuple[int, int] | Literal[False]"
    return "bool" if s.argument is None else "bool | None"


def _type_of_result(s: Statistic) -> str:
    if s.name == "topk":
        return "TopK | None"
    return f'{"Int" if s.name == "argmax" else "Float"}[Tensor, "{s.shape}"] | None'


@_dataclass_of(
    {s.name: _type_in_spec(s) for s in STATISTICS},
    {s.name: s.default for s in STATISTICS},
    frozen=True,
)
class StatSpec:
    """Which statistics to compute.

    A statistic that is not requested is None in the result and costs nothing.

    There is one field for each row of `STATISTICS`, whose column `default` gives its default:

    sink, topk, local, waad: a number, 0 or False for off.  fai: (nearest, farthest) distance of the queries that
    count, or False.  segments, targets, key_features, segment_value_norms, segment_outputs: None computes them when
    `attend` is given the argument they need (k_segments, targets or key_features); True requires that argument, False
    switches them off.  The others are switches.

        StatSpec(entropy=True, topk=8, sink=4)
    """

    if TYPE_CHECKING:  # the decorator writes the fields
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

        def __init__(self, **statistics: Value | None) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        for s in STATISTICS:
            value = getattr(self, s.name)
            if expected := _wrong(s, value):
                raise ValueError(f"StatSpec({s.name}={value!r}): {expected}")

    @classmethod
    def none(cls) -> StatSpec:
        """No statistics: attention alone."""
        return cls(**dict.fromkeys(BY_NAME, False))

    @classmethod
    def all(cls) -> StatSpec:
        """Every statistic whose argument is given, and all that need none.

        The numbers are sink=4, topk=8, local=8, waad=10, fai=(10, 100).
        """
        return cls(**{s.name: s.full for s in STATISTICS})

    def requested(self) -> dict[str, Value]:
        """The requested statistics, in the order of the table, with the value of each."""
        return {s.name: getattr(self, s.name) for s in STATISTICS if getattr(self, s.name)}


def _wrong(s: Statistic, value: Any) -> str | None:
    """What a statistic's field must hold, if the value is something else."""
    if s.count:
        if isinstance(value, int) and (value is False or (value is not True and 0 <= value <= LARGEST)):
            return None
        return f"{s.count}, an int from 0 (off) to 2**31 - 1"
    if isinstance(s.full, tuple):
        if value is False or (isinstance(value, tuple) and len(value) == 2 and all(type(x) is int for x in value)
                              and 0 <= value[0] <= value[1] <= LARGEST):  # fmt: skip
            return None
        return (
            "(nearest, farthest) distance in tokens, two ints with 0 <= nearest <= farthest < 2**31, or False, expected"
        )
    if isinstance(value, bool) or (s.argument and value is None):
        return None
    return f"True, False or None (when {s.argument} is given) expected" if s.argument else "True or False expected"


@_dataclass_of(
    {s.name: _type_of_result(s) for s in STATISTICS},
    {s.name: None for s in STATISTICS},
    frozen=False,
)
class AttentionStats:
    """The statistics of one call, one field for each row of `STATISTICS`.

    A statistic that was not requested is None.

    Shapes are those of the table. Float statistics are float32 (float64 for float64 inputs), indices int64.
    """

    if TYPE_CHECKING:  # the decorator writes the fields
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

        def __init__(self, **statistics: Result | None) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def as_dict(self) -> dict[str, Result]:
        """The statistics that were computed, by name."""
        return {s.name: getattr(self, s.name) for s in STATISTICS if getattr(self, s.name) is not None}

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}{list(tensors(value)[0].shape)}" for name, value in self.as_dict().items())
        return f"AttentionStats({shapes})"
