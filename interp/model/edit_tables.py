"""Edits of one layer's attention as arguments of headstats: tables over segments of tokens, and numbers of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import headstats
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.interventions import ON_CELLS
from interp.model.layer_edits import NEUTRAL, LayerEdit, Rows, fields_used

FLAT = 1e20  # a temperature at which all logits of a row, and its learned sink, are 0
NO_WEIGHT = -1e4  # nats added to a flat row's keys of weight 0: exp(-1e4) is 0
ABOVE_SINK = 20.0  # nats by which a flat row's keys exceed its learned sink, to which exp(-20) of the weight is left


@dataclass(frozen=True)
class CallSize:
    """Sizes of a call: its queries are rows [first, stop) of the prompt; keys are rows [0, keys).

    ``has_sinks``: whether a learned sink takes part of each row's weight.
    """

    heads: int
    first: int
    stop: int
    keys: int
    has_sinks: bool = False

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
        self.used = {name for e in edits for name in fields_used(e)}
        self.has_tables = bool(self.used.intersection(TABLES))
        n = max(1, len(edits))
        queries = torch.zeros(size.rows, n, dtype=torch.bool)
        self.heads = torch.zeros(n, size.heads, dtype=torch.bool)
        for i, e in enumerate(edits):
            queries[_inside(e.queries, size.first, size.stop), i] = True
            self.heads[i, slice(None) if e.heads is None else list(e.heads)] = True
        sets: list[tuple[int, Any, Rows | None]] = [(i, "keys", e.keys) for i, e in enumerate(edits)]
        sets += [(i, name, getattr(e, name)) for i, e in enumerate(edits) if e.take for name in ("take", "give")]
        sets += [(i, share, rows) for i, e in enumerate(edits) for share, rows in _rows_by_share(e).items()]
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
            if name not in fields_used(e):
                continue
            if e.targets:
                self._add_log_weights(table, i, e)
                continue
            cells = self._cells(i, name if name in ("take", "give") else "keys")
            if neutral is False:
                table |= cells
            elif name in ("logit_raise", "bias"):
                table[cells] += getattr(e.edit, name)
            else:
                table[cells] *= getattr(e.edit, name)
        return table

    def _add_log_weights(self, table: Float[Tensor, "heads Sq Sk"], i: int, e: LayerEdit) -> None:
        """Add the biases of an edit's weights, whose softmax on a flat row is the distribution."""
        lift = ABOVE_SINK if self.size.has_sinks else 0.0
        biases = torch.full((len(self.key_segments),), NO_WEIGHT, dtype=table.dtype)
        for share in _rows_by_share(e):
            biases[self.key_segments[:, self.column[i, share]]] = log(share) + lift
        biases[~self.key_segments[:, self.column[i, "keys"]]] = 0.0
        heads, queries = self.heads[i].nonzero(), self.query_segments[:, i].nonzero()[:, 0]
        table[heads, queries] += biases

    def _acts(self, i: int) -> Bool[Tensor, "heads queries"]:
        return self.heads[i, :, None] & self.queries[:, i]

    def row_numbers(self, name: str) -> Float[Tensor, "heads queries"]:
        """A number for each head and query."""
        numbers = torch.ones(self.size.heads, self.size.rows, dtype=torch.float64)
        for i, e in enumerate(self.edits):
            value = FLAT if name == "temperature" and e.targets else getattr(e.edit, name)
            if name == "gate" and value is None and e.edit.replacement is not None:
                value = 0.0
            if name == "gate" and e.edit.has_gates:
                numbers = torch.where(self._acts(i), numbers * gate_numbers(e, self.size), numbers)
            elif value is not None:
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


def _rows_by_share(e: LayerEdit) -> dict[float, list[int]]:
    """The keys on which an edit's weights lie, by their weight."""
    rows: dict[float, list[int]] = {}
    for row, share in zip(e.targets, e.shares, strict=True):
        rows.setdefault(share, []).append(row)
    return rows


def gate_numbers(e: LayerEdit, size: CallSize) -> Float[Tensor, "heads queries"]:
    """An edit's gates by head and query of a call; 1 for tokens that are decoded after those with a gate."""
    gate = e.edit.gate
    assert isinstance(gate, Tensor)
    gate = gate.cpu().double()
    if gate.ndim == 1:
        return gate[:, None].expand(-1, size.rows)
    numbers = torch.ones(size.heads, size.rows, dtype=torch.float64)
    queries = range(size.stop) if e.queries is None else e.queries
    for column, query in zip(range(gate.shape[1]), queries, strict=False):
        if size.first <= query < size.stop:
            numbers[:, query - size.first] = gate[:, column]
    return numbers


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
