"""PyTorch backend that never holds an M x N pattern: tile by tile, on any device, with a recomputing backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats import cpu_flash, recompute, rows
from headstats.call import Call
from headstats.stats import BY_NAME
from headstats.tiles import Tile, flat, heads_apart, logits, tiles

if TYPE_CHECKING:
    from torch import Tensor

    Result = tuple[Tensor, Tensor, dict[str, Tensor]]


def unsupported(call: Call) -> str | None:
    """Why this backend cannot do the call, or None."""
    for name in ("bias", "sinks"):
        if name in call.trainable:
            return f"it gives no gradient for {name}, which requires one (use {name}.detach() or backend='reference')"
    return None


def run(call: Call) -> Result:
    """Returns out [B,H,M,Dv], lse [B,H,M] and the requested statistics by name."""
    return recompute.with_gradients(call, forward) if call.trainable else forward(call)


def forward(call: Call) -> Result:
    """The same without gradients."""
    return cpu_flash.forward(call) if cpu_flash.suits(call) else by_tiles(call)


def by_tiles(call: Call) -> Result:
    """The general path."""
    b, h, m, _ = call.q.shape
    hk, n, g = call.k.shape[1], call.k.shape[2], call.groups
    # Keys and values are made ready once, since many tiles read them.
    k, v = call.k.to(call.dtype).contiguous(), call.v.to(call.dtype).contiguous()
    gate = None if call.gate is None else heads_apart(call, call.gate.to(call.dtype).expand(b, h, -1))
    work = list(tiles(call))
    if len(work) == 1 and work[0].j == slice(0, n):
        out, lse, stats = _one_tile(call, work[0], k, v, gate)
    else:
        out, lse = k.new_empty(b, hk, g, m, v.shape[3], dtype=call.q.dtype), k.new_empty(b, hk, g, m)
        stats = {name: _space(call, k, name) for name in call.spec.requested()}
        for t in work:
            rows_of = (t.b, t.h, slice(None), t.i)
            out[rows_of], lse[rows_of], found = _one_tile(call, t, k, v, gate)
            for name, x in found.items():
                if BY_NAME[name].axis == "query":
                    stats[name][rows_of] = x
                else:
                    stats[name][t.b, t.h, :, t.j] += x
    for name in stats:
        if BY_NAME[name].axis == "key":
            stats[name] = rows.mean_over_queries(call, stats[name], BY_NAME[name].empty)
    out = out.to(call.q.dtype).flatten(1, 2)
    return out, lse.flatten(1, 2), {name: x.flatten(1, 2) for name, x in stats.items()}


def _space(call: Call, like: Tensor, name: str) -> Tensor:
    shape = (*call.k.shape[:2], call.groups)
    if BY_NAME[name].axis == "key":
        return like.new_zeros(*shape, call.k.shape[2])  # summed over tiles
    return like.new_empty(*shape, call.q.shape[2], dtype=torch.int64 if name == "argmax" else None)


def _one_tile(call: Call, t: Tile, k: Tensor, v: Tensor, gate: Tensor | None) -> Result:
    """Gated out, lse and statistics of one tile, [b, h, g, m, ...]; key statistics as sums over its queries."""
    q = flat(heads_apart(call, call.q)[t.b, t.h, :, t.i].to(k.dtype).flatten(2, 3))
    s, _ = logits(call, t, q, flat(k[t.b, t.h, t.j]))
    row = rows.softmax(call, t, s)
    out = torch.bmm(flat(row.e.flatten(2, 3)), flat(v[t.b, t.h, t.j])).view(*s.shape[:-1], -1)
    scale = row.inverse
    if gate is not None:
        scale = scale * gate[t.b, t.h, :, t.i if gate.shape[3] > 1 else slice(1)]
    stats = {name: rows.statistic(call, t, row, name, x) for name, x in call.spec.requested().items()}
    return out.mul_(scale[..., None]), row.lse, stats
