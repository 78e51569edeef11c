"""How the blocked backend cuts [B, H, M, N] into tiles of bounded size, and the logits of one tile.

A tile holds some queries with every key that they may see. Rows are therefore whole: softmax and statistics
need no online correction, memory stays O(N), and a short prompt is a single tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headstats.call import HIDDEN, Call, hidden_by_bias

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

CELLS = 1 << 19  # logits in one tile: 2 MiB in float32, so that a tile and its exponentials stay in cache
LOG2E = math.log2(math.e)
ROWS = 128  # queries of one tile are a multiple of this while the budget allows: matmuls want height


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
    rows = m if g * m * n <= CELLS else min(m, max(ROWS, CELLS // (g * n) // ROWS * ROWS))
    heads = min(hk, max(1, CELLS // (g * rows * n)))
    batch = min(nb, max(1, CELLS // (hk * g * rows * n))) if heads == hk else 1
    for b in range(0, nb, batch):
        for h in range(0, hk, heads):
            for i in range(0, m, rows):
                i1 = min(i + rows, m)
                j = slice(*call.keys_seen(i, i1))
                yield Tile(slice(b, min(b + batch, nb)), slice(h, min(h + heads, hk)), slice(i, i1), j)


def flat(x: Float[Tensor, "b h r d"]) -> Float[Tensor, "bh r d"]:
    """Batch and heads in one axis, for bmm."""
    return x.flatten(0, 1)


def logits(call: Call, t: Tile, q: Tensor, k: Tensor) -> tuple[Float[Tensor, "b h g m n"], Tensor | None]:
    """Masked logits of a tile times log2(e), and tanh(logits / softcap) if there is a softcap, for its backward.

    Base 2, because torch.exp on CPU is 3 to 50 times slower than exp2, most of all where the result underflows.
    q: [b*h, g*m, D] and k: [b*h, n, D], the tile's part of each.
    """
    m, n = t.i.stop - t.i.start, t.j.stop - t.j.start
    shape = (t.b.stop - t.b.start, t.h.stop - t.h.start, call.groups, m, n)
    # The scale is applied afterwards: as a factor inside the product it may round equal logits apart.
    s = torch.bmm(q, k.transpose(1, 2)).view(shape)
    s.mul_(call.scale * LOG2E if call.softcap is None else call.scale / call.softcap)
    tanh = None
    if call.softcap is not None:
        tanh = s.tanh_()
        s = tanh * (call.softcap * LOG2E)
    if call.bias is not None:
        bias = heads_apart(call, call.bias)[t.b, t.h, :, t.i, t.j]
        s.add_(bias, alpha=LOG2E).masked_fill_(hidden_by_bias(bias), HIDDEN)
    _hide(call, t, s)
    return s, tanh


def heads_apart(call: Call, x: Tensor) -> Tensor:
    """[B, H, ...] seen as [B, Hk, H/Hk, ...]."""
    return x.unflatten(1, (call.k.shape[1], call.groups))


def _hide(call: Call, t: Tile, s: Tensor) -> None:
    """Causality and window touch only the keys at either end of the tile; padding touches all."""
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
