"""Tiles of bounded size that cut [B, H, M, N], and the logits of one tile.

A tile holds some queries with every key that they may see. Its rows are therefore whole: softmax and statistics need no
online correction, memory stays O(N), and a short prompt is a single tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headstats.blocked import matmul, threads
from headstats.call import HIDDEN, LOG2E, Call, heads_apart, hidden_by_bias, slice_axes, slice_axis
from headstats.edits import weights

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped
    from torch import Tensor

# Most logits in one tile (5 MiB in float32), unless a tile of the least height has more. A call with at most a quarter
# of this is one tile.
CELLS = 5 << 18
ROWS = 64  # queries of one tile: enough for a matrix product, few enough to waste little beyond the diagonal


@dataclass(frozen=True)
class Tile:
    """Batch rows, key heads, queries and keys of one tile, as half-open ranges."""

    b: slice
    h: slice  # key heads
    i: slice
    j: slice


def tiles(call: Call) -> Iterator[Tile]:
    """Cut the call into tiles. Every query is in exactly one tile for each head."""
    nb, m = call.q.shape[0], call.q.shape[2]
    hk, n, g = call.k.shape[1], call.n, call.groups
    rows = m if cells(call) <= CELLS // 4 else min(m, _height(g * n, threads.thread_count(cells(call))))
    fit = max(1, CELLS // (g * rows * n))  # how many heads, or heads of batch rows
    heads, batch, run = _even_size(hk, fit), _even_size(nb, fit // hk), nb
    if call.prefix_k is not None:  # one head, and many batch rows that share the prefix
        run = nb // call.prefix_k.shape[0]
        heads, batch = 1, _even_size(run, fit)
    if not call.causal:  # no diagonal: higher tiles waste nothing
        rows = max(rows, min(m, fit // (heads * batch) * rows))
    rounds_ends = rows < m and call.window is None and matmul.uses_onednn(call.q)
    for b, b1 in ((b, min(b + batch, r + run)) for r in range(0, nb, run) for b in range(r, r + run, batch)):
        for h in range(0, hk, heads):
            for i in range(0, m, rows):
                i1 = min(i + rows, m)
                first, stop = call.visible_range(i, i1)
                j = slice(first, matmul.round_end(stop, n) if rounds_ends else stop)
                yield Tile(slice(b, b1), slice(h, min(h + heads, hk)), slice(i, i1), j)


def cells(call: Call) -> int:
    """Return the number of cells of the whole pattern."""
    return call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.n


def _height(width: int, threads: int) -> int:
    """Return the number of queries of a tile, given the number of cells of each.

    Tiles are higher where threads share the work, since the time between operators is time they wait for each other.
    """
    most = ROWS if threads == 1 else 3 * ROWS
    return max(ROWS, min(most, 2 * CELLS // width // ROWS * ROWS))


def _even_size(count: int, most: int) -> int:
    """Return the size of parts that cut `count` about evenly, at most `most`."""
    return -(-count // -(-count // max(1, most)))


@dataclass(frozen=True)
class KeyTensors:
    """Keys or values: those shared by a run of batch rows, then each row's own.

    Shared ones are never repeated: all rows of a tile that see them are in one matrix. Such tiles hold one head of one
    run.
    """

    own: Float[Tensor, "B Hk N-P D"]
    shared: Float[Tensor, "G Hk P D"] | None

    def parts(self, t: Tile) -> list[tuple[slice, Float[Tensor, "r h n D"]]]:
        """Return the columns of the tile with their keys (a view).

        The keys are one row, or one row for each batch row.
        """
        if t.j.start == t.j.stop:
            return []
        if self.shared is None:
            return [(slice(None), self.own[t.b, t.h, t.j])]
        runs, _, p, _ = self.shared.shape
        run, before = t.b.start // (self.own.shape[0] // runs), max(0, min(t.j.stop, p) - t.j.start)
        regions = []
        if before:
            regions.append((slice(0, before), self.shared[run : run + 1, t.h, t.j.start : t.j.start + before]))
        if t.j.start + before < t.j.stop:
            regions.append((slice(before, None), self.own[t.b, t.h, t.j.start + before - p : t.j.stop - p]))
        return regions

    def of(self, t: Tile) -> Float[Tensor, "#b h n D"]:
        """Return all keys of the tile in one tensor.

        Shared keys are repeated for the tile's batch rows.
        """
        regions = [x for _, x in self.parts(t)]
        if len(regions) < 2:
            return regions[0] if regions else self.own[t.b, t.h, :0]
        return torch.cat([x.expand(len(regions[1]), -1, -1, -1) for x in regions], 2)


def key_tensors(call: Call) -> tuple[KeyTensors, KeyTensors]:
    """Convert keys and values once, since many tiles read them."""
    return _prepare(call, call.k, call.prefix_k), _prepare(call, call.v, call.prefix_v)


def pattern_keys(call: Call) -> KeyTensors | None:
    """Return the keys of Edit.pattern_from; the prefix stays."""
    return None if call.pattern_k is None else _prepare(call, call.pattern_k, call.prefix_k)


def _prepare(call: Call, own: Tensor, shared: Tensor | None) -> KeyTensors:
    own, shared = own.to(call.dtype).contiguous(), None if shared is None else shared.to(call.dtype).contiguous()
    return KeyTensors(own, shared)


def zeros_like(keys: KeyTensors) -> KeyTensors:
    """Allocate the gradients of keys or values."""
    return KeyTensors(torch.zeros_like(keys.own), None if keys.shared is None else torch.zeros_like(keys.shared))


def tile_queries(call: Call, t: Tile, q: Float[Tensor, "B H M D"]) -> Float[Tensor, "b h g m D"]:
    """Return the tile's part of a tensor over queries, in the dtype of logits."""
    return heads_apart(call, q)[t.b, t.h, :, t.i].to(call.dtype)


class Scratch:
    """Memory for the cells of any one tile.

    Tiles reuse it, because fresh pages cost more than most statistics.
    """

    def __init__(self, call: Call, work: list[Tile]):
        sides = [[x.stop - x.start for x in (t.b, t.h, t.i, t.j)] for t in work]
        self.memory = call.q.new_empty(max(map(math.prod, sides)) * call.groups, dtype=call.dtype)

    def of(self, shape: Sequence[int]) -> Tensor:
        """Return memory of this shape, which still holds what was last written."""
        return self.memory[: math.prod(shape)].view(shape)


def scores(
    rows: Float[Tensor, "b h g m D"], keys: KeyTensors, t: Tile, room: Scratch | None = None
) -> Float[Tensor, "b h g m n"]:
    """Compute rows @ keys^T over a tile."""
    shape = (*rows.shape[:-1], t.j.stop - t.j.start)
    s = rows.new_empty(shape) if room is None else room.of(shape)
    for columns, x in keys.parts(t):
        k = x.flatten(0, 1)
        lines = s.view(len(k), -1, shape[-1])[:, :, columns]
        product = matmul.batched(rows.reshape(len(k), -1, rows.shape[-1]), k.mT, out=lines)
        if product is not lines and product.numel() == s.numel():
            return product.view(shape)  # in its own memory, and complete
        if product is not lines:
            lines.copy_(product)
    return s


def mix_values(weights: Float[Tensor, "b h g m n"], values: KeyTensors, t: Tile) -> Float[Tensor, "b h g m D"]:
    """Compute weights @ values over a tile."""
    out = None
    for columns, x in values.parts(t):
        v = x.flatten(0, 1)
        lines = weights.reshape(len(v), -1, weights.shape[-1])[:, :, columns]
        product = matmul.batched(lines, v).view(*weights.shape[:-1], -1)
        out = product if out is None else out.add_(product)
    return values.own.new_zeros(*weights.shape[:-1], values.own.shape[-1]) if out is None else out


def add_to_keys(
    into: KeyTensors, t: Tile, weights: Float[Tensor, "b h g m n"], rows: Float[Tensor, "b h g m D"]
) -> None:
    """Add weights^T @ rows.

    This is the backward of `scores` and `mix_values` with respect to their keys.
    """
    for columns, x in into.parts(t):
        r = x.shape[0] * x.shape[1]
        lines = weights.reshape(r, -1, weights.shape[-1])[:, :, columns]
        x += matmul.batched(lines.mT, rows.reshape(r, -1, rows.shape[-1])).view(x.shape)


@dataclass
class LogitParts:
    """Intermediate values of the logits of a tile that their backward needs."""

    tanh: Float[Tensor, "b h g m n"] | None = None  # of logits / softcap, if there is a softcap
    z: Float[Tensor, "b h g m n"] | None = None  # softcap(scale q.k) log2(e), if a factor or a raise acts on it
    swapped: Bool[Tensor, "#b #h #g #m"] | None = None  # rows whose pattern comes from Edit.pattern_from, if any


def logits(
    call: Call, t: Tile, q: Tensor, k: KeyTensors, other: KeyTensors | None, room: Scratch | None = None
) -> tuple[Float[Tensor, "b h g m n"], LogitParts]:
    """Compute the masked logits of a tile times log2(e).

    The second result holds the values that their backward needs.

    Base 2, because torch.exp on CPU is 3 to 50 times slower than exp2, especially where the result underflows.
    other: the keys of Edit.pattern_from.
    """
    origin = LogitParts()
    s = scores(q, k, t, room)
    if other is not None:
        assert call.pattern_q is not None  # set together with the keys
        swapped = call.q.new_ones(1, 1, 1, 1, dtype=torch.bool)
        if call.pattern_rows is not None:
            swapped = tile_rows(call, t, call.pattern_rows)
        if bool(swapped.any()):
            origin.swapped = swapped
            s = torch.where(swapped[..., None], scores(tile_queries(call, t, call.pattern_q), other, t), s)
    # The scale is applied after the product: inside it, rounding could make equal logits differ.
    s.mul_(call.scale * LOG2E if call.softcap is None else call.scale / call.softcap)
    if call.softcap is not None:
        origin.tanh = s.tanh_()
        s = origin.tanh * (call.softcap * LOG2E)
    if call.logit_factor is not None or call.logit_raise is not None:
        origin.z = s
        s = _reshape_logits(call, t, s)
    if call.alibi is not None:
        slopes = heads_apart(call, call.alibi.to(s.dtype)[None])[:, t.h, :, None, None]
        away = call.distances(t.i.start, t.i.stop, t.j.start, t.j.stop).abs_().to(s.dtype)
        s.addcmul_(slopes, away, value=-LOG2E)
    bias = None if call.bias is None else group_heads(call, slice_axes(call.bias, t.b, query_heads(call, t), t.i, t.j))
    if bias is not None:
        s.add_(bias, alpha=LOG2E)
    if call.temperature is not None:
        s.div_(tile_rows(call, t, call.temperature)[..., None])
    if call.edit_bias is not None:
        s.add_(tile_edit_cells(call, t, call.edit_bias), alpha=LOG2E)
    if bias is not None:
        s.masked_fill_(hidden_by_bias(bias), HIDDEN)
    _hide_cells(call, t, s)
    return s, origin


def _reshape_logits(call: Call, t: Tile, z: Tensor) -> Tensor:
    """Apply Edit.logit_factor and logit_raise, without changing z itself."""
    if call.logit_factor is not None:
        z = z * tile_edit_cells(call, t, call.logit_factor)
    if call.logit_raise is not None:
        z = torch.addcmul(z, tile_edit_cells(call, t, call.logit_raise), z.abs())
    return z


def tile_rows(call: Call, t: Tile, x: Shaped[Tensor, "#B #H #M *rest"]) -> Shaped[Tensor, "#b #h #g #m *rest"]:
    """Return the tile's part of a tensor over heads and queries.

    Floats are converted to the dtype of logits.
    """
    x = slice_axis(group_heads(call, slice_axis(slice_axis(x, t.b), query_heads(call, t), 1)), t.i, 3)
    return x.to(call.dtype) if x.is_floating_point() else x


def tile_cells(call: Call, t: Tile, table: Shaped[Tensor, "#B #H Sq+1 Sk+1"]) -> Shaped[Tensor, "#b #h #g m n"]:
    """Spread a table over pairs of segments over the tile's cells."""
    return group_heads(call, call.cells(table, t.i, t.j, t.b, query_heads(call, t)))


def tile_edit_cells(call: Call, t: Tile, table: Shaped[Tensor, "#B #H Sq+1 Sk+1"]) -> Shaped[Tensor, "#b #h #g m n"]:
    """Do the same for a table of the edit; floats in the dtype of logits."""
    x = group_heads(call, call.edit_cells(table, t.i, t.j, t.b, query_heads(call, t)))
    return x.to(call.dtype) if x.is_floating_point() else x


def tile_weight_edit(call: Call, t: Tile) -> weights.WeightEdit | None:
    """Return the edit of the weights of the tile, if it has one."""
    if t.j.start == t.j.stop:
        return None
    return weights.edit_of_cells(call, t.i, t.j, t.b, query_heads(call, t), lambda x: group_heads(call, x))


def query_heads(call: Call, t: Tile) -> slice:
    """Return the query heads that read the tile's key heads."""
    return slice(t.h.start * call.groups, t.h.stop * call.groups)


def group_heads(call: Call, x: Shaped[Tensor, "#B #H m n"]) -> Shaped[Tensor, "#B #Hk #G m n"]:
    """View query heads as key heads and groups, if there is more than one head."""
    return x.unflatten(1, (-1, call.groups)) if x.shape[1] > 1 else x[:, :, None]


def _hide_cells(call: Call, t: Tile, s: Tensor) -> None:
    """Set hidden cells to HIDDEN.

    Causality and window affect only keys at the ends of the tile, padding all keys.
    """
    if call.segment_open is not None:
        seen = call.visible(t.i, t.j, t.b, query_heads(call, t), cut=False)
        s.masked_fill_(~group_heads(call, seen), HIDDEN)
        return
    i0, i1, lo, hi = t.i.start, t.i.stop, t.j.start, t.j.stop
    left = right = None
    nearest, window = 0, call.window or hi
    if call.causal:
        right = i0 + call.offset + 1  # the first key that query i0 does not see
    if call.window is not None:
        left = i1 + call.offset - window  # the first key within the window of every query of the tile
        if not call.causal:
            right = i0 + call.offset + window
            nearest = 1 - window
    if left is not None and left > lo:
        left = min(left, hi)
        s[..., : left - lo].masked_fill_(call.distances(i0, i1, lo, left) >= window, HIDDEN)
    if right is not None and right < hi:
        right = max(right, lo)
        s[..., right - lo :].masked_fill_(call.distances(i0, i1, right, hi) < nearest, HIDDEN)
    if call.key_padding is not None:
        s.masked_fill_(~call.key_padding[t.b, None, None, None, t.j], HIDDEN)
    if call.segment_mask is not None:
        s.masked_fill_(~tile_cells(call, t, call.segment_mask), HIDDEN)
    if call.knockout is not None:
        s.masked_fill_(tile_edit_cells(call, t, call.knockout), HIDDEN)
