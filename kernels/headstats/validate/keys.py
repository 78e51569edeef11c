"""Checks of the arguments about keys: segments, targets, features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headstats.edit import TABLES
from headstats.spec import StatSpec
from headstats.stats import ARGUMENT
from headstats.validate.values import check_values, is_tracing

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)  # those that fit into int64


@dataclass(frozen=True)
class Sizes:
    """Sizes of a call: M queries, N keys, values of size Dv.

    N includes the keys of a shared prefix.
    """

    b: int
    h: int
    m: int
    n: int
    dv: int
    prefix: bool

    @property
    def rows(self) -> tuple[int, int, int]:
        """Batch, heads, queries."""
        return self.b, self.h, self.m


def check_tensor(name: str, t: Any, q: Tensor, floating: bool = True) -> None:
    """Raise unless `t` is a tensor on q's device, and floating if `floating`."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} is a {type(t).__name__}: a torch.Tensor expected, or None")
    if floating and not t.is_floating_point():
        raise TypeError(f"{name} has dtype {t.dtype}: a floating dtype expected")
    if t.device != q.device:
        raise ValueError(f"{name} is on {t.device} but q is on {q.device}: one device expected")


def widen(t: Tensor, q: Tensor) -> Tensor:
    """Return a small parameter in the dtype of logits, before any arithmetic with it."""
    return t.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def resolve_spec(spec: StatSpec, arguments: dict[str, Any]) -> StatSpec:
    """Turn statistics that depend on an argument on or off.

    An argument that nothing would read is refused.
    """
    switches = {}
    for name, argument in ARGUMENT.items():
        requested, has_argument = getattr(spec, name), arguments[argument] is not None
        if requested and not has_argument:
            raise ValueError(f"StatSpec({name}=True) needs {argument}=, which is None")
        if requested is False and has_argument and argument != "k_segments":
            raise ValueError(
                f"{argument} is given, but StatSpec({name}=False) leaves it unread: use {name}=None or True, "
                f"or leave {argument} out"
            )
        switches[name] = has_argument and requested is not False
    changed = {name: value for name, value in switches.items() if getattr(spec, name) is not value}
    return replace(spec, **changed) if changed else spec  # without statistics, nothing changes


def check_ids(name: str, t: Any, shape: tuple[int, ...], q: Tensor, letters: str, limit: int | None) -> Tensor | None:
    """Check ids of shape [B, *] or without B; return int64 with a batch axis.

    Ids go from -1 (none) to below the limit.
    """
    if t is None:
        return None
    check_tensor(name, t, q, floating=False)
    if t.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {t.dtype}: an integer dtype expected")
    whole = t[None] if t.dim() == len(shape) - 1 else t
    if whole.dim() != len(shape) or any(s not in (w, -1) for w, s in zip(whole.shape[1:], shape[1:], strict=True)) \
            or whole.shape[0] not in (1, shape[0]):  # fmt: skip
        sizes = ", ".join("any" if s == -1 else str(s) for s in shape[1:])
        raise ValueError(
            f"{name} has shape {list(t.shape)}: [{letters}] = [{sizes}] or [B, {letters}] = [{shape[0]}, {sizes}] "
            "expected"
        )
    return check_values(whole.long(), name, "ids", limit)


def check_segments(
    q_ids: Any, k_ids: Any, tables: dict[str, Any], shape: tuple[int, int, int], q: Tensor
) -> tuple[Tensor | None, Tensor | None, int]:
    """Check the segment ids against the tables that read them.

    Returns those of queries and keys, and the number of key segments.
    """
    b, m, n = shape
    tables = {name: t for name, t in tables.items() if t is not None}
    for name, t in tables.items():
        if not isinstance(t, Tensor) or t.dim() < 2:
            kind = f"of shape {list(t.shape)}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
            raise TypeError(f"{name} is {kind}: a tensor broadcastable to [B, H, Sq, Sk] expected, or None")
        for ids, argument in ((q_ids, "q_segments"), (k_ids, "k_segments")):
            if ids is None:
                raise ValueError(f"{name} needs {argument}=, which is None")
    if q_ids is not None and not tables:
        readers = f"segment_mask, segment_open, Edit.{', Edit.'.join(TABLES)}"
        raise ValueError(f"q_segments is given, but nothing reads it: it goes with one of {readers}")
    rows = min([t.shape[-2] for t in tables.values()]) if tables else None
    columns = min([t.shape[-1] for t in tables.values()]) if tables else None
    q_ids = check_ids("q_segments", q_ids, (b, m), q, "M", limit=rows)
    k_ids = check_ids("k_segments", k_ids, (b, n), q, "N", limit=columns)
    if k_ids is None or columns is not None:
        return q_ids, k_ids, columns or 0
    if is_tracing(k_ids):
        raise ValueError(
            "k_segments without a table over segments: their number would be read from the ids, which torch.compile "
            "does not know; give q_segments and segment_mask=torch.ones(S, S, dtype=torch.bool) too, or "
            "StatSpec(segments=False)"
        )
    return q_ids, k_ids, int(k_ids.max()) + 1


def check_bool_table(name: str, t: Any, heads: tuple[int, int], q: Tensor, neutral: bool) -> Tensor | None:
    """Check a bool table over pairs of segments.

    A neutral row and column are added for tokens in no segment.
    """
    if t is None:
        return None
    check_tensor(name, t, q, floating=False)
    if t.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {t.dtype}: bool expected")
    return torch.nn.functional.pad(to_four_dimensions(name, t, heads), (0, 1, 0, 1), value=neutral)


def to_four_dimensions(name: str, t: Tensor, heads: tuple[int, int]) -> Tensor:
    """Return a table of [Sq, Sk] or more dimensions as [#B, #H, Sq, Sk]."""
    whole = t.reshape((1,) * (4 - t.dim()) + tuple(t.shape)) if t.dim() < 4 else t
    if whole.dim() != 4 or any(s not in (1, w) for s, w in zip(whole.shape[:2], heads, strict=True)):
        raise ValueError(
            f"{name} has shape {list(t.shape)}: broadcastable to [B, H, Sq, Sk] expected, with B = {heads[0]} and "
            f"H = {heads[1]}"
        )
    return whole


def check_targets(t: Any, shape: tuple[int, int], n: int, q: Tensor) -> Tensor | None:
    """Check the key indices of each query."""
    return check_ids("targets", t, (*shape, -1), q, "M, T", limit=n)


def check_key_features(t: Any, shape: tuple[int, int], q: Tensor) -> Tensor | None:
    """Check the numbers of each key."""
    if t is None:
        return None
    check_tensor("key_features", t, q)
    whole = t[None] if t.dim() == 2 else t
    if whole.dim() != 3 or whole.shape[1] != shape[1] or whole.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"key_features has shape {list(t.shape)}: [N, F] with N = {shape[1]}, or [B, N, F] with B = {shape[0]}, "
            "expected"
        )
    return whole
