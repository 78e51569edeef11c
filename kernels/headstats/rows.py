"""Softmax of whole rows in one tile of the blocked backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headstats.call import HIDDEN, Call, part
from headstats.stats import Pattern
from headstats.tiles import LOG2E, Tile, by_group, of_cells, of_rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
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
    empty: Bool[Tensor, "b h g m"]  # no key is visible, or all are cut
    z: Float[Tensor, "b h g m Dv"] | None = None  # sum of e v


def softmax(call: Call, t: Tile, s: Float[Tensor, "b h g m n"], keep: bool) -> Rows:
    """Turns logits (overwritten) into unnormalised weights. keep: a statistic needs the logits afterwards."""
    argmax = None
    if s.shape[-1] == 0:
        top = s.new_full(s.shape[:-1], HIDDEN)
        argmax = torch.zeros_like(top, dtype=torch.int64)
    elif call.spec.argmax:
        top, argmax = top_and_place(s)
    else:
        top = s.amax(-1)
    empty = top <= HIDDEN / 2
    shift = top.clamp_min(HIDDEN / 2)  # keeps 2^(HIDDEN - shift) = 0 in a row where everything is hidden
    if call.sinks is not None:
        sink = of_rows(call, t, call.sinks[None, :, None] * LOG2E)
        if call.temperature is not None:
            sink = sink / of_rows(call, t, call.temperature)
        shift = torch.maximum(shift, sink)
    cut = None if call.knockout is None or call.renormalise else of_cells(call, t, call.knockout)
    keep = keep or cut is not None
    x = s.sub_(shift[..., None])
    e = x.exp2() if keep else x.exp2_()
    mass = e.sum(-1)
    total = mass if call.sinks is None else mass + torch.exp2(sink - shift)
    lse = ((shift + total.log2()) / LOG2E).masked_fill_(empty, -torch.inf)
    if cut is not None and s.shape[-1]:  # the row's norm stays, the cells go
        mass = e.masked_fill_(cut, 0).sum(-1)
        top, argmax = top_and_place(x.masked_fill_(cut, HIDDEN))
        empty, top = top <= HIDDEN / 4, top + shift
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


def as_pattern(call: Call, t: Tile, row: Rows) -> Pattern:
    """The tile in the terms in which statistics are defined."""
    assert row.x is not None and row.z is not None  # kept for statistics without a fast form
    i, j = (t.i.start, t.i.stop), (t.j.start, t.j.stop)
    visible = call.visible(t.i, t.j, t.b, slice(t.h.start * call.groups, t.h.stop * call.groups))
    real = visible.new_ones(1, 1) if call.query_padding is None else call.query_padding[t.b, t.i]
    targets, features, segment = call.targets, call.key_features, call.k_segments
    return Pattern(
        p=row.e * row.inverse[..., None],
        scores=(row.x + row.shift[..., None]) / LOG2E,
        log_norm=row.lse.masked_fill(row.empty, 0),
        visible=by_group(call, visible),
        distance=call.distances(*i, *j).to(row.e.dtype),
        key_rank=part(call.key_rank(), t.b)[:, None, None, None, t.j],
        real_query=real[:, None, None, :, None],
        z=row.z * row.inverse[..., None],
        first_key=t.j.start,
        key_segment=None if segment is None else part(segment, t.b)[:, None, None, t.j],
        n_segments=call.n_segments,
        targets=None if targets is None else part(targets, t.b)[:, None, None, t.i],
        features=None if features is None else part(features, t.b)[:, None, None, t.j].to(row.e.dtype),
    )
