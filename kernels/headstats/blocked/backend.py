"""PyTorch backend that never holds an M x N pattern: tile by tile, on any device, with a recomputing backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.blocked import (
    matmul as products,
)
from headstats.blocked import (
    rows,
)
from headstats.blocked import (
    sdpa as cpu_flash,
)
from headstats.blocked import (
    statistics as fast,
)
from headstats.blocked import (
    threads as workers,
)
from headstats.blocked.tiles import (
    Keys,
    Scratch,
    Tile,
    cells,
    keys_and_values,
    logits,
    mixed,
    of_rows,
    pattern_keys,
    queries,
    tiles,
)
from headstats.call import Call
from headstats.stats import BY_NAME, Result, Value, mapped, tensors

if TYPE_CHECKING:
    from torch import Tensor

    Attended = tuple[Tensor, Tensor, dict[str, Result]]


def unsupported(call: Call) -> str | None:
    """Nothing is beyond this backend."""
    return None


def forward(call: Call) -> Attended:
    """Return out [B,H,M,Dv], lse [B,H,M] and the requested statistics by name."""
    return cpu_flash.forward(call) if cpu_flash.suits(call) else by_tiles(call)


def by_tiles(call: Call) -> Attended:
    """The general path."""
    b, _, m, _ = call.q.shape
    hk, n, g = call.k.shape[1], call.n, call.groups
    k, v = keys_and_values(call)
    other = pattern_keys(call)
    work = list(tiles(call))
    if len(work) == 1 and work[0].j == slice(0, n):
        out, lse, stats = _one_tile(call, work[0], k, v, other, (None, None))
    else:
        out = call.q.new_empty(b, hk, g, m, v.own.shape[3])
        lse = k.own.new_empty(b, hk, g, m)
        stats: dict[str, Result] = {}

        def put(t: Tile, attended: Attended) -> None:
            rows_of = (t.b, t.h, slice(None), t.i)
            out[rows_of], lse[rows_of], found = attended
            for name, x in found.items():
                if name not in stats:
                    stats[name] = _space(call, x, name)
                _put(name, stats[name], x, t)

        products.onednn_pays()  # tried here, where no other thread disturbs the trial
        work.reverse()  # under causality the last tiles are the longest: no thread is left alone with one
        workers.each(
            work,
            lambda: (Scratch(call, work), Scratch(call, work)),
            lambda room, t: _one_tile(call, t, k, v, other, room),
            put,
            workers.worth(cells(call)) if call.q.device.type == "cpu" else None,
        )
    for name, value in call.spec.requested().items():
        if BY_NAME[name].axis == "key":
            stats[name] = _columns(call, name, stats[name], value)
    out = out.to(call.q.dtype).flatten(1, 2)
    return out, lse.flatten(1, 2), {name: mapped(x, lambda y: y.flatten(1, 2)) for name, x in stats.items()}


def _space(call: Call, first: Result, name: str) -> Result:
    """Room for a statistic of the whole call, given its first tile."""
    shape = (call.q.shape[0], call.k.shape[1], call.groups)
    if BY_NAME[name].axis == "key":
        return mapped(first, lambda x: x.new_zeros(*shape, call.n))  # joined over tiles
    return mapped(first, lambda x: x.new_empty(*shape, call.q.shape[2], *x.shape[4:]))


def _put(name: str, whole: Result, found: Result, t: Tile) -> None:
    for to, x in zip(tensors(whole), tensors(found), strict=True):
        if BY_NAME[name].axis == "query":
            to[t.b, t.h, :, t.i] = x
        elif BY_NAME[name].reduce == "max":
            to[t.b, t.h, :, t.j] = torch.maximum(to[t.b, t.h, :, t.j], x)
        else:
            to[t.b, t.h, :, t.j] += x


def _columns(call: Call, name: str, joined: Result, value: Value) -> Result:
    if BY_NAME[name].reduce == "max":
        return joined  # of weights that are never negative: 0 where no query sees the key
    if BY_NAME[name].reduce == "norm":
        return mapped(joined, torch.sqrt)
    return mapped(joined, lambda x: fast.mean_over_queries(call, x, name, value))


def _one_tile(
    call: Call, t: Tile, k: Keys, v: Keys, other: Keys | None, room: tuple[Scratch | None, Scratch | None]
) -> Attended:
    """Gated out, lse and statistics of one tile, [b, h, g, m, ...]; key statistics as sums over its queries.

    other: keys of Edit.pattern_from.  room: for logits, and for weights.
    """
    s, _ = logits(call, t, queries(call, t, call.q), k, other, room[0])
    row = rows.softmax(call, t, s, fast.keeps_logits(call), room[1])
    out = row.z = mixed(row.e, v, t)
    row.v = v
    gate = None if call.gate is None else of_rows(call, t, call.gate)
    scale = row.inverse if gate is None else row.inverse * gate
    stats = {name: fast.statistic(call, t, row, name, x) for name, x in call.spec.requested().items()}
    out.mul_(scale[..., None])
    if gate is not None and call.replacement is not None:
        out += (1 - gate)[..., None] * of_rows(call, t, call.replacement)
    return out, row.lse, stats
