"""Attention of packed cells: each cell's own rows after its base run's prefix, many cells to a call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp.engine.packing import Piece
from interp.model.attention_call import AttentionCall
from interp.model.instrument import attend

SHARED_KEYS = 2048  # prefix keys × cells from which reading the prefix once beats writing it out for every cell
SHORT = 64  # keys up to which cells that start elsewhere, or in other runs, are worth a joint call
WASTED = 8192  # cells of attention patterns, of rows that fill a call up, that cost as much as another call

Cuts = Callable[[Piece], dict[str, Any]]


def packed_attention(
    like: AttentionCall,
    backend: str,
    q: Float[Tensor, "query_rows heads d_head"],
    k: Float[Tensor, "key_rows kv_heads d_head"],
    v: Float[Tensor, "key_rows kv_heads d_value"],
    queries: Sequence[Piece],
    keys: Sequence[Piece],
    cuts: Cuts,
) -> Float[Tensor, "query_rows heads d_value"]:
    """Attention of all packed rows.

    like: the layer's recorded call, for its window, scale and the like.  queries: which rows q has; keys: for each of
    these pieces the one of the same cells whose rows k and v have.  cuts: further arguments for a piece that needs
    them.
    """
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    out[queries[-1].span.stop :] = 0  # rows that fill up
    for some in _bundles(queries, keys, cuts):
        if len(some) == 1:
            own, theirs = queries[some[0]], keys[some[0]]
            q_part = own.by_cell(q)
            k_part, v_part, more = _alone(like.layer, theirs, k, v)
            more |= cuts(own)
        else:
            chosen = [queries[i] for i in some]
            q_part = _right_aligned(q, chosen)
            k_part, v_part = _joint(like.layer, [keys[i] for i in some], k, v)
            more = {}
        stop = keys[some[0]].stop
        bias = None if like.bias is None else like.bias[:1, ..., :stop]  # per key: the same for every run
        call = replace(
            like, q=q_part.transpose(1, 2), k=k_part.transpose(1, 2), v=v_part.transpose(1, 2), key_padding=None,
            bias=bias,
        )  # fmt: skip
        result = attend(call, backend=backend, **more).out.transpose(1, 2)
        first = 0
        for piece in (queries[i] for i in some):
            cells = len(piece.cells)
            piece.by_cell(out).copy_(result[first : first + cells, result.shape[1] - piece.rows :])
            first += cells
    return out


def _bundles(queries: Sequence[Piece], keys: Sequence[Piece], cuts: Cuts) -> list[list[int]]:
    """Numbers of the pieces that go into one call: short ones of as many keys and about as many rows."""
    joint: dict[int, list[int]] = defaultdict(list)
    out: list[list[int]] = []
    for i, (piece, theirs) in enumerate(zip(queries, keys, strict=True)):
        if theirs.stop > SHORT or cuts(piece):
            out.append([i])
        else:
            joint[theirs.stop].append(i)
    for stop, some in joint.items():
        bundle: list[int] = []
        wasted = 0
        for i in sorted(some, key=lambda i: -queries[i].rows):
            wasted += (queries[bundle[0]].rows - queries[i].rows) * len(queries[i].cells) * stop if bundle else 0
            if not bundle or wasted > WASTED:
                bundle, wasted = [], 0
                out.append(bundle)
            bundle.append(i)
    return out


def _right_aligned(x: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """[cells, most rows, ...]; a cell with fewer rows has zeros before them."""
    rows = max(p.rows for p in pieces)
    some_shorter = any(p.rows < rows for p in pieces)
    make = x.new_zeros if some_shorter else x.new_empty
    filled = make(sum(len(p.cells) for p in pieces), rows, *x.shape[1:])
    first = 0
    for piece in pieces:
        cells = len(piece.cells)
        filled[first : first + cells, rows - piece.rows :] = piece.by_cell(x)
        first += cells
    return filled


def _joint(layer: int, pieces: Sequence[Piece], k: Tensor, v: Tensor) -> list[Tensor]:
    """Keys and values of all cells [cells, all keys, heads, d], prefixes written out."""
    both = []
    for x, kind in ((k, "keys"), (v, "values")):
        filled = x.new_empty(sum(len(p.cells) for p in pieces), pieces[0].stop, *x.shape[1:])
        first = 0
        for piece in pieces:
            start, cells = piece.group.start, len(piece.cells)
            part = filled[first : first + cells]
            if start:
                part[:, :start] = getattr(piece.group.run, kind)[layer][:, :start].transpose(0, 1)
            part[:, start:] = piece.by_cell(x)
            first += cells
        both.append(filled)
    return both


def _alone(layer: int, piece: Piece, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Keys and values of one piece, its prefix shared if that pays."""
    start, run = piece.group.start, piece.group.run
    if start and start * len(piece.cells) < SHARED_KEYS:
        k_part, v_part = _joint(layer, [piece], k, v)
        return k_part, v_part, {}
    shared = {"prefix": tuple(x[layer][None, :, :start] for x in (run.keys, run.values))} if start else {}
    return piece.by_cell(k), piece.by_cell(v), shared
