"""Softmax and statistics of whole rows in one tile of the blocked backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headstats.call import HIDDEN, Call
from headstats.stats import BY_NAME, Pattern
from headstats.tiles import CELLS, LOG2E, Tile, heads_apart

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped
    from torch import Tensor


@dataclass
class Rows:
    """A tile after the softmax, not yet normalised: p = e * inverse. x and argmax exist if a statistic needs them.

    Scores, shift and top are in base 2, that is, logits times log2(e).
    """

    e: Float[Tensor, "b h g m n"]  # 2^(score - shift), 0 where hidden
    x: Float[Tensor, "b h g m n"] | None  # score - shift
    shift: Float[Tensor, "b h g m"]  # the row's largest logit, learned sink included
    inverse: Float[Tensor, "b h g m"]  # 1 / sum of 2^(score - shift), learned sink included
    lse: Float[Tensor, "b h g m"]  # natural
    mass: Float[Tensor, "b h g m"]  # sum of e over keys
    top: Float[Tensor, "b h g m"]  # the largest logit among keys
    argmax: Int[Tensor, "b h g m"] | None
    empty: Bool[Tensor, "b h g m"]  # no key is visible


def softmax(call: Call, t: Tile, s: Float[Tensor, "b h g m n"]) -> Rows:
    """Turns logits (overwritten) into unnormalised weights."""
    asked = call.spec.requested()
    argmax = None
    if s.shape[-1] == 0:
        top = s.new_full(s.shape[:-1], HIDDEN)
        argmax = torch.zeros_like(top, dtype=torch.int64)
    elif "argmax" in asked:
        top, argmax = top_and_place(s)
    else:
        top = s.amax(-1)
    empty = top <= HIDDEN / 2
    shift = top.clamp_min(HIDDEN / 2)  # keeps 2^(HIDDEN - shift) = 0 in a row where everything is hidden
    if call.sinks is not None:
        sink = heads_apart(call, call.sinks.to(s.dtype)[None] * LOG2E)[:, t.h, :, None]
        shift = torch.maximum(shift, sink)
    keep = any(name not in NO_LOGITS for name in asked)
    x = s.sub_(shift[..., None])
    e = x.exp2() if keep else x.exp2_()
    mass = e.sum(-1)
    total = mass if call.sinks is None else mass + torch.exp2(sink - shift)
    lse = ((shift + total.log2()) / LOG2E).masked_fill_(empty, -torch.inf)
    # Where nothing is visible, total may be 0; mass is 0 then, so any finite inverse gives zeros.
    inverse = total.clamp_min(torch.finfo(s.dtype).tiny).reciprocal()
    return Rows(e, x if keep else None, shift, inverse, lse, mass, top, argmax, empty)


def top_and_place(s: Float[Tensor, "*lead n"]) -> tuple[Float[Tensor, "*lead"], Int[Tensor, "*lead"]]:
    """The largest logit and where it first stands. In long rows: the best of 16 blocks, then the place within it.

    A maximum without its place is ten times faster than one with.
    """
    n = s.shape[-1]
    if n < 512:
        top, place = s.max(-1)
        return top, place
    width = n // 16
    blocks = s[..., : 16 * width].unflatten(-1, (16, width))
    top, block = blocks.amax(-1).max(-1)
    chosen = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, width))
    place = block * width + chosen[..., 0, :].max(-1).indices
    if 16 * width < n:
        last, there = s[..., 16 * width :].max(-1)
        place = torch.where(last > top, there + 16 * width, place)  # on a tie the earlier one stays
        top = torch.maximum(top, last)
    return top, place


def statistic(call: Call, t: Tile, row: Rows, name: str, value: int | bool) -> Tensor:
    """One statistic of a tile: by its fast form if it has one, else by its definition on the tile's pattern."""
    stat = BY_NAME[name]
    if name in FAST:
        result = FAST[name](call, t, row, value)
    else:
        result = stat.dense(as_pattern(call, t, row), value)
    return result if stat.axis == "key" else result.masked_fill(row.empty, stat.empty)


def _entropy(call: Call, t: Tile, row: Rows, _) -> Tensor:
    # -sum p log2 p with p = e * inverse and log2 p = x + log2 inverse
    assert row.x is not None  # kept, since entropy is not among NO_LOGITS
    weighted = (row.e * row.x).sum(-1)
    return row.inverse * (weighted + row.mass * row.inverse.log2()) / -LOG2E


def _argmax(call: Call, t: Tile, row: Rows, _) -> Tensor:
    assert row.argmax is not None  # found by softmax, since it was asked for
    return row.argmax + t.j.start


def _max_prob(call: Call, t: Tile, row: Rows, _) -> Tensor:
    return torch.exp2(row.top - row.shift) * row.inverse


def _sink(call: Call, t: Tile, row: Rows, k: int | bool) -> Tensor:
    if call.key_padding is None:
        return row.e[..., : max(0, int(k) - t.j.start)].sum(-1) * row.inverse
    first = call.key_rank()[t.b, t.j] < int(k)
    return (row.e * first[:, None, None, None]).sum(-1) * row.inverse


def _distance(call: Call, t: Tile, row: Rows, _) -> Tensor:
    # (i + N - M - j) split into the query's place in the tile and the distance from the tile's first query
    back = call.distances(t.i.start, t.i.start + 1, t.j.start, t.j.stop)[0].to(row.e.dtype)
    place = torch.arange(row.e.shape[-2], device=row.e.device, dtype=row.e.dtype)
    return (row.e @ back + place * row.mass) * row.inverse


def _at_distance(d: int) -> Callable[[Call, Tile, Rows, int | bool], Tensor]:
    def probe(call: Call, t: Tile, row: Rows, _) -> Tensor:
        start = t.i.start + call.offset - d - t.j.start  # column of the wanted key in the tile's first row
        m, n = row.e.shape[-2:]
        result = torch.zeros_like(row.mass)
        i0, i1 = max(0, -start), min(m, n - start)
        if i0 < i1:
            result[..., i0:i1] = row.e.diagonal(start, -2, -1)
        return result.mul_(row.inverse)

    return probe


def _received(call: Call, t: Tile, row: Rows, _) -> Tensor:
    weight = row.inverse
    if call.query_padding is not None:
        weight = weight * call.query_padding[t.b, None, None, t.i]
    return (weight[..., None, :] @ row.e)[..., 0, :]


FAST: dict[str, Callable[[Call, Tile, Rows, int | bool], Tensor]] = {
    "entropy": _entropy,
    "argmax": _argmax,
    "max_prob": _max_prob,
    "sink": _sink,
    "distance": _distance,
    "diagonal": _at_distance(0),
    "previous": _at_distance(1),
    "received": _received,
}
NO_LOGITS = set(FAST) - {"entropy"}  # statistics that read weights alone: logits may be overwritten


def as_pattern(call: Call, t: Tile, row: Rows) -> Pattern:
    """The tile in the terms in which statistics are defined."""
    assert row.x is not None  # kept for statistics without a fast form
    i, j = (t.i.start, t.i.stop), (t.j.start, t.j.stop)
    visible = _visible(call, t)
    real = call.query_padding
    return Pattern(
        p=row.e * row.inverse[..., None],
        scores=(row.x + row.shift[..., None]) / LOG2E,
        log_norm=row.lse.masked_fill(row.empty, 0),
        visible=visible,
        distance=call.distances(*i, *j).to(row.e.dtype),
        key_rank=call.key_rank()[:, None, None, None, t.j] if call.key_padding is None
        else call.key_rank()[t.b, None, None, None, t.j],
        real_query=visible.new_ones(1) if real is None else real[t.b, None, None, t.i, None],
    )  # fmt: skip


def _visible(call: Call, t: Tile) -> Bool[Tensor, "#b #h #g m n"]:
    mask = call.visible(t.i.start, t.i.stop, t.j.start, t.j.stop)
    if mask.shape[1] > 1:
        mask = heads_apart(call, mask)[:, t.h]
    else:
        mask = mask[:, :, None]
    return mask[t.b] if mask.shape[0] > 1 else mask


def mean_over_queries(call: Call, total: Shaped[Tensor, "B Hk G N"], empty: float) -> Tensor:
    """Column sums divided by the number of real queries that see the column."""
    count = total.new_zeros(total.shape)
    m, n = call.q.shape[2], call.k.shape[2]
    step = max(1, CELLS // 4 // (n * (1 if call.bias is None else total[..., 0].numel())))
    for i in range(0, m, step):
        i1 = min(i + step, m)
        mask = call.visible(i, i1, 0, n)
        if call.query_padding is not None:
            mask = mask & call.query_padding[:, None, i:i1, None]
        seen = mask.sum(-2)
        count += heads_apart(call, seen) if seen.shape[1] > 1 else seen[:, :, None]
    return torch.where(count > 0, total / count.clamp_min(1), empty)
