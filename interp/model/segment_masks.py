"""Masks of a call as tables over segments, which the kernel reads instead of an n×n bias.

Tokens of one segment are treated alike by every mask of the call. A table says for each pair (segment of the query,
segment of the key) whether its cells are opened or shown.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import headstats
import torch
from headstats.stats import BY_NAME, tensors
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from interp.model.edit_tables import TABLES

Restore = Callable[[headstats.AttentionStats], headstats.AttentionStats]
Rows = slice | Int[Tensor, " rows"]
EVERY = slice(None)
BY_SEGMENT = tuple(name for name, s in BY_NAME.items() if s.argument == "k_segments")  # statistics


@dataclass(frozen=True, eq=False)
class SegmentMasks:
    """Which cells of a call its masks open and hide.

    A key is visible if (causality and window show it, or ``opened`` does) and ``shown`` does. The batch axis is of
    size 1 if all rows have the same masks.
    """

    q_segments: Int[Tensor, "#batch query"]
    k_segments: Int[Tensor, "#batch key"]
    opened: Bool[Tensor, "#batch 1 Sq Sk"] | None = None  # None: no cell
    shown: Bool[Tensor, "#batch 1 Sq Sk"] | None = None  # None: every cell

    @property
    def tables(self) -> dict[str, Bool[Tensor, "#batch 1 Sq Sk"]]:
        """The tables, by the names of headstats' arguments."""
        tables = {"segment_open": self.opened, "segment_mask": self.shown}
        return {name: t for name, t in tables.items() if t is not None}

    def visible(self, seen: Bool[Tensor, "query key"]) -> Bool[Tensor, "#batch 1 query key"]:
        """Apply the masks to what causality and the window show."""
        return torch.stack([self.visible_in_row(i, seen) for i in range(len(self.q_segments))])[:, None]

    def visible_in_row(
        self, i: int, seen: Bool[Tensor, "query key"], queries: Rows = EVERY, keys: Rows = EVERY
    ) -> Bool[Tensor, "query key"]:
        """Apply the masks of a batch row to what causality and the window show, for some of its queries and keys."""
        of_row = self.of_row(i)
        q, k = of_row.q_segments[0, queries], of_row.k_segments[0, keys]
        if of_row.opened is not None:
            seen = seen | of_row.opened[0, 0, q][:, k]
        return seen if of_row.shown is None else seen & of_row.shown[0, 0, q][:, k]

    def of_row(self, i: int, queries: slice = EVERY, keys: slice = EVERY) -> SegmentMasks:
        """Return the masks of one batch row, for a range of its queries and keys."""
        tables = (None if t is None else _row(t, i) for t in (self.opened, self.shown))
        return SegmentMasks(_row(self.q_segments, i)[:, queries], _row(self.k_segments, i)[:, keys], *tables)

    def joined(self, more: dict[str, Any]) -> tuple[dict[str, Any], Restore]:
        """Add the masks to arguments of headstats, whose own segments are divided further.

        Returns the arguments, and a function that turns statistics by key segment into those of the segments of
        ``more``.
        """
        if more.get("k_segments") is None:
            return {**more, "q_segments": self.q_segments, "k_segments": self.k_segments, **self.tables}, _unchanged
        q_segments, of_masks, of_more = self.q_segments, EVERY, EVERY
        if more.get("q_segments") is not None:
            q_segments, of_masks, of_more = _crossed(self.q_segments, more["q_segments"])
        k_segments, columns, columns_of_more = _crossed(self.k_segments, more["k_segments"])
        width = int(more["k_segments"].max()) + 1
        arguments = {**more, "q_segments": q_segments, "k_segments": k_segments}
        arguments |= {name: t[..., of_masks, :][..., columns] for name, t in self.tables.items()}
        if (edit := more.get("edit")) is not None:
            arguments["edit"] = _with_divided_tables(edit, of_more, columns_of_more)
        return arguments, partial(_sum_columns, columns=columns_of_more, width=width)


def with_spans(arguments: dict[str, Any], spans: Int[Tensor, "#batch key"] | None) -> tuple[dict[str, Any], Restore]:
    """Divide the key segments of an edit's arguments further, by the spans of which statistics are asked.

    Returns the arguments, and a function that turns statistics by key segment into those of the spans.
    """
    if spans is None or arguments.get("k_segments") is None:
        return arguments if spans is None else {**arguments, "k_segments": spans}, _unchanged
    k_segments, columns, of_spans = _crossed(arguments["k_segments"], spans)
    edit = _with_divided_tables(arguments["edit"], EVERY, columns)
    restore = partial(_sum_columns, columns=of_spans, width=int(spans.max()) + 1)
    return {**arguments, "k_segments": k_segments, "edit": edit}, restore


def _with_divided_tables(edit: headstats.Edit, rows: Rows, columns: Rows) -> headstats.Edit:
    """Return an edit whose tables have a row and a column for each divided segment, given the segment that held it."""
    tables = {name: t for name in TABLES if (t := getattr(edit, name)) is not None}
    return replace(edit, **{name: t[..., rows, :][..., columns] for name, t in tables.items()})


def _unchanged(stats: headstats.AttentionStats) -> headstats.AttentionStats:
    return stats


def _row(x: Shaped[Tensor, "#batch ..."], i: int) -> Shaped[Tensor, "1 ..."]:
    return x if len(x) == 1 else x[i : i + 1]


def _crossed(
    a: Int[Tensor, "#batch tokens"], b: Int[Tensor, "#batch tokens"]
) -> tuple[Int[Tensor, "#batch tokens"], Int[Tensor, " crossed"], Int[Tensor, " crossed"]]:
    """Number the pairs of segments that occur; ``b`` may hold −1, which is in no segment.

    Returns the number of each token's pair, and for each pair its segment in ``a`` and in ``b``.
    """
    width = int(b.max()) + 2
    pairs, numbers = torch.unique(a * width + b + 1, return_inverse=True)
    return numbers, pairs // width, pairs % width - 1


def without_segments(spec: headstats.StatSpec) -> headstats.StatSpec:
    """Return a spec without statistics by segment, for segments of which nobody asked for statistics."""
    return replace(spec, **dict.fromkeys(BY_SEGMENT, False))


def _sum_columns(stats: headstats.AttentionStats, columns: Int[Tensor, " Sk"], width: int) -> headstats.AttentionStats:
    """Sum statistics by key segment into ``width`` segments; ``columns``: that of each, −1 for none."""
    values: dict[str, Any] = stats.as_dict()
    keep = columns >= 0
    for name in BY_SEGMENT:
        if name in values:
            x = tensors(values[name])[0]
            whole = x.new_zeros(*x.shape[:3], width, *x.shape[4:])
            values[name] = whole.index_add(3, columns[keep], x[:, :, :, keep])
    return headstats.AttentionStats(**values)
