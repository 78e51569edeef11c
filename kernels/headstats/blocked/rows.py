"""Softmax of whole rows in a tile of the blocked backend."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headstats.blocked.tiles import KeyTensors, Scratch, Tile, group_heads, query_heads, tile_rows, tile_weight_edit
from headstats.call import HIDDEN, LOG2E, LOWEST, Call, slice_axis
from headstats.edits import weights
from headstats.stats import Pattern, broadcast_rows

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass
class TileSoftmax:
    """A tile after the softmax, before normalisation: p = e * inverse.

    x, ex, argmax are set if a statistic needs them.

    x, shift and top are in base 2, that is, logits times log2(e). Edits of weights change e, x and all values computed
    from them, but not shift, inverse and lse.
    """

    e: Float[Tensor, "b h g m n"]  # 2^x, 0 where hidden
    x: Float[Tensor, "b h g m n"] | None  # logit - shift
    floor: float | Float[Tensor, "b h g m"]  # at or below it, x is hidden
    shift: Float[Tensor, "b h g m"]  # the row's largest logit, learned sink included
    inverse: Float[Tensor, "b h g m"]  # 1 / sum of 2^(score - shift), learned sink included
    log_total: Float[Tensor, "b h g m"]  # log2 of that sum; -inf in empty rows
    mass: Float[Tensor, "b h g m"]  # sum of e over keys
    top: Float[Tensor, "b h g m"]  # the largest x
    argmax: Int[Tensor, "b h g m"] | None
    ex: Float[Tensor, "b h g m"] | None  # sum of e x
    empty: Bool[Tensor, "b h g m"]  # no key is visible, or all are cut
    v: KeyTensors | None = None  # values of the whole call
    z: Float[Tensor, "b h g m Dv"] | None = None  # sum of e v

    @property
    def norm(self) -> Float[Tensor, "2 b h g m"]:
        """The norm as `call.lse_of` reads it."""
        return torch.stack([self.shift, self.log_total])

    @property
    def is_visible(self) -> Bool[Tensor, "b h g m n"]:
        """Which cells are visible; False also where x is NaN."""
        assert self.x is not None  # kept for statistics that ask
        return self.x > (self.floor[..., None] if isinstance(self.floor, torch.Tensor) else self.floor)

    def where_empty(self, x: Float[Tensor, "b h g m *rest"], value: float) -> Float[Tensor, "b h g m *rest"]:
        """Return x with `value` in empty rows."""
        return x.masked_fill(broadcast_rows(self.empty, x), value)


def softmax(call: Call, t: Tile, s: Float[Tensor, "b h g m n"], keep: bool, room: Scratch | None) -> TileSoftmax:
    """Turn logits (overwritten) into unnormalised weights.

    keep: a statistic needs the logits afterwards.
    """
    argmax = None
    if s.shape[-1] == 0:
        top = s.new_full(s.shape[:-1], HIDDEN)
        argmax = torch.zeros_like(top, dtype=torch.int64)
    elif call.spec.argmax:
        top, argmax = first_maximum(s)
    else:
        top = s.amax(-1)
    empty, shift, sink = largest_logit(call, t, top)
    change = tile_weight_edit(call, t)
    needs_entropy = call.spec.entropy or call.spec.entropy_normalised
    x, floor = s.sub_(shift[..., None]), LOWEST - shift
    if change is not None:
        x.masked_fill_(x <= floor[..., None], HIDDEN)
    if keep or needs_entropy or change is not None:
        e = x.exp2() if room is None else torch.exp2(x, out=room.of(x.shape))
    else:
        e = x.exp2_()
    mass = e.sum(-1)
    total = mass if sink is None else mass + torch.exp2(sink - shift)
    log_total = total.log2().masked_fill_(empty, -torch.inf)
    top = top - shift
    # Where no key is visible, total may be 0. Then mass is 0, so any finite inverse gives zeros.
    total = total.clamp_min(torch.finfo(s.dtype).tiny)
    if change is not None:  # the norm of the row does not change
        e, x = weights.apply_edit(change, x, total, weights.BINARY)
        mass, (top, argmax) = e.sum(-1), first_maximum(x)
        empty, floor = top <= HIDDEN / 4, HIDDEN / 4
    ex = (e * x if keep else x.mul_(e)).sum(-1) if needs_entropy else None
    inverse = total.reciprocal()
    row = TileSoftmax(e, x if keep else None, floor, shift, inverse, log_total, mass, top, argmax, ex, empty)
    # One number tells whether some cell was NaN or infinite: then it is in the sum of entropies, too.
    if not math.isfinite(float((total if ex is None else ex).sum())):
        _set_undefined(row, total)
    return row


def largest_logit(
    call: Call, t: Tile, top: Float[Tensor, "b h g m"]
) -> tuple[Bool[Tensor, "b h g m"], Float[Tensor, "b h g m"], Float[Tensor, "#b h g #m"] | None]:
    """Return which rows are empty, the logit that is subtracted from each row, and its learned sink, in base 2.

    top: the largest logit of the keys. The result includes the sink; it is finite, so that 2^(logit - it) is 0 for
    hidden cells also where all are hidden.
    """
    empty = top <= LOWEST
    shift = top.nan_to_num(0.0, 0.0).masked_fill_(empty, 0)
    if call.sinks is None:
        return empty, shift, None
    sink = tile_rows(call, t, call.sinks[None, :, None]) * LOG2E
    if call.temperature is not None:
        sink = sink / tile_rows(call, t, call.temperature)
    return empty, torch.maximum(shift, sink), sink


def _set_undefined(row: TileSoftmax, total: Float[Tensor, "b h g m"]) -> None:
    """Make visible cells and sums NaN in rows with a logit of NaN or infinity, and keep hidden cells 0.

    In other rows a logit of -inf has weight 0 and adds nothing to the entropy.
    """
    undefined = ~total.isfinite()
    cells = undefined[..., None] & (row.e != 0)
    row.e.masked_fill_(undefined[..., None], 0).masked_fill_(cells, torch.nan)
    if row.x is not None:
        row.x.masked_fill_(undefined[..., None], HIDDEN).masked_fill_(cells, torch.nan)
    if row.ex is not None:
        row.ex = torch.where(row.e > 0, row.e * row.e.log2(), 0).sum(-1).masked_fill_(undefined, torch.nan)
    row.inverse.masked_fill_(undefined, 1)
    for x in (row.log_total, row.mass, row.top):
        x.masked_fill_(undefined, torch.nan)


def first_maximum(s: Float[Tensor, "*lead n"]) -> tuple[Float[Tensor, "*lead"], Int[Tensor, "*lead"]]:
    """Return the largest logit and its first place.

    In long rows: the best of many blocks, then the place within it.

    A maximum without its place is ten times faster than one with its place.
    """
    n = s.shape[-1]
    if n < 64:
        top, place = s.max(-1)
        return top, place
    width = 32 if n < 1024 else 64 if n < 4096 else 128
    count = n // width
    blocks = s[..., : count * width].unflatten(-1, (count, width))
    top, block = blocks.amax(-1).max(-1)
    if blocks.is_contiguous():  # copying whole blocks is much faster than gathering cells
        offsets = torch.arange(0, block.numel() * count, count, device=s.device)
        best_block = blocks.view(-1, width).index_select(0, block.flatten() + offsets).view(*block.shape, width)
    else:
        best_block = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, width))[..., 0, :]
    place = block * width + best_block.max(-1).indices
    if count * width < n:
        tail, tail_place = s[..., count * width :].max(-1)
        place = torch.where(tail > top, tail_place + count * width, place)  # on a tie the earlier one stays
        top = torch.maximum(top, tail)
    return top, place


def to_pattern(call: Call, t: Tile, row: TileSoftmax) -> Pattern:
    """Return the tile as the Pattern on which statistics are defined."""
    # set if a statistic has no fast form
    assert row.x is not None and row.v is not None and row.z is not None
    i, j = (t.i.start, t.i.stop), (t.j.start, t.j.stop)
    visible = group_heads(call, call.visible(t.i, t.j, t.b, query_heads(call, t)))
    visible = visible & (row.is_visible | row.x.isnan())
    real = visible.new_ones(1, 1) if call.query_padding is None else call.query_padding[t.b, t.i]
    targets, features, segment = call.targets, call.key_features, call.k_segments
    return Pattern(
        p=row.e * row.inverse[..., None],
        scores=(row.x + row.shift[..., None]) / LOG2E,
        log_p=((row.x - row.log_total[..., None]) / LOG2E).masked_fill(~visible, 0),
        visible=visible,
        distance=call.distances(*i, *j).to(row.e.dtype),
        key_rank=slice_axis(call.key_rank(), t.b)[:, None, None, None, t.j],
        real_query=real[:, None, None, :, None],
        v=row.v.of(t)[:, :, None],
        z=row.z * row.inverse[..., None],
        first_key=t.j.start,
        key_segment=None if segment is None else slice_axis(segment, t.b)[:, None, None, t.j],
        n_segments=call.n_segments,
        targets=None if targets is None else slice_axis(targets, t.b)[:, None, None, t.i],
        features=None if features is None else slice_axis(features, t.b)[:, None, None, t.j].to(row.e.dtype),
    )
