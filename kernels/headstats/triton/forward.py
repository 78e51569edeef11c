"""Triton forward: attention and row statistics in one pass, by online softmax.

It works in base 2: x = score * log2(e). With running maximum m, normaliser l = sum 2^(x - m), a new maximum m' and
alpha = 2^(m - m'), the updates are
    out, l, any sum_j 2^(x - m) w_j     ->  alpha * old + new
    entropy term T = sum 2^(x - m) (x - m)  ->  alpha * (T + (m - m') l) + new
    sum of squared weights              ->  alpha^2 * old + new
and at the end  norm = (m, log2 l), lse = ln2 (m + log2 l),  entropy = ln2 (log2 l - T / l),  largest weight = 1 / l.
Every statistic is a compile-time switch: statistics that are not requested compile to no instruction.

A prefix that batch rows share is a separate region of keys. A tile then holds queries of several batch rows. Their own
keys follow as one long axis, of which a query sees the part of its own row: one pass, and nothing to merge.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOperatorIssue=false
# (calls between kernels pass Python constants for tl.constexpr)

import os

import triton
import triton.language as tl

from headstats.triton.row_sums import add_tile, add_weights, no_sums, normalise, store_output, store_statistics
from headstats.triton.tile_scores import reweighted, row_terms, tile_logits

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read here, because this is where @triton.jit runs


@triton.jit
def load_keys(
    region, p_k, p_v, i_n, stop, i_kb,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, FLAT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load keys [BD, BN] and values [BN, BDV] from i_n on.

    Also returns which of them exist, their batch rows and their places in these.
    """
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, BDV)
    o_r = i_n + tl.arange(0, BN)
    if FLAT:
        here = o_r < stop
        o_b = (i_kb + o_r // region.n).to(tl.int64)
        o_r = o_r % region.n
        o_k = o_b * region.k_strides[0] + o_r.to(tl.int64) * region.k_strides[2]
        o_z = o_b * region.v_strides[0] + o_r.to(tl.int64) * region.v_strides[2]
    else:
        here = o_r < region.n
        o_b = tl.full([BN], 0, tl.int64) + i_kb
        o_k = o_r.to(tl.int64) * region.k_strides[2]
        o_z = o_r.to(tl.int64) * region.v_strides[2]
    p_kt = p_k + o_k[None, :] + o_d[:, None]
    p_vt = p_v + o_z[:, None] + o_v[None, :]
    if MASKED:
        b_k = tl.load(p_kt, mask=here[None, :] & (o_d[:, None] < D), other=0.0)
        b_v = tl.load(p_vt, mask=here[:, None] & (o_v[None, :] < DV), other=0.0)
    else:
        b_k = tl.load(p_kt) if BD == D else tl.load(p_kt, mask=o_d[:, None] < D, other=0.0)
        b_v = tl.load(p_vt) if BDV == DV else tl.load(p_vt, mask=o_v[None, :] < DV, other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
        b_v = b_v.to(tl.float32)
    return b_k, b_v, here, o_b, o_r


@triton.jit
def visit_keys(
    sums, b_q, region, p_k, p_v, cells, row, stats, i_b, o_m, start, stop, i_kb, first,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, FLAT: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr, MIX_PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add the keys start <= c < stop of a region to the running sums.

    Without MASKED, start is a multiple of BN.

    p_k, p_v: keys and values of this head and of batch row i_kb. If FLAT, the region's batch rows from i_kb on follow
    one another, and c counts through all of them.  first: position of a batch row's first key among all N.
    """
    b_o, softmax, before, others, b_f = sums
    o_c = tl.arange(0, BN)
    for i_n in range(start, stop, BN):
        b_k, b_v, here, o_b, o_r = load_keys(
            region, p_k, p_v, i_n, stop, i_kb, D, DV, BD, BDV, BN, MASKED, FLAT, UPCAST
        )
        inside = here[None, :]
        if FLAT:
            inside = inside & (i_b == o_b[None, :])
        b_x = tl.dot(b_q, b_k, input_precision=PRECISION)  # [BM, BN]
        o_n = first + o_r
        b_x = tile_logits(b_x, cells, row, o_m[:, None], o_n[None, :], inside, MASKED)
        if cells.after is not None:
            before = add_weights(before, b_x)
            b_x = reweighted(b_x, cells, row, o_m[:, None], o_n[None, :], inside)
        b_far = (o_m + cells.offset)[:, None] - o_n[None, :]
        if FLAT:  # distance = near - place
            b_near = tl.zeros_like(o_m).to(tl.float32)
            b_place = -b_far.to(tl.float32)
        else:
            b_near = (o_m + (cells.offset - first - i_n)).to(tl.float32)
            b_place = o_c.to(tl.float32)[None, :]
        softmax, others, b_w, b_alpha = add_tile(
            softmax, others, stats, b_x, b_near, b_place, b_far, i_n, first, region.n, MASKED, FLAT
        )
        if stats.per_key is not None:
            o_f = tl.arange(0, BF)[None, :]
            p_f = stats.features + o_b[:, None] * stats.features_stride + o_n[:, None] * stats.n_features + o_f
            b_feature = tl.load(p_f, mask=here[:, None] & (o_f < stats.n_features), other=0.0)
            b_f = tl.dot(b_w, b_feature, b_f * b_alpha[:, None], input_precision=EXACT)
        b_o = tl.dot(b_w.to(b_v.dtype), b_v, b_o * b_alpha[:, None], input_precision=MIX_PRECISION)
    return b_o, softmax, before, others, b_f


@triton.jit
def key_range(cells, reach, n, first, low, high, BN: tl.constexpr):
    """Return ranges of a region's n keys for queries at positions low ... high.

    They are (start, left, right, stop).

    start ... stop contains the keys that some query sees. left ... right contains keys that all queries see and that
    are beyond `reach` of all. All but stop are multiples of BN.
    """
    start = 0
    stop = n
    right = n // BN * BN
    left = 0
    if cells.opens is None:
        if cells.nearest is not None:
            stop = tl.minimum(n, high - cells.nearest - first + 1)
            right = tl.maximum(tl.minimum(n, low - cells.nearest - first + 1), 0) // BN * BN
        if cells.farthest is not None:
            start = tl.maximum(0, low - cells.farthest - first) // BN * BN
            left = tl.maximum(start, tl.cdiv(tl.maximum(high - cells.farthest - first, 0), BN) * BN)
    if reach is not None:
        right = tl.minimum(right, tl.maximum(low - reach - first + 1, 0) // BN * BN)
    if cells.hides is not None:
        left = start
        right = start
    return start, left, tl.maximum(left, right), stop


@triton.jit
def visit_region(
    sums, b_q, region, p_k, p_v, cells, row, stats, i_b, o_m, low, high, i_kb, first,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, MIX_PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add all keys of a region to the running sums.

    Keys at the edges need masks, those between do not.
    """
    start, left, right, stop = key_range(cells, stats.reach, region.n, first, low, high, BN)
    if (cells.farthest is not None) and (cells.hides is None):
        sums = visit_keys(
            sums, b_q, region, p_k, p_v, cells, row, stats, i_b, o_m, start, tl.minimum(left, stop), i_kb, first,
            D, DV, BD, BDV, BF, BN, True, False, UPCAST, PRECISION, MIX_PRECISION, EXACT,
        )  # fmt: skip
    if cells.hides is None:
        sums = visit_keys(
            sums, b_q, region, p_k, p_v, cells, row, stats, i_b, o_m, left, right, i_kb, first,
            D, DV, BD, BDV, BF, BN, False, False, UPCAST, PRECISION, MIX_PRECISION, EXACT,
        )  # fmt: skip
    return visit_keys(
        sums, b_q, region, p_k, p_v, cells, row, stats, i_b, o_m, right, stop, i_kb, first,
        D, DV, BD, BDV, BF, BN, True, False, UPCAST, PRECISION, MIX_PRECISION, EXACT,
    )  # fmt: skip


@triton.jit
def attend_kernel(
    p_q, q_strides, own, prefix, p_out, p_shift, p_log, cells, stats, ends, H, M, N, run,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, MIX_PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head.

    They are from one batch row, or from all `run` rows that share a prefix.

    out [B,H,M,DV] and the statistics are contiguous.
    """
    n_q = M
    if prefix is not None:
        n_q = M * run
    n_m = tl.cdiv(n_q, BM)
    i_m = n_m - 1 - tl.program_id(0) % n_m  # long rows first, when causal
    i_bh = (tl.program_id(0) // n_m).to(tl.int64)
    i_h = i_bh % H
    i_kb = i_bh // H  # batch row
    o_q = i_m * BM + tl.arange(0, BM)
    rows = o_q < n_q
    low = i_m * BM
    high = i_m * BM + BM - 1
    i_b = i_kb
    o_m = o_q
    if prefix is not None:
        i_g = i_kb
        i_kb = i_g * run
        i_first = low // M  # the tile's first and last batch row, within the run
        i_last = tl.minimum(high, n_q - 1) // M
        low = tl.where(i_first == i_last, low % M, 0)
        high = tl.where(i_first == i_last, tl.minimum(high, n_q - 1) % M, M - 1)
        i_b = (i_kb + tl.minimum(o_q, n_q - 1) // M)[:, None]
        o_m = o_q % M
    low += cells.offset
    high += cells.offset

    o_d = tl.arange(0, BD)
    o_m64 = o_m[:, None].to(tl.int64)
    p_qt = p_q + i_b * q_strides[0] + i_h * q_strides[1] + o_m64 * q_strides[2] + o_d[None, :]
    b_q = tl.load(p_qt, mask=rows[:, None] & (o_d[None, :] < D), other=0.0)  # [BM, BD]
    if UPCAST:
        b_q = b_q.to(tl.float32)
    row = row_terms(cells, i_b, i_h, o_m[:, None], M, N)
    sums = no_sums(BM, BDV, BF)
    p_k = own.k + (i_h // G) * own.k_strides[1]
    p_v = own.v + (i_h // G) * own.v_strides[1]
    if prefix is not None:
        p_k0 = prefix.k + i_g * prefix.k_strides[0] + (i_h // G) * prefix.k_strides[1]
        p_v0 = prefix.v + i_g * prefix.v_strides[0] + (i_h // G) * prefix.v_strides[1]
        sums = visit_region(
            sums, b_q, prefix, p_k0, p_v0, cells, row, stats, i_b, o_m, low, high, i_kb, 0,
            D, DV, BD, BDV, BF, BN, UPCAST, PRECISION, MIX_PRECISION, EXACT,
        )  # fmt: skip
        start, _left, _right, stop = key_range(cells, stats.reach, own.n, prefix.n, low, high, BN)
        same_row = i_first == i_last  # else every key of these rows is visited
        start = i_first * own.n + tl.where(same_row, start, 0)
        stop = i_last * own.n + tl.where(same_row, stop, own.n)
        sums = visit_keys(
            sums, b_q, own, p_k, p_v, cells, row, stats, i_b, o_m, start, stop, i_kb, prefix.n,
            D, DV, BD, BDV, BF, BN, True, True, UPCAST, PRECISION, MIX_PRECISION, EXACT,
        )  # fmt: skip
    else:
        p_k += i_kb * own.k_strides[0]
        p_v += i_kb * own.v_strides[0]
        sums = visit_region(
            sums, b_q, own, p_k, p_v, cells, row, stats, i_b, o_m, low, high, i_kb, 0,
            D, DV, BD, BDV, BF, BN, UPCAST, PRECISION, MIX_PRECISION, EXACT,
        )  # fmt: skip

    b_o, softmax, before, others, b_f = sums
    _slope, b_cool, _bias, _padding, _columns, _table, _after = row
    norm = normalise(softmax, before, ends, cells, b_cool, i_h, BM)
    empty, b_shift, b_log, b_inv = norm
    o_row = i_bh * M + o_m
    if prefix is not None:
        o_row = (tl.reshape(i_b, [BM]) * H + i_h) * M + o_m
    tl.store(p_shift + o_row, tl.where(empty, 0.0, b_shift), mask=rows)
    tl.store(p_log + o_row, tl.where(empty, float("-inf"), b_log), mask=rows)
    store_statistics(stats, softmax, others, b_o, b_f, norm, o_row, rows, BF)
    store_output(p_out, ends, b_o, b_inv, i_b, i_h, o_m[:, None], o_row, rows, DV, BDV)
