"""Masks of one layer's attention, on token rows, as tables over classes of queries and keys.

A `LayerMask` is an `AttentionMask` whose tokens and layers have been resolved for one prompt. It stands in a call's
lists of edits, next to `LayerEdit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.interventions import AttentionMask
from interp.model.mask_rules import Rule


@dataclass(frozen=True, eq=False)
class LayerMask:
    """What ``mask`` does in one layer, by rules on the rows of a prompt of ``length`` tokens.

    ``shift``: padding tokens that stand before the prompt.
    """

    layer: int
    mask: AttentionMask
    rules: tuple[Rule, ...]
    length: int
    shift: int = 0

    @cached_property
    def rows(self) -> range:
        """From the first query on whose keys may change, to the last; empty if there is none."""
        if self.window is not None:
            return range(self.length)
        changed = torch.stack([rule.changed(self.length) for rule in self.rules]).any(0).nonzero()[:, 0]
        return range(int(changed[0]), int(changed[-1]) + 1) if len(changed) else range(0)

    @property
    def start(self) -> int:
        """The first query whose keys may change."""
        return self.rows.start

    @property
    def stop(self) -> int:
        """The row after the last one."""
        return self.rows.stop

    @property
    def window(self) -> int | None:
        """The window that takes the place of the model's own; None: that one stays."""
        return None if self.mask.stride is not None else self.mask.window

    @property
    def opens_later(self) -> bool:
        """Whether a query may see a key that comes after it."""
        return any(rule.opens_later for rule in self.rules)

    def shifted(self, by: int) -> LayerMask:
        """Return the mask of the prompt behind ``by`` padding tokens."""
        return replace(self, shift=self.shift + by)


class MaskTables:
    """The masks of one batch row as tables over classes of queries and keys.

    ``queries``, ``keys``: the rows of the call's queries and keys in the batch, padding included.
    """

    def __init__(self, masks: Sequence[LayerMask], queries: Int[Tensor, " M"], keys: Int[Tensor, " N"]):
        rules = [(rule, m.shift) for m in masks for rule in m.rules]
        self.row_numbers = queries, keys
        q_classes, self.queries = _unique([rule.queries(queries - shift) for rule, shift in rules], queries)
        k_classes, self.keys = _unique([rule.keys(keys - shift) for rule, shift in rules], keys)
        self.opened = torch.zeros(len(q_classes), len(k_classes), dtype=torch.bool)
        self.hidden = torch.zeros_like(self.opened)
        for i, (rule, _) in enumerate(rules):
            cells = rule.cells(q_classes[:, i, None], k_classes[None, :, i])
            if rule.opens:
                self.opened |= cells
            else:
                self.hidden |= cells
        self.opened &= ~self.hidden

    def changing(self, causal: bool, window: int | None) -> tuple[bool, bool]:
        """Whether a cell is opened that causality or the window hides, and whether one is hidden that they may show."""
        (q_low, q_high), (k_low, k_high) = (
            _bounds(classes, rows, n)
            for classes, rows, n in zip((self.queries, self.keys), self.row_numbers, self.opened.shape, strict=True)
        )
        later = k_high[None] > q_low[:, None]
        shut = later if causal else torch.zeros_like(later)
        if window is not None:
            shut = shut | (q_high[:, None] - k_low[None] >= window) | (k_high[None] - q_low[:, None] >= window)
        seen = q_high[:, None] >= k_low[None] if causal else torch.ones_like(later)
        return bool((self.opened & shut).any()), bool((self.hidden & seen).any())

    def cells(self, table: Bool[Tensor, "Sq Sk"]) -> Bool[Tensor, "M N"]:
        """Spread a table over all queries and keys."""
        return table[self.queries][:, self.keys]


def _unique(columns: list[Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct combinations of classes, and the number of each row's."""
    if not columns:
        return torch.zeros(1, 0, dtype=torch.long), torch.zeros_like(rows)
    if len(columns) == 1:
        distinct, numbers = torch.unique(columns[0], return_inverse=True)
        return distinct[:, None], numbers
    return torch.unique(torch.stack(columns, 1), dim=0, return_inverse=True)


def _bounds(classes: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The first and the last row of each of ``n`` classes."""
    empty = torch.zeros(n, dtype=rows.dtype)
    low, high = (empty.scatter_reduce(0, classes, rows, how, include_self=False) for how in ("amin", "amax"))
    return low, high


def masks_of(edits: Sequence[Any]) -> list[LayerMask]:
    """The masks among the edits of one batch row."""
    return [e for e in edits if isinstance(e, LayerMask)]


def window_of(masks: Sequence[LayerMask], own: int | None) -> int | None:
    """The window of a batch row: that of the last mask that has one, or the model's own."""
    return next((m.window for m in reversed(masks) if m.window is not None), own)
