"""Eager oracle: materialises the pattern and reads every number off it. This file is the specification.

It is slow, needs O(M N) memory, works in any dtype (float64 stays float64) and is differentiable throughout,
statistics included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.call import HIDDEN, Call
from headstats.stats import BY_NAME, Pattern

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def unsupported(call: Call) -> str | None:
    """The reference does everything."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns out [B,H,M,Dv], lse [B,H,M] and the requested statistics by name."""
    pattern = build_pattern(call)
    v = call.v.to(call.dtype).repeat_interleave(call.groups, 1)
    out = pattern.p @ v
    if call.gate is not None:
        out = out * call.gate[..., None].to(call.dtype)
    seen = pattern.visible.any(-1)
    lse = torch.where(seen, pattern.log_norm, -torch.inf)
    stats = {name: _statistic(call, pattern, name, value) for name, value in call.spec.requested().items()}
    return out.to(call.q.dtype), lse, stats


def build_pattern(call: Call) -> Pattern:
    """softmax over [keys, learned sink] of softcap(scale q.k) + bias, with hidden cells exactly 0."""
    m, n = call.q.shape[2], call.k.shape[2]
    visible = call.visible(0, m, 0, n)
    scores = logits(call).masked_fill(~visible, HIDDEN)
    columns = scores
    if call.sinks is not None:
        sink = call.sinks.to(call.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        columns = torch.cat([scores, sink], -1)
    seen = visible.any(-1)
    log_norm = torch.where(seen, torch.logsumexp(columns, -1), 0.0)
    p = torch.where(visible, torch.exp(scores - log_norm[..., None]), 0.0)
    real_query = call.query_padding if call.query_padding is not None else visible.new_ones(1, m)
    return Pattern(
        p=p,
        scores=scores,
        log_norm=log_norm,
        visible=visible,
        distance=call.distances(0, m, 0, n).to(call.dtype),
        key_rank=call.key_rank()[:, None, None],
        real_query=real_query[:, None, :, None],
    )


def logits(call: Call) -> Float[Tensor, "B H M N"]:
    """softcap(scale q.k) + bias, before any mask."""
    k = call.k.to(call.dtype).repeat_interleave(call.groups, 1)
    scores = call.q.to(call.dtype) @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return scores if call.bias is None else scores + call.bias.to(call.dtype)


def _statistic(call: Call, pattern: Pattern, name: str, value: int | bool) -> Tensor:
    stat = BY_NAME[name]
    result = stat.dense(pattern, value)
    if stat.axis == "key":
        count = (pattern.visible & pattern.real_query).sum(-2)
        return torch.where(count > 0, result / count.clamp_min(1), stat.empty)
    return torch.where(pattern.visible.any(-1), result, stat.empty)
