"""Eager oracle: materialises the pattern and reads every number off it. This file is the specification.

It is slow, needs O(M N) memory, works in any dtype (float64 stays float64) and is differentiable throughout,
statistics included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.call import HIDDEN, Call
from headstats.stats import BY_NAME, Pattern, Result, TopK, Value, mapped

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def unsupported(call: Call) -> str | None:
    """The reference does everything."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Returns out [B,H,M,Dv], lse [B,H,M] and the requested statistics by name."""
    pattern, lse = build_pattern(call)
    out = call.gated(pattern.z)
    stats = {name: _statistic(call, pattern, name, value) for name, value in call.spec.requested().items()}
    return out.to(call.q.dtype), lse, stats


def build_pattern(call: Call) -> tuple[Pattern, Float[Tensor, "B H M"]]:
    """softmax over [keys, learned sink] of the logits, with hidden cells exactly 0; and its log-sum-exp."""
    i, j = slice(0, call.q.shape[2]), slice(0, call.n)
    visible = call.visible(i, j, cut=call.renormalise)
    scores = logits(call).masked_fill(~visible, HIDDEN)
    columns = scores
    if call.sinks is not None:
        sink = call.sinks.to(call.dtype)[None, :, None]
        if call.temperature is not None:
            sink = sink / call.temperature.to(call.dtype)
        columns = torch.cat([scores, sink.expand(scores.shape[:3])[..., None]], -1)
    seen = visible.any(-1)
    log_norm = torch.where(seen, torch.logsumexp(columns, -1), 0.0)
    lse = torch.where(seen, log_norm, -torch.inf)
    if call.knockout is not None and not call.renormalise:  # the row's norm stays, the cells go
        visible = visible & ~call.cells(call.knockout, i, j)
        scores = scores.masked_fill(~visible, HIDDEN)
    p = torch.where(visible, torch.exp(scores - log_norm[..., None]), 0.0)
    real_query = call.query_padding if call.query_padding is not None else visible.new_ones(1, i.stop)
    pattern = Pattern(
        p=p,
        scores=scores,
        log_norm=log_norm,
        visible=visible,
        distance=call.distances(0, i.stop, 0, j.stop).to(call.dtype),
        key_rank=call.key_rank()[:, None, None],
        real_query=real_query[:, None, :, None],
        z=p @ expanded(call, call.v, call.prefix_v),
        first_key=0,
        key_segment=None if call.k_segments is None else call.k_segments[:, None],
        n_segments=call.n_segments,
        targets=None if call.targets is None else call.targets[:, None],
        features=None if call.key_features is None else call.key_features[:, None].to(call.dtype),
    )
    return pattern, lse


def logits(call: Call) -> Float[Tensor, "B H M N"]:
    """(softcap(scale q.k) - alibi |distance| + bias) / temperature + Edit.bias, before any mask."""
    k = expanded(call, call.k, call.prefix_k)
    scores = call.q.to(call.dtype) @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.alibi is not None:
        away = call.distances(0, scores.shape[2], 0, scores.shape[3]).abs()
        scores = scores - call.alibi.to(call.dtype)[:, None, None] * away
    if call.bias is not None:
        scores = scores + call.bias.to(call.dtype)
    if call.temperature is not None:
        scores = scores / call.temperature[..., None].to(call.dtype)
    if call.edit_bias is not None:
        gain = call.cells(call.edit_bias, slice(0, scores.shape[2]), slice(0, scores.shape[3]))
        scores = scores + gain.to(call.dtype)
    return scores


def expanded(call: Call, own: Tensor, prefix: Tensor | None) -> Float[Tensor, "B H N D"]:
    """Keys or values of every query head and batch row, those of the prefix first."""
    if prefix is not None:
        own = torch.cat([prefix.repeat_interleave(own.shape[0] // prefix.shape[0], 0), own], 2)
    return own.to(call.dtype).repeat_interleave(call.groups, 1)


def _statistic(call: Call, pattern: Pattern, name: str, value: Value) -> Result:
    stat = BY_NAME[name]
    result = stat.dense(pattern, value)
    if isinstance(result, TopK):
        return result
    if stat.axis == "key":
        seen = pattern.visible & pattern.real_query
        count = stat.among(seen, pattern.distance, value).sum(-2)
        return torch.where(count > 0, result / (count.clamp_min(1) if stat.reduce == "mean" else 1), stat.empty)
    seen = pattern.visible.any(-1)
    return mapped(result, lambda x: torch.where(seen if x.dim() == 3 else seen[..., None], x, stat.empty))
