"""Numbers of keys that are averaged under p in place of values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headstats.call import Call
from headstats.stats import ARGUMENT, segment_members

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    # For each key head, numbers of the rows' own keys and of the prefix: [#B, #Hk, N-P, F] and [#G, #Hk, P, F].
    PerKey = tuple[Float[Tensor, "#B #Hk n F"], Float[Tensor, "#G #Hk P F"] | None]


def separate_prefixes(call: Call) -> Call:
    """Give each batch row its own prefix where rows of a run differ.

    Rows differ if numbers of a shared prefix's keys differ between them.

    One prefix for all rows is not repeated in memory, but each row reads it separately.
    """
    k, v, rows = call.prefix_k, call.prefix_v, call.q.shape[0]
    if k is None or v is None or k.shape[0] == rows or not _differs(call):
        return call
    if k.shape[0] == 1:
        return replace(call, prefix_k=k.expand(rows, -1, -1, -1), prefix_v=v.expand(rows, -1, -1, -1))
    run = rows // k.shape[0]
    return replace(call, prefix_k=k.repeat_interleave(run, 0), prefix_v=v.repeat_interleave(run, 0))


def _differs(call: Call) -> bool:
    """Whether numbers of keys differ between batch rows."""
    arrays = {getattr(call, argument) for name, argument in ARGUMENT.items()
              if name != "targets" and getattr(call.spec, name)}  # fmt: skip
    return any(x.shape[0] > 1 for x in arrays)


def features(call: Call) -> Float[Tensor, "#B N F"] | None:
    """Return segment membership as zeros and ones, followed by key_features.

    Each is present only if the statistic is requested.
    """
    columns = []
    if call.spec.segments:
        columns.append(_members(call))
    if call.spec.key_features:
        assert call.key_features is not None  # validated
        columns.append(call.key_features.float())
    rows = max((x.shape[0] for x in columns), default=0)
    return torch.cat([x.expand(rows, -1, -1) for x in columns], -1) if columns else None


def of_heads(call: Call, x: Float[Tensor, "#B N F"]) -> PerKey:
    """Return the same numbers for every head, split into the two regions."""
    p = call.n - call.k.shape[2]
    return x[:, None, p:], x[:, None, :p] if p else None


def segment_value_norms(call: Call) -> PerKey:
    """Return the norm of each key's value in the column of its segment."""
    own, shared = of_heads(call, _members(call))
    own = own * call.v.float().norm(dim=-1, keepdim=True)
    if shared is None or call.prefix_v is None:
        return own, None
    return own, shared * call.prefix_v.float().norm(dim=-1, keepdim=True)


def values_of_segment(call: Call, segment: int) -> PerKey:
    """Return the values, with zeros outside a segment."""
    own, shared = of_heads(call, _members(call)[..., segment, None])
    return own * call.v, None if shared is None or call.prefix_v is None else shared * call.prefix_v


def _members(call: Call) -> Float[Tensor, "#B N S"]:
    assert call.k_segments is not None  # validated
    return segment_members(call.k_segments, call.n_segments, torch.float32)
