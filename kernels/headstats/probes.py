"""Weights of single cells from q, k and lse: p_ij = exp(score_ij - lse_i).

They need neither the pattern nor values.

Backends whose main pass does not hold whole rows use these for statistics of keys that are known in advance. Such
statistics then cost the main pass nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.call import Call, heads_apart, hidden_by_bias
from headstats.stats import Value

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

PROBED = ("sink", "diagonal", "previous", "targets")


def statistic(call: Call, lse: Float[Tensor, "B H M"], name: str, value: Value) -> Tensor:
    """Compute one of the statistics in PROBED."""
    weights = weights_at(call, lse, keys_of(call, name, value))
    return weights if name == "targets" else weights.sum(-1)


def keys_of(call: Call, name: str, value: Value) -> Int[Tensor, "#B #M T"]:
    """Return the keys that a statistic in PROBED reads for each query.

    -1 or a number beyond N means no key.
    """
    if name == "targets":
        assert call.targets is not None  # validated
        return call.targets
    if name == "sink":
        assert isinstance(value, int)
        return first_real_keys(call, value)[:, None]
    return call.distances(0, call.q.shape[2], 0, 1)[None] - int(name == "previous")


def first_real_keys(call: Call, count: int) -> Int[Tensor, "#B count"]:
    """Return the first real keys of each batch row, -1 where there are fewer."""
    count = min(count, call.n)
    keys = torch.arange(call.n, device=call.k.device)[None]
    if call.key_padding is None:
        return keys[:, :count]
    first = keys.masked_fill(~call.key_padding, keys.shape[1]).sort(1).values[:, :count]
    return first.masked_fill(first == keys.shape[1], -1)


def weights_at(call: Call, lse: Float[Tensor, "B H M"], keys: Int[Tensor, "#B #M T"]) -> Float[Tensor, "B H M T"]:
    """Return p_ij for the given keys of each query; keys outside 0 ...

    N-1 have weight 0.
    """
    b, h, m, _ = call.q.shape
    q = heads_apart(call, call.q.to(call.dtype))
    inside = (keys >= 0) & (keys < call.n)
    index = torch.where(inside, keys, 0).expand(b, -1, -1)
    k = call.k.to(call.dtype)
    rows = index.flatten(1)[:, None, :, None].expand(b, k.shape[1], -1, k.shape[3])
    k = k.gather(2, rows).unflatten(2, index.shape[1:])
    if index.shape[1] == 1:
        scores = torch.einsum("bhgmd,bhtd->bhgmt", q, k[:, :, 0])
    else:
        scores = torch.einsum("bhgmd,bhmtd->bhgmt", q, k)
    scores = (scores * call.scale).flatten(1, 2)
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    visible = inside[:, None] & _visible(call, index)
    if call.bias is not None:
        bias = call.bias.expand(b, h, m, call.n).gather(3, index[:, None].expand(b, h, m, -1))
        scores, visible = scores + bias.to(scores.dtype), visible & ~hidden_by_bias(bias)
    return torch.where(visible, torch.exp(scores - lse[..., None]), 0.0)


def _visible(call: Call, keys: Int[Tensor, "B ... T"]) -> Bool[Tensor, "B 1 M T"]:
    d = call.distances(0, call.q.shape[2], 0, 1)[None] - keys
    mask = torch.ones_like(d, dtype=torch.bool)
    if call.causal:
        mask &= d >= 0
    if call.window is not None:
        mask &= d.abs() < call.window
    if call.key_padding is not None:
        mask &= call.key_padding.gather(1, keys.flatten(1)).unflatten(1, keys.shape[1:])
    return mask[:, None]
