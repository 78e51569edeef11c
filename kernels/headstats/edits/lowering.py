"""Edits that the Triton kernels and the compiled CPU backend do not know, put in terms of what they do: before any
pass of a call runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch

from headstats.call import EDITS, HIDDEN, LOG2E, Call
from headstats.edits.weights import ZERO
from headstats.spec import StatSpec

if TYPE_CHECKING:
    from jaxtyping import Float, Int, Shaped
    from torch import Tensor

    Attend = Callable[[Call], tuple[Tensor, Tensor, dict[str, Any]]]

LAYOUTS = ("uniform", "identity", "reversed", "random")  # of counterfactuals: what a cell's own number decides
TINY = 1e-37  # no row's largest weight
ALONE = -HIDDEN  # among levels: the row's weights stay


@dataclass(eq=False, kw_only=True)
class Lowered(Call):
    """A call whose gain after the softmax is given by its logarithm, which reaches further than a gain could, and whose
    counterfactual has become a formula for single cells, given two numbers of their row.

    Logarithms of weights are those of logits, in base 2: weight = 2^(x - lse log2 e). Of a visible cell x becomes
    level + r, with r = 0 (uniform), 0 at the query's own position (identity), log2 u (random) or
    log2(2^top - 2^x) (reversed); then the gain is added.
    """

    log2_gain: Float[Tensor, "#B #H R C"] | None = None  # at or below HIDDEN: the cell is hidden; at ZERO: has weight 0
    layout: str | None = None  # one of LAYOUTS
    levels: Float[Tensor, "B H M"] | None = None
    tops: Float[Tensor, "B H M"] | None = None  # for "reversed": the row's largest logit; what is as large gets none
    within: bool = False  # all of this acts before the softmax, so that lse is that of the weights it leaves


def unsupported(call: Call, channels: int | None = None) -> str | None:
    """Why a call cannot be put in these terms, or None."""
    rows, d = call.pattern_rows, call.q.shape[3]
    if channels is not None and rows is not None and rows.shape[2] > 1 and 2 * d > channels:
        return f"beside Edit.pattern_from in some rows, head sizes up to {channels // 2} fit, given D={d}"
    if call.counterfactual not in (None, *LAYOUTS):
        kind = call.counterfactual
        return f"Edit.counterfactual={kind!r} wants whole rows, which backends 'blocked' and 'reference' hold"
    return None


def lowered(call: Call, attend: Attend, channels: int | None = None) -> Call:
    """The call without pattern_from, counterfactual, take and give. attend: a pass over the keys, for out, lse and
    statistics by name.  channels: how many q and k may have, if not any number."""
    call = with_pattern(call, channels)
    if call.counterfactual is not None:
        call = laid_out(call, attend)
    return call if call.take is None else redistributed(call, attend)


def with_pattern(call: Call, channels: int | None = None) -> Call:
    """Edit.pattern_from as more channels: [q, 0] and [0, q2] against [k, k2] give q.k and q2.k2, row by row.

    Queries and keys that are swapped for all need no more than that. A NaN or an infinity in k2 reaches all rows.
    Where so many channels do not fit, heads that are swapped whole get keys and values for each query head.
    """
    if call.pattern_q is None or call.pattern_k is None:
        return call
    done = replace(call, pattern_q=None, pattern_k=None, pattern_rows=None)
    if call.pattern_rows is None:
        return replace(done, q=call.pattern_q, k=call.pattern_k)
    if channels is not None and 2 * call.q.shape[3] > channels:
        return _keys_of_query_heads(call, done, call.pattern_rows[..., None], call.pattern_q, call.pattern_k)
    other = call.pattern_rows[..., None]
    q = torch.cat([call.q.masked_fill(other, 0), call.pattern_q.masked_fill(~other, 0)], -1)
    shared = None if call.prefix_k is None else torch.cat([call.prefix_k] * 2, -1)
    return replace(done, q=q, k=torch.cat([call.k, call.pattern_k], -1), prefix_k=shared)


def _keys_of_query_heads(call: Call, done: Call, other: Tensor, q: Tensor, k: Tensor) -> Call:
    def each(x: Tensor | None) -> Any:
        return None if x is None else x.repeat_interleave(call.groups, 1)

    assert other.shape[2] == 1  # else `unsupported` has refused
    return replace(
        done, q=torch.where(other, q, call.q), k=torch.where(other, each(k), each(call.k)), v=each(call.v),
        prefix_k=each(call.prefix_k), prefix_v=each(call.prefix_v),
    )  # fmt: skip


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
    """Edit.counterfactual as the formula of `Lowered`: a row of the sum m = 2^L / 2^lse keeps it (L: the log-sum-exp
    without a learned sink) when level is L less the log-sum-exp of what the formula gives at level 0."""
    kind, keeps = call.counterfactual, call.counterfactual_renormalise
    bare = _bare(call)
    spec = replace(bare.spec, max_prob=kind == "reversed")
    with_sink = None if keeps or kind == "reversed" else call.sinks
    _, lse, found = attend(replace(bare, spec=spec, sinks=with_sink))
    level = lse.masked_fill(lse == -torch.inf, 0) * LOG2E
    top = None if kind != "reversed" else level + found["max_prob"].clamp_min(TINY).log2()
    flat = _with(bare, layout=kind, levels=torch.zeros_like(level), tops=top, within=True)
    if keeps and kind != "identity":
        even = attend(flat)[1]
        level = torch.where(even > ZERO / 2, level - even * LOG2E, ALONE)  # equal weights stay when reversed
    elif kind == "uniform":
        level = level - math.log2(call.n)
    elif kind == "random":
        level = level - attend(_open(flat))[1] * LOG2E
    elif kind == "reversed":
        level = torch.zeros_like(level)
    if call.counterfactual_rows is not None:
        level = torch.where(call.counterfactual_rows, level, ALONE)
    done = replace(call, counterfactual=None, counterfactual_rows=None)
    return _with(done, layout=kind, levels=level.contiguous(), tops=top)


def _bare(call: Call) -> Call:
    """Attention for its log-sum-exp: no learned sink, hardly any values, nothing after the softmax."""
    return replace(
        call, v=call.v[..., :1], prefix_v=None if call.prefix_v is None else call.prefix_v[..., :1], sinks=None,
        counterfactual=None, counterfactual_rows=None, gain=None, take=None, give=None, keep_fraction=None, gate=None,
        replacement=None, spec=StatSpec.none(),
    )  # fmt: skip


def _open(call: Lowered) -> Lowered:
    """The same with all keys in sight and no edit."""
    gone = {"bias", "key_padding", "segment_mask", "segment_open", *EDITS} - {"counterfactual_seed"}
    defaults = {f.name: f.default for f in fields(Call) if f.name in gone}
    return replace(call, causal=False, window=None, **defaults)


def _with(call: Call, **more: Any) -> Lowered:
    return Lowered(**{f.name: getattr(call, f.name) for f in fields(call)} | more)


def redistributed(call: Call, attend: Attend) -> Lowered:
    """Edit.take and give as a gain of each query's own: with the weights T on cells of take and G on those of give,
    cells of take keep k of their weight, and those of give grow by the factor 1 + (1 - k) T / G.

    T and G come from a pass each, as log-sum-exp over these cells alone, so that neither overflows nor underflows.
    """
    call = by_query(call)
    take, give, keep = call.take, call.give, call.keep_fraction
    assert take is not None and give is not None and keep is not None  # validated: all or none
    keep, gain = keep.to(call.dtype), _log2_gain(call)
    bare = _with(_bare(call), within=True)
    given, taken = (
        attend(replace(bare, log2_gain=torch.where(cells, gain, HIDDEN)))[1][..., None] for cells in (give, take)
    )
    acts = given > ZERO / 2  # else nothing is there to give to
    ratio = (1 - keep).log()[..., None] + taken - torch.where(acts, given, 0)
    grown = torch.logaddexp(ratio, torch.zeros_like(ratio)) * LOG2E
    kept = keep.log2().clamp_min(ZERO)[..., None]
    moved = torch.where(give, grown, torch.where(take, kept, 0))
    done = replace(call, take=None, give=None, keep_fraction=None, gain=None)
    return _with(done, log2_gain=gain + torch.where(acts, moved, 0))


def _log2_gain(call: Call) -> Float[Tensor, "#B #H R C"]:
    if call.gain is None:
        return call.q.new_zeros((), dtype=call.dtype)
    return call.gain.to(call.dtype).log2().clamp_min(HIDDEN)
