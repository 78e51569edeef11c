"""Lowering: rewrites a call so that backends without whole rows can do its edits.

The Triton kernels and the compiled CPU backend lack some edits. Before any pass of a call runs, these are expressed by
what the backends have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from headstats.call import EDITS, HIDDEN, LN2, Call
from headstats.edits.weights import ZERO
from headstats.spec import StatSpec

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped
    from torch import Tensor

    Attend = Callable[[Call], tuple[Tensor, Tensor, dict[str, Any]]]

LAYOUTS = ("uniform", "identity", "reversed", "random")  # counterfactuals that are a formula for single cells
TINY = 1e-37  # smaller than the largest weight of any row
ALONE = -HIDDEN  # the level of a row whose weights do not change
LOST = 1e-4  # the most of a weight that the rounding of its row's log-sum-exp may cost


class LargeLogits(NotImplementedError):
    """An edit of whole rows meets logits that are too large for its lowered form."""


@dataclass(eq=False, kw_only=True)
class LoweredCall(Call):
    """A call whose edits of whole rows are formulas for single cells.

    The gain after the softmax is stored as its logarithm, which has a wider range than the gain. The counterfactual is
    stored as a formula for single cells, which uses two numbers of the cell's row, level and top. Logarithms of weights
    are in the units of logits, in base 2: weight = 2^(x - lse log2 e). For a visible cell, x becomes level + r, with r
    = 0 (uniform), 0 at the query's own position (identity), log2 u (random) or log2(2^top - 2^x) (reversed); then the
    gain is added.
    """

    log2_gain: Float[Tensor, "#B #H R C"] | None = None  # at or below HIDDEN: hidden; at ZERO: weight 0
    layout: str | None = None  # one of LAYOUTS
    levels: Float[Tensor, "B H M"] | None = None
    tops: Float[Tensor, "B H M"] | None = None  # for "reversed": the row's largest logit; cells as large get no weight
    within: bool = False  # whether this acts before the softmax, so that lse is that of the remaining weights


def unsupported(call: Call, channels: int | None = None) -> str | None:
    """Return why a call cannot be lower, or None."""
    rows, d = call.pattern_rows, call.q.shape[3]
    if channels is not None and rows is not None and rows.shape[2] > 1 and 2 * d > channels:
        return f"with Edit.pattern_from in some rows, head sizes up to {channels // 2} fit, given D={d}"
    if call.counterfactual not in (None, *LAYOUTS):
        kind = call.counterfactual
        return f"Edit.counterfactual={kind!r} needs whole rows, which backends 'blocked' and 'reference' hold"
    return None


def lower(call: Call, attend: Attend, channels: int | None = None) -> Call:
    """Return the call without pattern_from, counterfactual, take and give.

    attend: runs a pass over the keys; returns out, norm (see `call.lse_of`) and statistics by name.
    channels: the largest number of channels that q and k may have; None = any.
    """
    call = lower_pattern(call, channels)
    if call.counterfactual is not None:
        call = lower_counterfactual(call, attend)
    return call if call.take is None else lower_redistribution(call, attend)


def lower_pattern(call: Call, channels: int | None = None) -> Call:
    """Express Edit.pattern_from by more channels.

    [q, 0] and [0, q2] against [k, k2] give q.k and q2.k2, row by row.

    If all rows are swapped, q2 and k2 simply replace q and k. A NaN or an infinity in k2 reaches all rows. Where twice
    the channels do not fit, each query head gets keys and values of its own, which requires whole heads to be swapped.
    """
    if call.pattern_q is None or call.pattern_k is None:
        return call
    plain = replace(call, pattern_q=None, pattern_k=None, pattern_rows=None)
    if call.pattern_rows is None:
        return replace(plain, q=call.pattern_q, k=call.pattern_k)
    if channels is not None and 2 * call.q.shape[3] > channels:
        return _keys_of_query_heads(call, plain, call.pattern_rows[..., None], call.pattern_q, call.pattern_k)
    swapped = call.pattern_rows[..., None]
    q = torch.cat([call.q.masked_fill(swapped, 0), call.pattern_q.masked_fill(~swapped, 0)], -1)
    shared = None if call.prefix_k is None else torch.cat([call.prefix_k] * 2, -1)
    return replace(plain, q=q, k=torch.cat([call.k, call.pattern_k], -1), prefix_k=shared)


def _keys_of_query_heads(call: Call, plain: Call, swapped: Tensor, q: Tensor, k: Tensor) -> Call:
    """Give every query head its own keys and values: those of (q, k) in swapped heads."""

    def each(x: Tensor | None) -> Any:
        return None if x is None else x.repeat_interleave(call.groups, 1)

    assert swapped.shape[2] == 1  # otherwise `unsupported` has refused the call
    return replace(
        plain, q=torch.where(swapped, q, call.q), k=torch.where(swapped, each(k), each(call.k)), v=each(call.v),
        prefix_k=each(call.prefix_k), prefix_v=each(call.prefix_v),
    )  # fmt: skip


def one_table_row_per_query(call: Call) -> Call:
    """Give every table one row for each query.

    Tables may then differ between queries. They take O(B H M S) memory.
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


def lower_counterfactual(call: Call, attend: Attend) -> LoweredCall:
    """Express Edit.counterfactual by the formula of `LoweredCall`.

    A row with the sum m = 2^L / 2^lse (L: the log-sum-exp without a learned sink) keeps that sum when its level is L
    minus the log-sum-exp of what the formula gives at level 0.
    """
    kind, keeps = call.counterfactual, call.counterfactual_renormalise
    bare = _bare(call)
    spec = replace(bare.spec, max_prob=kind == "reversed")
    with_sink = None if keeps or kind == "reversed" else call.sinks
    _, norm, stats = attend(replace(bare, spec=spec, sinks=with_sink))
    level = _level(norm)
    level = level.masked_fill(level == -torch.inf, 0)
    top = None if kind != "reversed" else level + stats["max_prob"].clamp_min(TINY).log2()
    at_level_0 = _with(bare, layout=kind, levels=torch.zeros_like(level), tops=top, within=True)
    if keeps and kind != "identity":
        at_0 = _level(attend(at_level_0)[1])
        level = torch.where(at_0 > ZERO / 2, level - at_0, ALONE)  # equal weights stay when reversed
    elif kind == "uniform":
        level = level - math.log2(call.n)
    elif kind == "random":
        level = level - _level(attend(_open(at_level_0))[1])
    elif kind == "reversed":
        level = torch.zeros_like(level)
    if call.counterfactual_rows is not None:
        level = torch.where(call.counterfactual_rows, level, ALONE)
    plain = replace(call, counterfactual=None, counterfactual_rows=None)
    return _with(plain, layout=kind, levels=level.contiguous(), tops=top)


def _level(norm: Float[Tensor, "2 B H M"]) -> Float[Tensor, "B H M"]:
    """Return the log-sum-exp of rows in base 2.

    Raises LargeLogits if it is so large that weights computed from it would lose digits.
    """
    level, limit = norm.sum(0), LOST / torch.finfo(norm.dtype).eps
    if bool(((level.abs() > limit) & level.isfinite() & (level > ZERO / 2)).any()):
        raise LargeLogits(
            f"Edit.counterfactual, take and give are limited to logits up to {limit * LN2:.0f} by this backend; "
            "backends 'blocked' and 'reference' have no such limit"
        )
    return level


def _bare(call: Call) -> Call:
    """Return the call for its log-sum-exp alone.

    It has no learned sink, one value channel, and nothing after the softmax.
    """
    return replace(
        call, v=call.v[..., :1], prefix_v=None if call.prefix_v is None else call.prefix_v[..., :1], sinks=None,
        counterfactual=None, counterfactual_rows=None, gain=None, take=None, give=None, keep_fraction=None, gate=None,
        replacement=None, spec=StatSpec.none(),
    )  # fmt: skip


def _open(call: LoweredCall) -> LoweredCall:
    """Return the same call with all keys visible and no edit."""
    removed = {"bias", "key_padding", "segment_mask", "segment_open", *EDITS} - {"counterfactual_seed"}
    defaults = {f.name: f.default for f in fields(Call) if f.name in removed}
    return replace(call, causal=False, window=None, **defaults)


def _with(call: Call, **more: Any) -> LoweredCall:
    """Return the call as a LoweredCall with these fields."""
    return LoweredCall(**{f.name: getattr(call, f.name) for f in fields(call)} | more)


def lower_redistribution(call: Call, attend: Attend) -> LoweredCall:
    """Express Edit.take and give by a gain that differs between queries.

    With the weights T on cells of take and G on cells of give, cells of take keep the fraction k of their weight, and
    cells of give grow by the factor 1 + (1 - k) T / G.

    T and G come from one pass each, as the log-sum-exp over these cells alone, so neither overflows nor underflows.
    """
    call = one_table_row_per_query(call)
    take, give, keep = call.take, call.give, call.keep_fraction
    assert take is not None and give is not None and keep is not None  # validated: all or none
    keep, gain = keep.to(call.dtype), _log2_gain(call)
    bare = _with(_bare(call), within=True)
    log_give, log_take = (
        _level(attend(replace(bare, log2_gain=torch.where(cells, gain, HIDDEN)))[1])[..., None]
        for cells in (give, take)
    )
    acts = log_give > ZERO / 2  # else no cell can receive weight
    ratio = (1 - keep).log2()[..., None] + log_take - torch.where(acts, log_give, 0)
    log2_growth = torch.logaddexp2(ratio, torch.zeros_like(ratio))
    log2_keep = keep.log2().clamp_min(ZERO)[..., None]
    log2_change = torch.where(give, log2_growth, torch.where(take, log2_keep, 0))
    plain = replace(call, take=None, give=None, keep_fraction=None, gain=None)
    return _with(plain, log2_gain=gain + torch.where(acts, log2_change, 0))


def _log2_gain(call: Call) -> Float[Tensor, "#B #H R C"]:
    if call.gain is None:
        return call.q.new_zeros((), dtype=call.dtype)
    return call.gain.to(call.dtype).log2().clamp_min(HIDDEN)
