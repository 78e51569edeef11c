"""How the blocked backend cuts [B, H, M, N] into tiles of bounded size, and the logits of one tile.

A tile holds some queries with every key that they may see. Rows are therefore whole: softmax and statistics
need no online correction, memory stays O(N), and a short prompt is a single tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headstats.blocked import matmul as products
from headstats.blocked import threads as workers
from headstats.call import HIDDEN, LOG2E, Call, heads_apart, hidden_by_bias, part, parts
from headstats.edits import weights

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Shaped
    from torch import Tensor

CELLS = 5 << 18  # logits in one tile (5 MiB in float32) while its least height allows; a call of a quarter is one tile
ROWS = 64  # queries of one tile: enough for a matrix product, few enough to waste little beyond the diagonal


@dataclass(frozen=True)
class Tile:
    """Batch rows, key heads, queries and keys of one tile, as half-open ranges."""

    b: slice
    h: slice  # key heads
    i: slice
    j: slice


def tiles(call: Call) -> Iterator[Tile]:
    """Cuts the call. Every query is in exactly one tile for each head."""
    nb, m = call.q.shape[0], call.q.shape[2]
    hk, n, g = call.k.shape[1], call.n, call.groups
    rows = m if cells(call) <= CELLS // 4 else min(m, _height(g * n, workers.worth(cells(call))))
    fit = max(1, CELLS // (g * rows * n))  # how many heads, or heads of batch rows
    heads, batch, run = _even(hk, fit), _even(nb, fit // hk), nb
    if call.prefix_k is not None:  # one head, and many batch rows that share its prefix
        run = nb // call.prefix_k.shape[0]
        heads, batch = 1, _even(run, fit)
    if not call.causal:  # no diagonal: higher tiles waste nothing
        rows = max(rows, min(m, fit // (heads * batch) * rows))
    regular = rows < m and call.window is None and products.takes(call.q)
    for b, b1 in ((b, min(b + batch, r + run)) for r in range(0, nb, run) for b in range(r, r + run, batch)):
        for h in range(0, hk, heads):
            for i in range(0, m, rows):
                i1 = min(i + rows, m)
                first, stop = call.keys_seen(i, i1)
                j = slice(first, products.regular(stop, n) if regular else stop)
                yield Tile(slice(b, b1), slice(h, min(h + heads, hk)), slice(i, i1), j)


def cells(call: Call) -> int:
    """Of the whole pattern."""
    return call.q.shape[0] * call.q.shape[1] * call.q.shape[2] * call.n


def _height(width: int, threads: int) -> int:
    """Queries of a tile, `width` being the cells of each: more where threads share the work, whose time between
    operators is what they wait for each other."""
    most = ROWS if threads == 1 else 3 * ROWS
    return max(ROWS, min(most, 2 * CELLS // width // ROWS * ROWS))


def _even(count: int, most: int) -> int:
    """Size of the parts, at most `most`, that cut `count` about evenly."""
    return -(-count // -(-count // max(1, most)))


@dataclass(frozen=True)
class Keys:
    """Keys or values: each batch row's own, and before them those that a run of batch rows shares, if any.

    The shared ones are never repeated: all rows of a tile that see them stand in one matrix. Such tiles hold one
    head of one run.
    """

    own: Float[Tensor, "B Hk N-P D"]
    shared: Float[Tensor, "G Hk P D"] | None

    def parts(self, t: Tile) -> list[tuple[slice, Float[Tensor, "r h n D"]]]:
        """Columns of the tile, and the keys that stand there (a view); one row of them, or one for each batch row."""
        if t.j.start == t.j.stop:
            return []
        if self.shared is None:
            return [(slice(None), self.own[t.b, t.h, t.j])]
        runs, _, p, _ = self.shared.shape
        run, before = t.b.start // (self.own.shape[0] // runs), max(0, min(t.j.stop, p) - t.j.start)
        found = []
        if before:
            found.append((slice(0, before), self.shared[run : run + 1, t.h, t.j.start : t.j.start + before]))
        if t.j.start + before < t.j.stop:
            found.append((slice(before, None), self.own[t.b, t.h, t.j.start + before - p : t.j.stop - p]))
        return found

    def of(self, t: Tile) -> Float[Tensor, "#b h n D"]:
        """All keys of the tile in one piece; those that are shared repeated for the tile's batch rows."""
        found = [x for _, x in self.parts(t)]
        if len(found) < 2:
            return found[0] if found else self.own[t.b, t.h, :0]
        return torch.cat([x.expand(len(found[1]), -1, -1, -1) for x in found], 2)


def keys_and_values(call: Call) -> tuple[Keys, Keys]:
    """Made ready once, since many tiles read them."""
    return _ready(call, call.k, call.prefix_k), _ready(call, call.v, call.prefix_v)


def pattern_keys(call: Call) -> Keys | None:
    """The keys that Edit.pattern_from brings; the prefix stays."""
    return None if call.pattern_k is None else _ready(call, call.pattern_k, call.prefix_k)


def _ready(call: Call, own: Tensor, shared: Tensor | None) -> Keys:
    own, shared = own.to(call.dtype).contiguous(), None if shared is None else shared.to(call.dtype).contiguous()
    return Keys(own, shared)


def zeros_like(keys: Keys) -> Keys:
    """Room for the gradients of keys or values."""
    return Keys(torch.zeros_like(keys.own), None if keys.shared is None else torch.zeros_like(keys.shared))


def queries(call: Call, t: Tile, q: Float[Tensor, "B H M D"]) -> Float[Tensor, "b h g m D"]:
    """The tile's part of what is given for queries, in the dtype of logits."""
    return heads_apart(call, q)[t.b, t.h, :, t.i].to(call.dtype)


class Scratch:
    """Room for the cells of any one tile. Tiles take turns in it: fresh pages cost more than most statistics."""

    def __init__(self, call: Call, work: list[Tile]):
        sides = [[x.stop - x.start for x in (t.b, t.h, t.i, t.j)] for t in work]
        self.memory = call.q.new_empty(max(map(math.prod, sides)) * call.groups, dtype=call.dtype)

    def of(self, shape: Sequence[int]) -> Tensor:
        """Room of this shape, with what the last user left in it."""
        return self.memory[: math.prod(shape)].view(shape)


def scores(
    rows: Float[Tensor, "b h g m D"], keys: Keys, t: Tile, room: Scratch | None = None
) -> Float[Tensor, "b h g m n"]:
    """rows @ keys^T over a tile."""
    shape = (*rows.shape[:-1], t.j.stop - t.j.start)
    s = rows.new_empty(shape) if room is None else room.of(shape)
    for columns, x in keys.parts(t):
        k = x.flatten(0, 1)
        lines = s.view(len(k), -1, shape[-1])[:, :, columns]
        found = products.batched(rows.reshape(len(k), -1, rows.shape[-1]), k.mT, out=lines)
        if found is not lines and found.numel() == s.numel():
            return found.view(shape)  # in memory of its own, and all there is
        if found is not lines:
            lines.copy_(found)
    return s


def mixed(weights: Float[Tensor, "b h g m n"], values: Keys, t: Tile) -> Float[Tensor, "b h g m D"]:
    """weights @ values over a tile."""
    out = None
    for columns, x in values.parts(t):
        v = x.flatten(0, 1)
        lines = weights.reshape(len(v), -1, weights.shape[-1])[:, :, columns]
        found = products.batched(lines, v).view(*weights.shape[:-1], -1)
        out = found if out is None else out.add_(found)
    return values.own.new_zeros(*weights.shape[:-1], values.own.shape[-1]) if out is None else out


def collect(into: Keys, t: Tile, weights: Float[Tensor, "b h g m n"], rows: Float[Tensor, "b h g m D"]) -> None:
    """Adds weights^T @ rows, the backward of `scores` and `mixed` with respect to their keys."""
    for columns, x in into.parts(t):
        r = x.shape[0] * x.shape[1]
        lines = weights.reshape(r, -1, weights.shape[-1])[:, :, columns]
        x += products.batched(lines.mT, rows.reshape(r, -1, rows.shape[-1])).view(x.shape)


@dataclass
class Origin:
    """What the logits of a tile were made of, as far as their backward needs it."""

    tanh: Float[Tensor, "b h g m n"] | None = None  # of logits / softcap, if there is a softcap
    z: Float[Tensor, "b h g m n"] | None = None  # softcap(scale q.k) log2(e), where a factor or a raise acts on it
    swapped: Bool[Tensor, "#b #h #g #m"] | None = None  # rows whose pattern comes from Edit.pattern_from, if any


def logits(
    call: Call, t: Tile, q: Tensor, k: Keys, other: Keys | None, room: Scratch | None = None
) -> tuple[Float[Tensor, "b h g m n"], Origin]:
    """Masked logits of a tile times log2(e).

    Base 2, because torch.exp on CPU is 3 to 50 times slower than exp2, most of all where the result underflows.
    other: keys of Edit.pattern_from.
    """
    origin = Origin()
    s = scores(q, k, t, room)
    if other is not None:
        assert call.pattern_q is not None  # they come together
        swapped = call.q.new_ones(1, 1, 1, 1, dtype=torch.bool)
        if call.pattern_rows is not None:
            swapped = of_rows(call, t, call.pattern_rows)
        if bool(swapped.any()):
            origin.swapped = swapped
            s = torch.where(swapped[..., None], scores(queries(call, t, call.pattern_q), other, t), s)
    # The scale is applied afterwards: as a factor inside the product it may round equal logits apart.
    s.mul_(call.scale * LOG2E if call.softcap is None else call.scale / call.softcap)
    if call.softcap is not None:
        origin.tanh = s.tanh_()
        s = origin.tanh * (call.softcap * LOG2E)
    if call.logit_factor is not None or call.logit_raise is not None:
        origin.z = s
        s = _reshaped(call, t, s)
    if call.alibi is not None:
        slopes = heads_apart(call, call.alibi.to(s.dtype)[None])[:, t.h, :, None, None]
        away = call.distances(t.i.start, t.i.stop, t.j.start, t.j.stop).abs_().to(s.dtype)
        s.addcmul_(slopes, away, value=-LOG2E)
    bias = None if call.bias is None else by_group(call, parts(call.bias, t.b, query_heads(call, t), t.i, t.j))
    if bias is not None:
        s.add_(bias, alpha=LOG2E)
    if call.temperature is not None:
        s.div_(of_rows(call, t, call.temperature)[..., None])
    if call.edit_bias is not None:
        s.add_(of_edit_cells(call, t, call.edit_bias), alpha=LOG2E)
    if bias is not None:
        s.masked_fill_(hidden_by_bias(bias), HIDDEN)
    _hide(call, t, s)
    return s, origin


def _reshaped(call: Call, t: Tile, z: Tensor) -> Tensor:
    """Edit.logit_factor and logit_raise, which do not change z itself."""
    if call.logit_factor is not None:
        z = z * of_edit_cells(call, t, call.logit_factor)
    if call.logit_raise is not None:
        z = torch.addcmul(z, of_edit_cells(call, t, call.logit_raise), z.abs())
    return z


def of_rows(call: Call, t: Tile, x: Shaped[Tensor, "#B #H #M *rest"]) -> Shaped[Tensor, "#b #h #g #m *rest"]:
    """The tile's part of what is given for heads and queries; numbers in the dtype of logits."""
    x = part(by_group(call, part(part(x, t.b), query_heads(call, t), 1)), t.i, 3)
    return x.to(call.dtype) if x.is_floating_point() else x


def of_cells(call: Call, t: Tile, table: Shaped[Tensor, "#B #H Sq+1 Sk+1"]) -> Shaped[Tensor, "#b #h #g m n"]:
    """A table over pairs of segments, spread over the tile's cells."""
    return by_group(call, call.cells(table, t.i, t.j, t.b, query_heads(call, t)))


def of_edit_cells(call: Call, t: Tile, table: Shaped[Tensor, "#B #H Sq+1 Sk+1"]) -> Shaped[Tensor, "#b #h #g m n"]:
    """The same for a table of the edit; numbers in the dtype of logits."""
    x = by_group(call, call.edit_cells(table, t.i, t.j, t.b, query_heads(call, t)))
    return x.to(call.dtype) if x.is_floating_point() else x


def weights_edit(call: Call, t: Tile) -> weights.Change | None:
    """What the edit does to the weights of the tile, if anything."""
    if t.j.start == t.j.stop:
        return None
    return weights.spread(call, t.i, t.j, t.b, query_heads(call, t), lambda x: by_group(call, x))


def query_heads(call: Call, t: Tile) -> slice:
    """The query heads that read the tile's key heads."""
    return slice(t.h.start * call.groups, t.h.stop * call.groups)


def by_group(call: Call, x: Shaped[Tensor, "#B #H m n"]) -> Shaped[Tensor, "#B #Hk #G m n"]:
    """Query heads seen as key heads and groups, where there is more than one."""
    return x.unflatten(1, (-1, call.groups)) if x.shape[1] > 1 else x[:, :, None]


def _hide(call: Call, t: Tile, s: Tensor) -> None:
    """Causality and window touch only the keys at either end of the tile; padding touches all."""
    if call.segment_open is not None:
        seen = call.visible(t.i, t.j, t.b, query_heads(call, t), cut=False)
        s.masked_fill_(~by_group(call, seen), HIDDEN)
        return
    i0, i1, lo, hi = t.i.start, t.i.stop, t.j.start, t.j.stop
    left = right = None
    nearest, window = 0, call.window or hi
    if call.causal:
        right = i0 + call.offset + 1  # the first key that query i0 does not see
    if call.window is not None:
        left = i1 + call.offset - window  # the first key that every query of the tile is near enough to
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
        s.masked_fill_(~of_cells(call, t, call.segment_mask), HIDDEN)
    if call.knockout is not None:
        s.masked_fill_(of_edit_cells(call, t, call.knockout), HIDDEN)
