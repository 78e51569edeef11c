"""Edits of one layer's attention, on token rows, as arguments of headstats.

A `LayerEdit` is an `AttentionEdit` whose tokens, layers and heads have been resolved for one prompt. Each batch row of
a call has its own list of them. `edit_arguments` merges those lists into the tables that one call of headstats takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import headstats
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InterpError
from interp.interventions import ON_CELLS, AttentionEdit
from interp.model.layer_masks import LayerMask

Rows = Sequence[int]  # token rows of a prompt: a range, or their numbers in ascending order
KNOCK_OUT = AttentionEdit(knockout=True)


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """What ``edit`` does in one layer: to the queries in rows ``queries``, of ``heads`` (None: all).

    ``keys``: the rows that fields on pairs of a query and a key act on; None: all. ``take`` and ``give``: rows.
    ``queries`` is None only for an edit of every forward, whose prompts have any length.
    """

    layer: int
    edit: AttentionEdit = KNOCK_OUT
    queries: Rows | None = None
    keys: Rows | None = None
    heads: Rows | None = None
    take: Rows = ()
    give: Rows = ()

    @property
    def start(self) -> int:
        """The first query that changes."""
        return 0 if self.queries is None else self.queries[0]

    @property
    def stop(self) -> int:
        """The row after the last query that changes."""
        assert self.queries is not None  # it is a change of one prompt
        return self.queries[-1] + 1

    @property
    def is_random(self) -> bool:
        """Whether it depends on a hash of the batch row and of token positions, padding included."""
        return self.edit.counterfactual in ("shuffled", "random")

    @property
    def counts_keys(self) -> bool:
        """Whether it depends on how many keys there are, also on those that a query does not see."""
        return not self.edit.renormalise and self.edit.counterfactual in ("uniform", "random")

    @property
    def is_neutral(self) -> bool:
        """Whether every field that it sets leaves attention as it is."""
        edit = self.edit
        values = {name: getattr(edit, name) for name in edit.changes if name != "take"}
        if edit.keep_fraction is not None:
            values["keep_fraction"] = edit.keep_fraction
        if edit.gate == 1:
            values.pop("replacement", None)  # of which the gate leaves nothing
        return all(name in NEUTRAL and value == NEUTRAL[name] for name, value in values.items())

    @property
    def silences(self) -> bool:
        """Whether the output of its heads becomes 0 in its rows, whatever else it sets."""
        return self.edit.gate == 0 and self.edit.replacement is None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What one call of headstats has once: edits that differ in it need a call each."""
        edit = self.edit
        flags = edit.renormalise if edit.knockout or edit.gain is not None or edit.counterfactual else None
        return flags, edit.counterfactual, edit.seed if edit.counterfactual else 0


@dataclass(frozen=True)
class EditGroup:
    """Edits, for each batch row, that one call of headstats can hold.

    ``own``: those for which the call is made; its results count in their rows and heads, before earlier groups' ones.
    ``edits``: these and all others that the call can hold, so that the results of those rows are complete.
    """

    edits: list[list[LayerEdit]]
    own: list[list[LayerEdit]]


def compatible_groups(by_row: Sequence[Sequence[LayerEdit]]) -> list[EditGroup]:
    """Share edits out among calls of headstats, each with one `LayerEdit.kind`.

    Raises InterpError for two edits of one row of a head that no single call can hold.
    """
    for edits in by_row:
        refuse_clashes(edits)
    kinds = list(dict.fromkeys(e.kind for edits in by_row for e in edits if e.kind != NO_KIND))
    merged: list[tuple[Any, ...]] = []
    place: dict[tuple[Any, ...], int] = {NO_KIND: 0}
    for kind in kinds:
        for i, other in enumerate(merged):
            if (both := _merge(kind, other)) is not None:
                merged[i], place[kind] = both, i
                break
        else:
            place[kind] = len(merged)
            merged.append(kind)
    merged = merged or [NO_KIND]
    return [
        EditGroup(
            [[e for e in edits if _merge(e.kind, kind) == kind] for edits in by_row],
            [[e for e in edits if place[e.kind] == i and e.kind != NO_KIND] for edits in by_row],
        )
        for i, kind in enumerate(merged)
    ]


def refuse_clashes(edits: Sequence[LayerEdit]) -> None:
    """Raise InterpError for two edits of one row of a head that cannot act together."""
    for n, b in enumerate(edits):
        for a in edits[:n]:
            if (
                a.layer == b.layer
                and (why := _clash(a, b))
                and _share(a.heads, b.heads)
                and _share(a.queries, b.queries)
            ):
                raise InterpError(
                    f"two edits {why} of the same tokens and heads in layer {a.layer}: ({a.edit}) and ({b.edit}). "
                    "Combine them, or part their tokens or heads"
                )


def _clash(a: LayerEdit, b: LayerEdit) -> str:
    """Why two edits cannot act on one row of a head, in words; '' if they can."""
    used = _fields_used(a), _fields_used(b)
    for name, why in EXCLUSIVE.items():
        if all(name in names for names in used):
            return why
    if any("replacement" in names for names in used) and all("gate" in names for names in used):
        return "replace and gate the output"
    return "" if _merge(a.kind, b.kind) else "act before (renormalise=True) and after the softmax on the weights"


def _share(a: Rows | None, b: Rows | None) -> bool:
    """Whether two sets of rows or heads have a member in common; None is all."""
    if a is None or b is None:
        return True
    if isinstance(a, range) and isinstance(b, range) and a.step == b.step == 1:
        return max(a.start, b.start) < min(a.stop, b.stop)
    rows, other = (b, a) if isinstance(a, range) else (a, b)
    return any(row in other for row in rows)


def shifted(edits: Sequence[LayerEdit | LayerMask], by: int) -> tuple[LayerEdit | LayerMask, ...]:
    """Return edits and masks whose tokens stand ``by`` rows further on."""
    if not by:
        return tuple(edits)
    return tuple(
        e.shifted(by)
        if isinstance(e, LayerMask)
        else replace(e, **{name: _shift(getattr(e, name), by) for name in ("queries", "keys", "take", "give")})
        for e in edits
    )


def _shift(rows: Rows | None, by: int) -> Rows | None:
    if isinstance(rows, range):
        return range(rows.start + by, rows.stop + by, rows.step)
    return None if rows is None else tuple(row + by for row in rows)


NO_KIND = (None, None, 0)


def _merge(a: tuple[Any, ...], b: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The kind of a call that does edits of both kinds; None if no call does."""
    if None not in (a[0], b[0]) and a[0] != b[0]:
        return None
    if None not in (a[1], b[1]) and a[1:] != b[1:]:
        return None
    return b[0] if a[0] is None else a[0], *(b[1:] if a[1] is None else a[1:])


@dataclass(frozen=True)
class CallSize:
    """Sizes of a call: its queries are rows [first, stop) of the prompt; keys are rows [0, keys)."""

    heads: int
    first: int
    stop: int
    keys: int

    @property
    def rows(self) -> int:
        """Number of queries."""
        return self.stop - self.first


def edit_arguments(
    by_row: Sequence[Sequence[LayerEdit]], size: CallSize, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Express the edits of every batch row, all of one kind, as arguments of headstats.

    Returns q_segments [batch, queries], k_segments [batch, keys] and edit. Queries that the same edits name share a
    segment, and so do keys. In one cell, factors and gains are multiplied, raises and biases added, and any knockout
    cuts it; temperatures and gates of a row are multiplied.
    """
    untouched = _Tables((), size)
    tables = [_Tables(edits, size) if edits else untouched for edits in by_row]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    arguments: dict[str, Any] = {}
    if any(t.has_tables for t in tables):
        arguments |= {name: torch.stack([getattr(t, name) for t in tables]).to(device) for name in SEGMENTS}
    fields: dict[str, Any] = {}
    for name in TABLES:
        if any(name in t.used for t in tables):
            fields[name] = _stack(name, tables, wide).to(device)
    for name in ROW_FIELDS:
        if any(name in t.used for t in tables):
            fields[name] = torch.stack([t.row_numbers(name) for t in tables]).to(device, wide)
    edits = [e for row in by_row for e in row]
    if any("replacement" in t.used for t in tables):
        width = max(e.edit.replacement.shape[-1] for e in edits if e.edit.replacement is not None)
        fields["replacement"] = torch.stack([t.replacement(width) for t in tables]).to(device, wide)
    for e in edits:
        renormalise, counterfactual, seed = e.kind
        if renormalise is not None:
            fields["renormalise"] = renormalise
        if counterfactual is not None:
            fields |= {"counterfactual": counterfactual, "seed": seed}
    if "counterfactual" in fields:
        fields["counterfactual_heads"] = torch.stack([t.laid_out() for t in tables]).to(device)
    return {**arguments, "edit": headstats.Edit(**fields)}


SEGMENTS = ("q_segments", "k_segments")
TABLES = (*ON_CELLS, "knockout", "take", "give")
ROW_FIELDS = ("temperature", "gate", "keep_fraction")
NEUTRAL = {"logit_factor": 1.0, "logit_raise": 0.0, "bias": 0.0, "gain": 1.0, "temperature": 1.0, "gate": 1.0,
           "keep_fraction": 1.0, "knockout": False, "take": False, "give": False}  # fmt: skip


def _stack(name: str, rows: list[_Tables], dtype: torch.dtype) -> Tensor:
    """Stack the tables [heads, Sq, Sk] of batch rows, which differ in size; what is added is neutral."""
    neutral = NEUTRAL[name]
    tables = {row: t.table(name) for row, t in enumerate(rows) if name in t.used}
    sq, sk = max(len(t.query_segments) for t in rows), max(len(t.key_segments) for t in rows)
    whole = torch.full((len(rows), rows[0].size.heads, sq, sk), neutral, dtype=None if neutral is False else dtype)
    for row, table in tables.items():
        whole[row, :, : table.shape[1], : table.shape[2]] = table
    return whole


class _Tables:
    """The tables of one batch row."""

    def __init__(self, edits: Sequence[LayerEdit], size: CallSize):
        self.edits, self.size = edits, size
        self.used = {name for e in edits for name in _fields_used(e)}
        self.has_tables = bool(self.used.intersection(TABLES))
        n = max(1, len(edits))
        queries = torch.zeros(size.rows, n, dtype=torch.bool)
        self.heads = torch.zeros(n, size.heads, dtype=torch.bool)
        for i, e in enumerate(edits):
            queries[_inside(e.queries, size.first, size.stop), i] = True
            self.heads[i, slice(None) if e.heads is None else list(e.heads)] = True
        sets = [(i, "keys", e.keys) for i, e in enumerate(edits)]
        sets += [(i, name, getattr(e, name)) for i, e in enumerate(edits) if e.take for name in ("take", "give")]
        keys = torch.zeros(size.keys, max(1, len(sets)), dtype=torch.bool)
        for column, (*_, rows) in enumerate(sets):
            keys[_inside(rows, 0, size.keys), column] = True
        self.column = {(i, name): column for column, (i, name, _) in enumerate(sets)}
        self.queries = queries  # [queries, edits]
        self.query_segments, self.q_segments = torch.unique(queries, dim=0, return_inverse=True)
        self.key_segments, self.k_segments = torch.unique(keys, dim=0, return_inverse=True)

    def _cells(self, i: int, name: str) -> Bool[Tensor, "heads Sq Sk"]:
        """Which pairs of segments an edit's ``keys``, ``take`` or ``give`` names."""
        pairs = self.query_segments[:, i, None] & self.key_segments[:, self.column[i, name]]
        return self.heads[i, :, None, None] & pairs

    def table(self, name: str) -> Tensor:
        """A field's table [heads, Sq, Sk]."""
        shape = (self.size.heads, len(self.query_segments), len(self.key_segments))
        neutral = NEUTRAL[name]
        table = torch.full(shape, neutral, dtype=torch.bool if neutral is False else torch.float64)
        for i, e in enumerate(self.edits):
            if name not in _fields_used(e):
                continue
            cells = self._cells(i, name if name in ("take", "give") else "keys")
            if neutral is False:
                table |= cells
            elif name in ("logit_raise", "bias"):
                table[cells] += getattr(e.edit, name)
            else:
                table[cells] *= getattr(e.edit, name)
        return table

    def _acts(self, i: int) -> Bool[Tensor, "heads queries"]:
        return self.heads[i, :, None] & self.queries[:, i]

    def row_numbers(self, name: str) -> Float[Tensor, "heads queries"]:
        """A number for each head and query."""
        numbers = torch.ones(self.size.heads, self.size.rows, dtype=torch.float64)
        for i, e in enumerate(self.edits):
            value = getattr(e.edit, name)
            if name == "gate" and value is None and e.edit.replacement is not None:
                value = 0.0
            if value is not None:
                numbers[self._acts(i)] *= value
        return numbers

    def replacement(self, width: int) -> Float[Tensor, "heads queries d_v"]:
        """The vector that takes a place in the output of each head and query; 0 where there is none."""
        vectors = torch.zeros(self.size.heads, self.size.rows, width, dtype=torch.float64)
        for i, e in enumerate(self.edits):
            if e.edit.replacement is not None:
                value = e.edit.replacement.detach().cpu().double()
                value = value[:, None] if value.ndim == 2 else value
                vectors = torch.where(self._acts(i)[..., None], value, vectors)
        return vectors

    def laid_out(self) -> Bool[Tensor, "heads queries"]:
        """The heads and queries whose weights a counterfactual replaces."""
        acts = torch.zeros(self.size.heads, self.size.rows, dtype=torch.bool)
        for i, e in enumerate(self.edits):
            if e.edit.counterfactual is not None:
                acts |= self._acts(i)
        return acts


EXCLUSIVE = {"take": "redistribute the weights", "replacement": "replace the output",
             "counterfactual": "replace the weights"}  # fmt: skip


def _fields_used(e: LayerEdit) -> set[str]:
    names = set(e.edit.changes)
    if "take" in names:
        names |= {"give", "keep_fraction"}
    if "replacement" in names:
        names.add("gate")
    return names


def _inside(rows: Rows | None, first: int, stop: int) -> slice | list[int]:
    """Index the given rows in an axis that holds rows [first, stop)."""
    if rows is None:
        return slice(None)
    if isinstance(rows, range) and rows.step == 1:
        return slice(max(rows.start - first, 0), max(min(rows.stop, stop) - first, 0))
    return [row - first for row in rows if first <= row < stop]


def select_rows(edits: Sequence[LayerEdit], size: CallSize) -> Bool[Tensor, "heads queries"]:
    """The heads and queries on which any of the edits acts."""
    tables = _Tables(edits, size)
    acts = torch.zeros(size.heads, size.rows, dtype=torch.bool)
    for i in range(len(edits)):
        acts |= tables._acts(i)
    return acts
