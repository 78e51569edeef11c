"""Reference backend: it builds the whole pattern and computes everything from it.

This file is the specification.

It is slow, needs O(M N) memory, works in any dtype (float64 stays float64), and everything in it is differentiable,
including the statistics.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.call import HIDDEN, LN2, LOG2E, LOWEST, Call, hidden_by_bias
from headstats.edits import weights
from headstats.stats import BY_NAME, Pattern, Result, TopK, Value, broadcast_rows, map_tensors

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def unsupported(call: Call) -> str | None:
    """Return None: the reference does every call."""
    return None


def run(call: Call) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Return out [B,H,M,Dv], norm [2,B,H,M] (see `call.lse_of`) and the requested statistics by name."""
    pattern, norm = build_pattern(call)
    out = call.apply_gate(pattern.z)
    stats = {name: _statistic(call, pattern, name, value) for name, value in call.spec.requested().items()}
    return out.to(call.q.dtype), norm, stats


def build_pattern(call: Call) -> tuple[Pattern, Float[Tensor, "2 B H M"]]:
    """Return the edited softmax over [keys, learned sink], and its norm.

    Hidden cells are exactly 0. The norm is that before edits of weights.
    """
    i, j = slice(0, call.q.shape[2]), slice(0, call.n)
    visible, scores = call.visible(i, j, cut=False), logits(call)
    visible = visible & ~(scores <= LOWEST * LN2)  # so that NaN stays visible
    scores = scores.masked_fill(~visible, HIDDEN)
    seen = visible.any(-1)
    columns = scores
    if call.sinks is not None:
        sink = call.sinks.to(call.dtype)[None, :, None]
        if call.temperature is not None:
            sink = sink / call.temperature.to(call.dtype)
        columns = torch.cat([scores, sink.expand(scores.shape[:3])[..., None]], -1)
    # The largest logit is subtracted first: log(n) would be lost in a log-sum-exp of large logits.
    largest = torch.where(seen, columns.detach().amax(-1), 0.0)
    log_sum = torch.where(seen, (columns - largest[..., None]).exp().sum(-1), 1.0).log()
    log_p = torch.where(visible, scores - largest[..., None] - log_sum[..., None], 0.0)
    p = torch.where(visible, log_p.exp(), 0.0)
    if (change := weights.edit_of_cells(call, i, j)) is not None:
        before = log_p.masked_fill(~visible, HIDDEN)
        p, scores = weights.apply_edit(change, before, torch.ones_like(log_sum), weights.NATURAL)
        visible = visible & call.visible(i, j)
        scores = scores.masked_fill(~visible, HIDDEN)
        log_p = torch.where(visible, scores, 0.0)
    v = expand_keys(call, call.v, call.prefix_v)
    real_query = call.query_padding if call.query_padding is not None else visible.new_ones(1, i.stop)
    pattern = Pattern(
        p=p,
        scores=scores,
        log_p=log_p,
        visible=visible,
        distance=call.distances(0, i.stop, 0, j.stop).to(call.dtype),
        key_rank=call.key_rank()[:, None, None],
        real_query=real_query[:, None, :, None],
        v=v,
        z=p @ v,
        first_key=0,
        key_segment=None if call.k_segments is None else call.k_segments[:, None],
        n_segments=call.n_segments,
        targets=None if call.targets is None else call.targets[:, None],
        features=None if call.key_features is None else call.key_features[:, None].to(call.dtype),
    )
    return pattern, torch.stack([largest, torch.where(seen, log_sum, -torch.inf)]) * LOG2E


def logits(call: Call) -> Float[Tensor, "B H M N"]:
    """Return the logits before any mask.

    They are (edited(softcap(scale q.k)) - alibi |distance| + bias) / temperature + log gain.
    """
    i, j = slice(0, call.q.shape[2]), slice(0, call.n)
    scores = _products(call, call.q, call.k)
    if call.pattern_q is not None and call.pattern_k is not None:
        acts = scores.new_ones((), dtype=torch.bool) if call.pattern_rows is None else call.pattern_rows[..., None]
        scores = torch.where(acts, _products(call, call.pattern_q, call.pattern_k), scores)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.logit_factor is not None:
        scores = scores * call.edit_cells(call.logit_factor, i, j).to(call.dtype)
    if call.logit_raise is not None:
        scores = scores + call.edit_cells(call.logit_raise, i, j).to(call.dtype) * scores.abs()
    if call.alibi is not None:
        scores = scores - call.alibi.to(call.dtype)[:, None, None] * call.distances(0, i.stop, 0, j.stop).abs()
    if call.bias is not None:
        bias = call.bias.to(call.dtype)  # the mask hides these cells; an infinity would make gradients nan
        scores = scores + bias.masked_fill(hidden_by_bias(bias), 0)
    if call.temperature is not None:
        scores = scores / call.temperature[..., None].to(call.dtype)
    if call.edit_bias is not None:
        scores = scores + call.edit_cells(call.edit_bias, i, j).to(call.dtype)
    return scores


def _products(call: Call, q: Tensor, k: Tensor) -> Float[Tensor, "B H M N"]:
    return q.to(call.dtype) @ expand_keys(call, k, call.prefix_k).transpose(-1, -2) * call.scale


def expand_keys(call: Call, own: Tensor, prefix: Tensor | None) -> Float[Tensor, "B H N D"]:
    """Return the keys or values of every query head and batch row, prefix first."""
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
        if stat.reduce == "mean":
            result = result / count.clamp_min(1)
        return torch.where(count > 0, result.sqrt() if stat.reduce == "norm" else result, stat.empty)
    seen = pattern.visible.any(-1)
    return map_tensors(result, lambda x: torch.where(broadcast_rows(seen, x), x, stat.empty))
