"""The blocked backend: plain PyTorch, tile by tile, on any device.

It never holds an M x N pattern.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.blocked import matmul, rows, sdpa, statistics, threads
from headstats.blocked.tiles import (
    KeyTensors,
    Scratch,
    Tile,
    cells,
    key_tensors,
    logits,
    mix_values,
    pattern_keys,
    tile_queries,
    tile_rows,
    tiles,
)
from headstats.call import Call
from headstats.stats import BY_NAME, Result, Value, map_tensors, tensors

if TYPE_CHECKING:
    from torch import Tensor

    Results = tuple[Tensor, Tensor, dict[str, Result]]


def unsupported(call: Call) -> str | None:
    """Return None: this backend does every call."""
    return None


def forward(call: Call) -> Results:
    """Return out [B,H,M,Dv], norm [2,B,H,M] (see `call.lse_of`) and the requested statistics by name."""
    results = sdpa.forward(call) if sdpa.is_faster(call) else None
    return by_tiles(call) if results is None else results


def by_tiles(call: Call) -> Results:
    """Compute any call tile by tile."""
    b, _, m, _ = call.q.shape
    hk, n, g = call.k.shape[1], call.n, call.groups
    k, v = key_tensors(call)
    other = pattern_keys(call)
    work = list(tiles(call))
    if len(work) == 1 and work[0].j == slice(0, n):
        out, norm, stats = _one_tile(call, work[0], k, v, other, (None, None))
    else:
        out = call.q.new_empty(b, hk, g, m, v.own.shape[3])
        norm = k.own.new_empty(2, b, hk, g, m)
        stats: dict[str, Result] = {}

        def put(t: Tile, results: Results) -> None:
            place = (t.b, t.h, slice(None), t.i)
            out[place], norm[slice(None), *place], tile_stats = results
            for name, x in tile_stats.items():
                if name not in stats:
                    stats[name] = _allocate(call, x, name)
                _put(name, stats[name], x, t)

        matmul.onednn_pays()  # tested here, where no other thread disturbs the timing
        work.reverse()  # if causal, the last tiles are the longest: starting with them balances the threads
        threads.run_all(
            work,
            lambda: (Scratch(call, work), Scratch(call, work)),
            lambda room, t: _one_tile(call, t, k, v, other, room),
            put,
            threads.thread_count(cells(call)) if call.q.device.type == "cpu" else None,
        )
    for name, value in call.spec.requested().items():
        if BY_NAME[name].axis == "key":
            stats[name] = _finish_columns(call, name, stats[name], value)
    out = out.to(call.q.dtype).flatten(1, 2)
    return out, norm.flatten(2, 3), {name: map_tensors(x, lambda y: y.flatten(1, 2)) for name, x in stats.items()}


def _allocate(call: Call, first: Result, name: str) -> Result:
    """Allocate a statistic of the whole call, given that of its first tile."""
    shape = (call.q.shape[0], call.k.shape[1], call.groups)
    if BY_NAME[name].axis == "key":
        return map_tensors(first, lambda x: x.new_zeros(*shape, call.n))  # summed over tiles
    return map_tensors(first, lambda x: x.new_empty(*shape, call.q.shape[2], *x.shape[4:]))


def _put(name: str, whole: Result, of_tile: Result, t: Tile) -> None:
    """Write the statistic of a tile into that of the call, or add it."""
    for to, x in zip(tensors(whole), tensors(of_tile), strict=True):
        if BY_NAME[name].axis == "query":
            to[t.b, t.h, :, t.i] = x
        elif BY_NAME[name].reduce == "max":
            to[t.b, t.h, :, t.j] = torch.maximum(to[t.b, t.h, :, t.j], x)
        else:
            to[t.b, t.h, :, t.j] += x


def _finish_columns(call: Call, name: str, total: Result, value: Value) -> Result:
    """Turn the sum or maximum over all tiles into the statistic of keys."""
    if BY_NAME[name].reduce == "max":
        return total  # weights are never negative: it is 0 where no query sees the key
    if BY_NAME[name].reduce == "norm":
        return map_tensors(total, torch.sqrt)
    return map_tensors(total, lambda x: statistics.mean_over_queries(call, x, name, value))


def _one_tile(
    call: Call,
    t: Tile,
    k: KeyTensors,
    v: KeyTensors,
    other: KeyTensors | None,
    room: tuple[Scratch | None, Scratch | None],
) -> Results:
    """Compute gated out, norm and statistics of one tile, [b, h, g, m, ...].

    Statistics of keys are sums over the tile's queries.

    other: the keys of Edit.pattern_from.  room: scratch memory for logits, and for weights.
    """
    s, _ = logits(call, t, tile_queries(call, t, call.q), k, other, room[0])
    row = rows.softmax(call, t, s, statistics.keeps_logits(call), room[1])
    out = row.z = mix_values(row.e, v, t)
    row.v = v
    gate = None if call.gate is None else tile_rows(call, t, call.gate)
    scale = row.inverse if gate is None else row.inverse * gate
    stats = {name: statistics.statistic(call, t, row, name, x) for name, x in call.spec.requested().items()}
    out.mul_(scale[..., None])
    if gate is not None and call.replacement is not None:
        out += (1 - gate)[..., None] * tile_rows(call, t, call.replacement)
    return out, row.norm, stats
