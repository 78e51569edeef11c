"""A `Call` in the form that Triton kernels take.

Imports triton only where it is needed.

Fields that a call does not use are None. Triton then compiles the kernel without them, so they cost nothing.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from headstats.call import HIDDEN, HIDDEN_BIAS, LOG2E, Call
from headstats.edits import hash_noise
from headstats.edits.lowering import LAYOUTS, LoweredCall

if TYPE_CHECKING:
    from jaxtyping import Int, Shaped
    from torch import Tensor

Strides = tuple[int, ...]
HIDES, OPENS = 1, 2  # bits of `CellTerms.rules`


class KeyRegion(NamedTuple):
    """Keys and values of one region, with their strides.

    The last axis is contiguous, and its stride is not listed.
    """

    k: Tensor  # [B, Hk, n, D]
    v: Tensor  # [B, Hk, n, Dv]
    k_strides: Strides  # batch, head, key
    v_strides: Strides
    n: int


class CellTerms(NamedTuple):
    """Everything between q . k and a masked logit; read by `tile_scores`.

    A cell is visible if nearest <= i + offset - j <= farthest (or it is opened), and if rules, padding and bias do
    not hide it. Strides of an axis that only broadcasts are 0.
    """

    scale: float
    softcap: float | None
    offset: int  # N - M
    nearest: Any  # least visible distance: constexpr 0 when causal, 1 - window in a two-sided window, or None
    farthest: int | None  # window - 1
    alibi: Tensor | None  # [H]
    bias: Tensor | None  # [#B, #H, #M, #N]
    bias_strides: Strides | None
    bias_floor: float | None  # biases at or below it hide
    temperature: Tensor | None  # [#B, #H, #M]
    temperature_strides: Strides | None
    padding: Tensor | None  # uint8 [B, N], contiguous
    q_segments: Tensor | None  # int32 [#B, M]: rows of the tables; segment -1 is the last row
    k_segments: Tensor | None  # int32 [#B, N]: columns
    segment_strides: Strides | None  # batch stride of q_segments, batch stride of k_segments
    table_strides: Strides | None  # batch, head and row of the tables, all [#B, #H, R, C] of one shape
    rules: Tensor | None  # uint8: HIDES, OPENS
    logit_factor: Tensor | None  # float32: multiply softcap(scale q.k)
    logit_raise: Tensor | None  # float32: then add this times the absolute value
    log_gain: Tensor | None  # float32: added to the logits, in base 2
    weight_gain: Tensor | None  # float32: added to logits in base 2 after the softmax; HIDDEN removes all weight
    heads: int | None  # H, if layout or a gain after the softmax is set
    layout: Any  # a constexpr index into lowering.LAYOUTS: how logits of visible cells are replaced
    levels: Tensor | None  # float32 [B, H, M], contiguous, as in `lowering.LoweredCall`
    tops: Tensor | None  # likewise
    states: Tensor | None  # int32 [B, H], contiguous: `hash_noise.states`
    after: int | None  # 1 if weight_gain or layout act after the softmax
    within: int | None  # 1 if they act before it
    hides: int | None  # 1 if bias, padding, a rule or a gain of 0 may hide a cell at any place
    opens: int | None  # 1 if some rule may open cells


class Outputs(NamedTuple):
    """Results for the statistics of queries, and the numbers that they need.

    Results are [B, H, M] and contiguous.
    """

    entropy: Tensor | None = None
    entropy_normalised: Tensor | None = None
    max_prob: Tensor | None = None
    argmax: Tensor | None = None
    participation: Tensor | None = None
    effective_keys: Tensor | None = None
    distance: Tensor | None = None
    distance_var: Tensor | None = None
    waad: Tensor | None = None
    local: Tensor | None = None
    value_norm: Tensor | None = None
    per_key: Tensor | None = None  # [B, H, M, F]: sums of features under p
    waad_window: int | None = None
    local_window: int | None = None
    reach: int | None = None  # waad and local read only keys nearer than this
    features: Tensor | None = None  # float32 [#B, N, F], contiguous
    features_stride: int | None = None  # of the batch
    n_features: int | None = None


class RowTerms(NamedTuple):
    """Arguments that act on whole rows: learned sinks, gate and replacement."""

    sinks: Tensor | None  # [H]
    gate: Tensor | None  # [#B, #H, #M]
    gate_strides: Strides | None
    replacement: Tensor | None  # [#B, #H, #M, #Dv]
    replacement_strides: Strides | None


def keys(k: Shaped[Tensor, "B Hk n D"], v: Shaped[Tensor, "B Hk n Dv"]) -> KeyRegion:
    """Return one region of keys and values."""
    k, v = unit_stride(k), unit_stride(v)
    return KeyRegion(k, v, k.stride()[:3], v.stride()[:3], k.shape[2])


def prefix(call: Call) -> tuple[KeyRegion | None, int | None]:
    """Return the prefix, and the number of batch rows that share one."""
    if call.prefix_k is None or call.prefix_v is None:
        return None, None
    return keys(call.prefix_k, call.prefix_v), call.q.shape[0] // call.prefix_k.shape[0]


def power_of_two(d: int) -> int:
    """Return the length of a tile's axis that holds d numbers.

    Tensor cores need at least 16.
    """
    return max(16, 1 << (d - 1).bit_length())


def unit_stride(x: Shaped[Tensor, "*lead D"]) -> Shaped[Tensor, "*lead D"]:
    """Return x with stride 1 along the last axis, as kernels need.

    Other axes may have any stride.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Shaped[Tensor, "*shape"] | None, dims: int) -> Strides | None:
    """Return the strides of the first axes, 0 for axes that only broadcast."""
    if x is None:
        return None
    return tuple(0 if size == 1 else step for size, step in zip(x.shape[:dims], x.stride()[:dims], strict=True))


def batch_stride(x: Shaped[Tensor, "#B *rest"]) -> int:
    """Return the batch stride, 0 if all batch rows share."""
    return 0 if x.shape[0] == 1 else x.stride(0)


def cells(call: Call) -> CellTerms:
    """Return what a call does to logits."""
    from triton.language import constexpr

    nearest = constexpr(0) if call.causal else None if call.window is None else 1 - call.window
    bias, padding, temperature = call.bias, call.key_padding, call.temperature
    tables = _tables(call)
    any_table = next(iter(tables.values()), None)
    q_ids = k_ids = None
    if any_table is not None:
        assert call.k_segments is not None  # validated: a table needs both
        q_ids = _row_numbers(call, any_table.shape[2])
        k_ids = call.k_segments.remainder(any_table.shape[3]).to(torch.int32).contiguous()
    return CellTerms(
        scale=call.scale, softcap=call.softcap, offset=call.offset, nearest=nearest,
        farthest=None if call.window is None else call.window - 1,
        alibi=None if call.alibi is None else call.alibi.contiguous(),
        bias=bias, bias_strides=strides(bias, 4), bias_floor=None if bias is None else _floor(bias.dtype),
        temperature=temperature, temperature_strides=strides(temperature, 3),
        padding=None if padding is None else padding.contiguous().view(torch.uint8),
        q_segments=q_ids, k_segments=k_ids,
        segment_strides=None if q_ids is None or k_ids is None else (batch_stride(q_ids), batch_stride(k_ids)),
        table_strides=strides(any_table, 3),
        rules=tables.get("rules"), logit_factor=tables.get("logit_factor"), logit_raise=tables.get("logit_raise"),
        log_gain=tables.get("log_gain"), weight_gain=tables.get("weight_gain"),
        **_after(call, "weight_gain" in tables),
        hides=None if bias is None and padding is None and not {"rules", "weight_gain"} & set(tables) else 1,
        opens=None if call.segment_open is None else 1,
    )  # fmt: skip


def _after(call: Call, gain: bool) -> dict[str, Any]:
    """Return what acts after the softmax, by field of `CellTerms`."""
    from triton.language import constexpr

    if not isinstance(call, LoweredCall) or (call.layout is None and not gain):
        unused = dict.fromkeys(("heads", "layout", "levels", "tops", "states", "within"))
        return {**unused, "after": 1 if gain else None}
    states = None
    if call.layout == "random":
        rows, heads = (torch.arange(size, device=call.q.device) for size in call.q.shape[:2])
        states = hash_noise.states(call.counterfactual_seed, rows, heads).to(torch.int32)  # the low 32 bits
    return {
        "heads": call.q.shape[1], "layout": None if call.layout is None else constexpr(LAYOUTS.index(call.layout)),
        "levels": None if call.levels is None else call.levels.float().contiguous(),
        "tops": None if call.tops is None else call.tops.float().contiguous(),
        "states": states, "after": None if call.within else 1, "within": 1 if call.within else None,
    }  # fmt: skip


def ends(call: Call) -> RowTerms:
    """Return what a call does to whole rows."""
    return RowTerms(
        sinks=None if call.sinks is None else call.sinks.contiguous(),
        gate=call.gate, gate_strides=strides(call.gate, 3),
        replacement=call.replacement, replacement_strides=strides(call.replacement, 4),
    )  # fmt: skip


def _floor(dtype: torch.dtype) -> float:
    """Return the largest bias that hides, as in `call.hidden_by_bias`.

    It is compared in the bias's own dtype.
    """
    return max(torch.finfo(dtype).min, float(torch.tensor(HIDDEN_BIAS).to(dtype)))


def _row_numbers(call: Call, rows: int) -> Int[Tensor, "#B M"]:
    """Return the table row that each query reads.

    Where the rows occur twice, queries that the edit does not change read the second half, in which the edit does
    nothing.
    """
    ids = call.table_q_segments
    assert ids is not None  # validated: a table needs both
    if call.has_two_row_numberings:
        ids = torch.where(call.edit_q_segments == ids, ids, torch.where(ids < 0, ids, ids + rows // 2))
    return ids.remainder(rows).to(torch.int32).contiguous()


def _tables(call: Call) -> dict[str, Shaped[Tensor, "#B #H R C"]]:
    """Return the tables over pairs of segments by field of `CellTerms`.

    All have one shape, so that one index reads all.
    """
    masks = (call.segment_mask, call.segment_open)
    edits = (call.knockout, call.logit_factor, call.logit_raise, call.edit_bias, call.gain)
    log2_gain = call.log2_gain if isinstance(call, LoweredCall) else None
    sources = [t for t in (*masks, *edits, log2_gain) if t is not None]
    if not sources:
        return {}
    sizes = tuple(min(t.shape[axis] for t in sources) for axis in (2, 3))
    rows = sizes[0] * (2 if call.has_two_row_numberings else 1)
    shape = (max(t.shape[0] for t in sources), max(t.shape[1] for t in sources), rows, sizes[1])

    def prepare(t: Tensor, of_edit: bool = True) -> Tensor:
        t = _trim(t, *sizes)
        if call.has_two_row_numberings:
            t = torch.cat([t, t[:, :, -1:].expand_as(t) if of_edit else t], 2)
        return t.expand(shape).contiguous()

    rules = [] if call.segment_mask is None else [prepare(~call.segment_mask, False).to(torch.uint8) * HIDES]
    if call.segment_open is not None:
        rules.append(prepare(call.segment_open, False).to(torch.uint8) * OPENS)
    if call.knockout is not None:
        rules.append(prepare(call.knockout).to(torch.uint8) * HIDES)
    tables = {"rules": functools.reduce(torch.bitwise_or, rules)} if rules else {}
    for name in ("logit_factor", "logit_raise"):
        if (t := getattr(call, name)) is not None:
            tables[name] = prepare(t.float())
    if call.edit_bias is not None:
        tables["log_gain"] = prepare(call.edit_bias.float() * LOG2E)
    if call.gain is not None:
        tables["weight_gain"] = prepare(call.gain.float().log2().clamp_min(HIDDEN))
    if log2_gain is not None:
        tables["weight_gain"] = prepare(log2_gain)
    return tables


def _trim(t: Shaped[Tensor, "b h R C"], rows: int, columns: int) -> Shaped[Tensor, "b h rows columns"]:
    """Keep the first rows and columns and the neutral last one.

    No id reads the others.
    """
    for axis, size in ((2, rows), (3, columns)):
        if t.shape[axis] > size:
            last = t.narrow(axis, t.shape[axis] - 1, 1)
            t = torch.cat([t.narrow(axis, 0, size - 1), last], axis)
    return t
