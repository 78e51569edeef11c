"""Attention of packed cells, with many cells in one call.

Each cell's rows come after its base run's prefix.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp.engine.packing import Piece
from interp.model.apply_masks import apply_masks
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend
from interp.model.instrument import Instrument
from interp.model.layer_edits import LayerEdit
from interp.model.layer_masks import LayerMask, masks_of

SHARED_KEYS = 2048  # prefix keys × cells from which sharing the prefix is faster than copying it for every cell
SHORT = 64  # up to so many keys, cells of other runs or with other first rows go into one joint call
WASTED = 8192  # padding, in cells of attention patterns, that costs as much as another call

EditsByRow = tuple[tuple[LayerEdit | LayerMask, ...], ...]  # of each cell of a piece; empty if there are none


def packed_attention(
    like: AttentionCall,
    instrument: Instrument,
    q: Float[Tensor, "query_rows heads d_head"],
    k: Float[Tensor, "key_rows kv_heads d_head"],
    v: Float[Tensor, "key_rows kv_heads d_value"],
    queries: Sequence[Piece],
    keys: Sequence[Piece],
    edits: Callable[[Piece], EditsByRow],
) -> Float[Tensor, "query_rows heads d_value"]:
    """Compute attention for all packed rows.

    ``like``: the layer's recorded call, without masks, for its window, scale and so on.  ``queries``: the pieces whose
    rows ``q`` holds.  ``keys``: for each of them the piece of the same cells whose rows ``k`` and ``v`` hold.
    ``edits``: those of a piece's cells.
    """
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    out[queries[-1].span.stop :] = 0  # padding rows
    for bundle in _bundles(queries, keys, edits):
        by_row: EditsByRow = ()
        if len(bundle) == 1:
            query_piece, key_piece = queries[bundle[0]], keys[bundle[0]]
            q_part, by_row = query_piece.by_cell(q), edits(query_piece)
            k_part, v_part, more = _single_keys(like.layer, key_piece, k, v)
        else:
            q_part = _right_aligned(q, [queries[i] for i in bundle])
            k_part, v_part = _joint_keys(like.layer, [keys[i] for i in bundle], k, v)
            more = {}
        stop = keys[bundle[0]].stop
        bias = None if like.bias is None else like.bias[:1, ..., :stop]  # per key: the same for every run
        call = replace(
            like, q=q_part.transpose(1, 2), k=k_part.transpose(1, 2), v=v_part.transpose(1, 2), key_padding=None,
            bias=bias, edits=by_row,
        )  # fmt: skip
        if any(map(masks_of, by_row)):
            call, dense_because = apply_masks(call, stop)
            instrument.record(like.layer).dense_because = dense_because
        result = attend(call, backend=instrument.backend, **more).out.transpose(1, 2)
        first = 0
        for piece in (queries[i] for i in bundle):
            cells = len(piece.cells)
            piece.by_cell(out).copy_(result[first : first + cells, result.shape[1] - piece.rows :])
            first += cells
    return out


def _bundles(queries: Sequence[Piece], keys: Sequence[Piece], edits: Callable[[Piece], EditsByRow]) -> list[list[int]]:
    """Group the numbers of pieces that go into one call.

    These are short ones with as many keys and about as many rows.
    """
    joint: dict[int, list[int]] = defaultdict(list)
    out: list[list[int]] = []
    for i, (piece, key_piece) in enumerate(zip(queries, keys, strict=True)):
        if key_piece.stop > SHORT or edits(piece):
            out.append([i])
        else:
            joint[key_piece.stop].append(i)
    for stop, numbers in joint.items():
        bundle: list[int] = []
        wasted = 0
        for i in sorted(numbers, key=lambda i: -queries[i].rows):
            wasted += (queries[bundle[0]].rows - queries[i].rows) * len(queries[i].cells) * stop if bundle else 0
            if not bundle or wasted > WASTED:
                bundle, wasted = [], 0
                out.append(bundle)
            bundle.append(i)
    return out


def _right_aligned(x: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Lay rows out as [cells, most rows, ...].

    A cell with fewer rows has zeros before them.
    """
    rows = max(p.rows for p in pieces)
    needs_padding = any(p.rows < rows for p in pieces)
    make = x.new_zeros if needs_padding else x.new_empty
    filled = make(sum(len(p.cells) for p in pieces), rows, *x.shape[1:])
    first = 0
    for piece in pieces:
        cells = len(piece.cells)
        filled[first : first + cells, rows - piece.rows :] = piece.by_cell(x)
        first += cells
    return filled


def _joint_keys(layer: int, pieces: Sequence[Piece], k: Tensor, v: Tensor) -> list[Tensor]:
    """Keys and values of all cells, each [cells, all keys, heads, d].

    Every cell has its own copy of the prefix.
    """
    keys_and_values = []
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
        keys_and_values.append(filled)
    return keys_and_values


def _single_keys(layer: int, piece: Piece, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Keys and values of one piece.

    Its prefix is shared between cells if that is faster.
    """
    start, run = piece.group.start, piece.group.run
    if start and start * len(piece.cells) < SHARED_KEYS:
        k_part, v_part = _joint_keys(layer, [piece], k, v)
        return k_part, v_part, {}
    shared = {"prefix": tuple(x[layer][None, :, :start] for x in (run.keys, run.values))} if start else {}
    return piece.by_cell(k), piece.by_cell(v), shared
