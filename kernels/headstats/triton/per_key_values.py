"""What keys carry beside their values, to be averaged under p in the place of values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from headstats.call import Call
from headstats.stats import ARGUMENT, members

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    # For each key head, the rows' own keys and those of the prefix: [#B, #Hk, N-P, F] and [#G, #Hk, P, F].
    Carried = tuple[Float[Tensor, "#B #Hk n F"], Float[Tensor, "#G #Hk P F"] | None]


def apart(call: Call) -> Call:
    """The call with a prefix for each batch row, where what keys of a shared prefix carry differs between the rows.

    One prefix for all is not repeated in memory, but each row reads it for itself.
    """
    k, v, rows = call.prefix_k, call.prefix_v, call.q.shape[0]
    if k is None or v is None or k.shape[0] == rows or not _differs(call):
        return call
    if k.shape[0] == 1:
        return replace(call, prefix_k=k.expand(rows, -1, -1, -1), prefix_v=v.expand(rows, -1, -1, -1))
    run = rows // k.shape[0]
    return replace(call, prefix_k=k.repeat_interleave(run, 0), prefix_v=v.repeat_interleave(run, 0))


def _differs(call: Call) -> bool:
    given = {getattr(call, argument) for name, argument in ARGUMENT.items()
             if name != "targets" and getattr(call.spec, name)}  # fmt: skip
    return any(x.shape[0] > 1 for x in given)


def features(call: Call) -> Float[Tensor, "#B N F"] | None:
    """Which segment a key is in, as zeros and ones, if segments are asked for; then key_features."""
    found = []
    if call.spec.segments:
        found.append(_members(call))
    if call.spec.key_features:
        assert call.key_features is not None  # validated
        found.append(call.key_features.float())
    rows = max((x.shape[0] for x in found), default=0)
    return torch.cat([x.expand(rows, -1, -1) for x in found], -1) if found else None


def of_heads(call: Call, x: Float[Tensor, "#B N F"]) -> Carried:
    """The same for every head, in two regions."""
    p = call.n - call.k.shape[2]
    return x[:, None, p:], x[:, None, :p] if p else None


def segment_value_norms(call: Call) -> Carried:
    """The norm of a key's value in the column of its segment."""
    own, shared = of_heads(call, _members(call))
    own = own * call.v.float().norm(dim=-1, keepdim=True)
    if shared is None or call.prefix_v is None:
        return own, None
    return own, shared * call.prefix_v.float().norm(dim=-1, keepdim=True)


def values_of_segment(call: Call, segment: int) -> Carried:
    """Values, zero outside a segment."""
    own, shared = of_heads(call, _members(call)[..., segment, None])
    return own * call.v, None if shared is None or call.prefix_v is None else shared * call.prefix_v


def _members(call: Call) -> Float[Tensor, "#B N S"]:
    assert call.k_segments is not None  # validated
    return members(call.k_segments, call.n_segments, torch.float32)
