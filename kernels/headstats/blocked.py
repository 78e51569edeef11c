"""PyTorch backend that never holds an M x N pattern: tile by tile, on any device, with a recomputing backward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats import cpu_flash, recompute, rows
from headstats.call import Call
from headstats.stats import BY_NAME
from headstats.tiles import flat, heads_apart, logits, tiles

if TYPE_CHECKING:
    from torch import Tensor


def unsupported(call: Call) -> str | None:
    """Why this backend cannot do the call, or None."""
    for name in ("bias", "sinks"):
        if name in call.trainable:
            return f"it gives no gradient for {name}, which requires one (use {name}.detach() or backend='reference')"
    return None


def run(call: Call) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns out [B,H,M,Dv], lse [B,H,M] and the requested statistics by name."""
    return recompute.with_gradients(call, forward) if call.trainable else forward(call)


def forward(call: Call) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The same without gradients."""
    return cpu_flash.forward(call) if cpu_flash.suits(call) else by_tiles(call)


def by_tiles(call: Call) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The general path."""
    b, h, m, _ = call.q.shape
    hk, n, g = call.k.shape[1], call.k.shape[2], call.groups
    q = heads_apart(call, call.q)
    k, v = call.k.to(call.dtype).contiguous(), call.v.to(call.dtype).contiguous()
    gate = None if call.gate is None else heads_apart(call, call.gate.to(call.dtype).expand(b, h, -1))
    out = call.q.new_empty(b, hk, g, m, v.shape[3])
    lse = k.new_empty(b, hk, g, m)
    asked = call.spec.requested()
    stats = {}
    for name in asked:
        axis, dtype = BY_NAME[name].axis, torch.int64 if name == "argmax" else k.dtype
        stats[name] = k.new_zeros(b, hk, g, m if axis == "query" else n, dtype=dtype)
    for t in tiles(call):
        q_tile = flat(q[t.b, t.h, :, t.i].to(k.dtype).flatten(2, 3))
        s, _ = logits(call, t, q_tile, flat(k[t.b, t.h, t.j]))
        row = rows.softmax(call, t, s)
        o = torch.bmm(flat(row.e.flatten(2, 3)), flat(v[t.b, t.h, t.j])).view(*s.shape[:-1], -1)
        scale = row.inverse if gate is None else row.inverse * gate[t.b, t.h, :, t.i if gate.shape[3] > 1 else slice(1)]
        out[t.b, t.h, :, t.i] = o.mul_(scale[..., None])
        lse[t.b, t.h, :, t.i] = row.lse
        for name, value in asked.items():
            result = rows.statistic(call, t, row, name, value)
            if BY_NAME[name].axis == "query":
                stats[name][t.b, t.h, :, t.i] = result
            else:
                stats[name][t.b, t.h, :, t.j] += result
    for name in asked:
        if BY_NAME[name].axis == "key":
            stats[name] = rows.mean_over_queries(call, stats[name], BY_NAME[name].empty)
    return out.flatten(1, 2), lse.flatten(1, 2), {name: x.flatten(1, 2) for name, x in stats.items()}
