"""Edits that the Triton kernels do not know, put in terms of what they do: before any kernel of a call runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from headstats.call import HIDDEN, Call
from headstats.spec import StatSpec
from headstats.weights import ZERO

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped
    from torch import Tensor

    Attend = Callable[[Call], tuple[Tensor, Tensor]]

LOG2E = 1.4426950408889634


@dataclass(eq=False, kw_only=True)
class Lowered(Call):
    """A call whose gain after the softmax is given by its logarithm, which reaches further than a gain could."""

    log2_gain: Float[Tensor, "#B #H R C"] | None = None  # at or below HIDDEN: the cell is hidden; at ZERO: has weight 0
    laid_out: Float[Tensor, "#B #H R C"] | None = None  # as `arguments.Cells` has it; -HIDDEN: the weight stays
    own_only: bool = False


def lowered(call: Call, attend: Attend) -> Call:
    """The call without pattern_from, counterfactual, take and give. attend: a pass over the keys, for out and lse."""
    call = with_pattern(call)
    if call.counterfactual is not None:
        return laid_out(call, attend)
    return call if call.take is None else redistributed(call, attend)


def with_pattern(call: Call) -> Call:
    """Edit.pattern_from as more channels: [q, 0] and [0, q2] against [k, k2] give q.k and q2.k2, row by row.

    Queries and keys that are swapped for all need no more than that. A NaN or an infinity in k2 reaches all rows.
    """
    if call.pattern_q is None or call.pattern_k is None:
        return call
    done = replace(call, pattern_q=None, pattern_k=None, pattern_rows=None)
    if call.pattern_rows is None:
        return replace(done, q=call.pattern_q, k=call.pattern_k)
    other = call.pattern_rows[..., None]
    q = torch.cat([call.q.masked_fill(other, 0), call.pattern_q.masked_fill(~other, 0)], -1)
    shared = None if call.prefix_k is None else torch.cat([call.prefix_k] * 2, -1)
    return replace(done, q=q, k=torch.cat([call.k, call.pattern_k], -1), prefix_k=shared)


def by_query(call: Call) -> Call:
    """The same call with a row for each query in every table, which may then differ between queries.

    Tables take O(B H M S) memory.
    """
    ids = torch.arange(call.q.shape[2], device=call.q.device)[None]
    tables = {}
    for f in fields(Call):
        t = getattr(call, f.name)
        if t is not None and "Sq+1" in str(f.type):
            masks = f.name in ("segment_mask", "segment_open")
            tables[f.name] = _rows_of(t, call.q_segments if masks else call.edit_q_segments)
    return replace(call, q_segments=ids, edit_q_segments=ids, **tables)


def _rows_of(table: Shaped[Tensor, "#B #H R C"], ids: Int[Tensor, "#B M"] | None) -> Shaped[Tensor, "#B #H M C"]:
    assert ids is not None  # validated: a table needs them
    b, (_, h, rows, columns) = max(len(table), len(ids)), table.shape
    index = ids.remainder(rows)[:, None, :, None].expand(b, h, -1, columns)
    return table.expand(b, -1, -1, -1).gather(2, index)


def laid_out(call: Call, attend: Attend) -> Lowered:
    """Edit.counterfactual "uniform" or "identity" as what logits become, given the row's log-sum-exp L: L, or L less
    the logarithm of a number of keys. L is without a learned sink where the row keeps its sum, else with it."""
    call = by_query(call)
    if call.k_segments is None:
        call = replace(call, k_segments=torch.zeros(1, call.n, dtype=torch.int64, device=call.q.device))
    given = [x.shape[3] for f in fields(Call) if "Sq+1" in str(f.type) and (x := getattr(call, f.name)) is not None]
    columns, keeps = min(given, default=1), call.counterfactual_renormalise
    neutral = call.q.new_zeros(1, 1, call.q.shape[2], columns, dtype=torch.float32)
    bare = replace(
        call, v=torch.ones_like(call.v[..., :1], dtype=torch.float32), counterfactual=None, counterfactual_rows=None,
        prefix_v=None if call.prefix_v is None else torch.ones_like(call.prefix_v[..., :1], dtype=torch.float32),
        gain=None, sinks=None if keeps else call.sinks, gate=None, replacement=None, spec=StatSpec.none(),
    )  # fmt: skip
    lse = attend(bare)[1]
    level = (lse.masked_fill(lse == -torch.inf, 0) * LOG2E)[..., None]
    if call.counterfactual == "uniform":
        count = torch.full_like(level, call.n)
        if keeps:  # as many ones, all of the weight 1 / exp(lse - L) = 1, as there are visible keys
            even = _with(bare, log2_gain=neutral, laid_out=level.expand(-1, -1, -1, columns))
            count = attend(even)[0].round().clamp_min(1)
        level = level - count.log2()
    if call.counterfactual_rows is not None:
        level = torch.where(call.counterfactual_rows[..., None], level, -HIDDEN)
    log2_gain = neutral if call.gain is None else call.gain.float().log2().clamp_min(HIDDEN)
    done = replace(call, counterfactual=None, counterfactual_rows=None, gain=None)
    level = level.expand(-1, -1, -1, columns)
    return _with(done, log2_gain=log2_gain, laid_out=level, own_only=call.counterfactual == "identity")


def _with(call: Call, **more: Any) -> Lowered:
    return Lowered(**{f.name: getattr(call, f.name) for f in fields(Call)}, **more)


def redistributed(call: Call, attend: Attend) -> Lowered:
    """Edit.take and give as a gain of each query's own: with the weights T on cells of take and G on those of give,
    cells of take keep k of their weight, and those of give grow by the factor 1 + (1 - k) T / G.

    T and G come from a pass each, as log-sum-exp over these cells alone, so that neither overflows nor underflows.
    """
    call = by_query(call)
    take, give, keep = call.take, call.give, call.keep_fraction
    assert take is not None and give is not None and keep is not None  # validated: all or none
    keep = keep.float()
    given, taken = (attend(_only(call, cells))[1][..., None] for cells in (give, take))
    ratio = (1 - keep).log()[..., None] + taken - given
    grown = torch.logaddexp(ratio, torch.zeros_like(ratio)) * LOG2E
    kept = keep.log2().clamp_min(ZERO)[..., None]
    log2_gain = torch.where(give, grown, torch.where(take, kept, 0))
    log2_gain = torch.where(given > -torch.inf, log2_gain, 0)  # else nothing is there to give to
    if call.gain is not None:
        log2_gain = log2_gain + call.gain.float().log2().clamp_min(HIDDEN)
    done = replace(call, take=None, give=None, keep_fraction=None, gain=None)
    return _with(done, log2_gain=log2_gain)


def _only(call: Call, cells: Shaped[Tensor, "#B #H M C"]) -> Call:
    """Attention to some cells alone, with gains before the softmax, for its log-sum-exp: no sink, hardly any values."""
    hidden, bias = ~cells, call.edit_bias
    if call.knockout is not None:
        hidden = hidden | call.knockout
    if call.gain is not None:
        hidden = hidden | (call.gain == 0)
        log_gain = torch.where(call.gain == 0, 1, call.gain).float().log()
        bias = log_gain if bias is None else bias + log_gain
    first = None if call.prefix_v is None else call.prefix_v[..., :1]
    return replace(
        call, v=call.v[..., :1], prefix_v=first, knockout=hidden, edit_bias=bias, gain=None, take=None, give=None,
        keep_fraction=None, sinks=None, gate=None, replacement=None, spec=StatSpec.none(),
    )  # fmt: skip
