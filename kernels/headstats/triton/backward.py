"""Triton backward: gradients from q, k, v, norm and out.

Weights are recomputed tile by tile, and no M x N matrix is stored.

With x = score * log2(e), p = 2^((x - shift) - log), dp = dout . v, and delta = dout . out - dlse for each query:
    dv = p^T dout                     ds = p (dp - delta)           (d loss / d logit, natural)
    dx = ds / temperature             d temperature = - sum_j ds_ij logit_ij / temperature
    dq = scale dx' k, dk = scale dx'^T q, with dx' = dx (1 - tanh^2) under a softcap
A gain on weights after the softmax multiplies dp, and p in dv. In one kernel, programs own blocks of keys and loop over
the queries of all heads of the group and of all batch rows that share the keys. In the other, programs own blocks of
queries. So no atomics are needed.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false
# (calls between kernels pass Python constants for tl.constexpr)

import triton
import triton.language as tl

from headstats.triton.forward import key_range
from headstats.triton.query_loop import load_block, load_norms, query_range
from headstats.triton.tile_scores import LN2, of_cells, row_terms, tanh, tile_logits, weight_of


@triton.jit
def through_softcap(b_ds, b_qk, cells):
    """Turn d loss / d logit into d loss / d (scale q . k)."""
    if cells.softcap is not None:
        b_t = tanh(b_qk * (cells.scale / cells.softcap))
        b_ds = b_ds * (1.0 - b_t * b_t)
    return b_ds


@triton.jit
def add_queries(
    sums, b_k, b_v, p_q, q_strides, p_go, go_strides, p_shift, p_log, p_delta, cells, i_r, i_hk, o_n, inside,
    start, left, right, stop, H, M, N, run,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the queries start ... left and right ... stop to dk and dv, in whole tiles.

    One loop covers all heads and batch rows. Tiles are transposed: keys as [BN, 1], queries as [1, BM].
    """
    b_dk, b_dv = sums
    n_left = tl.cdiv(tl.maximum(left - start, 0), BM)
    n_tiles = n_left + tl.cdiv(tl.maximum(stop - right, 0), BM)
    for i_t in range(0, G * run * n_tiles):
        i_b = i_r * run + i_t // (n_tiles * G)
        i_h = i_hk * G + i_t // n_tiles % G
        i_m = i_t % n_tiles
        i_m = tl.where(i_m < n_left, start + i_m * BM, right + (i_m - n_left) * BM)
        o_m = i_m + tl.arange(0, BM)
        o_row = (i_b * H + i_h) * M
        b_q = load_block(p_q + i_b * q_strides[0] + i_h * q_strides[1], q_strides[2], o_m, M, D, BD, UPCAST)
        b_go = load_block(p_go + i_b * go_strides[0] + i_h * go_strides[1], go_strides[2], o_m, M, DV, BDV, UPCAST)
        b_shift, b_log = load_norms(p_shift + o_row, p_log + o_row, o_m, M)
        b_delta = tl.load(p_delta + o_row + o_m, mask=o_m < M, other=0.0)
        b_qk = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BN, BM]
        row = row_terms(cells, i_b, i_h, o_m[None, :], M, N)
        b_x = tile_logits(b_qk, cells, row, o_m[None, :], o_n[:, None], inside[:, None], MASKED)
        b_p = weight_of(b_x, b_shift[None, :], b_log[None, :], cells)
        b_dp = tl.dot(b_v, tl.trans(b_go), input_precision=PRECISION)  # [BN, BM]
        b_w = b_p
        if cells.weight_gain is not None:
            b_gain = tl.exp2(of_cells(cells.weight_gain, cells, row, o_n[:, None], inside[:, None]))
            b_dp *= b_gain
            b_w *= b_gain
        b_dv = tl.dot(b_w.to(b_go.dtype), b_go, b_dv, input_precision=PRECISION)
        b_ds = b_p * (b_dp - b_delta[None, :]) * row[1]  # 1 / temperature
        b_ds = through_softcap(b_ds, b_qk, cells)
        b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def keys_gradient_kernel(
    p_q, q_strides, region, p_go, go_strides, p_shift, p_log, p_delta, p_dk, p_dv, cells, H, M, N, first, run,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of one key head.

    Sums are over its G query heads and the `run` batch rows that share the keys.

    first: position of the region's first key among all N.  shift, log, delta [B,H,M], dk [.,Hk,n,D] and
    dv are contiguous.
    """
    n_n = tl.cdiv(region.n, BN)
    i_n = tl.program_id(0) % n_n * BN
    i_rh = (tl.program_id(0) // n_n).to(tl.int64)  # row of keys and key head
    i_r = i_rh // (H // G)
    i_hk = i_rh % (H // G)
    o_r = i_n + tl.arange(0, BN)
    o_n = first + o_r
    inside = o_r < region.n
    p_k = region.k + i_r * region.k_strides[0] + i_hk * region.k_strides[1]
    p_v = region.v + i_r * region.v_strides[0] + i_hk * region.v_strides[1]
    b_k = load_block(p_k, region.k_strides[2], o_r, region.n, D, BD, UPCAST)
    b_v = load_block(p_v, region.v_strides[2], o_r, region.n, DV, BDV, UPCAST)
    start, left, right, stop = query_range(cells, M, region.n, first, i_n, BM, BN)
    sums = tl.zeros([BN, BD], tl.float32), tl.zeros([BN, BDV], tl.float32)
    if cells.hides is None:
        sums = add_queries(
            sums, b_k, b_v, p_q, q_strides, p_go, go_strides, p_shift, p_log, p_delta, cells, i_r, i_hk, o_n, inside,
            left, right, stop, stop, H, M, N, run, G, D, DV, BD, BDV, BM, False, UPCAST, PRECISION,
        )  # fmt: skip
    sums = add_queries(
        sums, b_k, b_v, p_q, q_strides, p_go, go_strides, p_shift, p_log, p_delta, cells, i_r, i_hk, o_n, inside,
        start, tl.minimum(left, stop), right, stop, H, M, N, run,
        G, D, DV, BD, BDV, BM, True, UPCAST, PRECISION,
    )  # fmt: skip
    b_dk, b_dv = sums
    o_d = tl.arange(0, BD)[None, :]
    o_v = tl.arange(0, BDV)[None, :]
    o_out = (i_rh * region.n + o_r)[:, None]
    b_dk = (b_dk * cells.scale).to(p_dk.dtype.element_ty)
    tl.store(p_dk + o_out * D + o_d, b_dk, mask=inside[:, None] & (o_d < D))
    tl.store(p_dv + o_out * DV + o_v, b_dv.to(p_dv.dtype.element_ty), mask=inside[:, None] & (o_v < DV))


@triton.jit
def add_keys(
    sums, b_q, b_go, b_norm, b_delta, region, p_k, p_v, cells, row, o_m, start, stop, first,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    HEAT: tl.constexpr, SLOPE: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the keys start <= c < stop of a region to the gradients of queries.

    These are dq and the gradients of temperature and ALiBi slope.
    """
    b_dq, b_heat, b_away = sums
    b_shift, b_log = b_norm
    for i_n in range(start, stop, BN):
        o_r = i_n + tl.arange(0, BN)
        o_n = (first + o_r)[None, :]
        inside = (o_r < region.n)[None, :]
        b_k = load_block(p_k, region.k_strides[2], o_r, region.n, D, BD, UPCAST)  # [BN, BD]
        b_v = load_block(p_v, region.v_strides[2], o_r, region.n, DV, BDV, UPCAST)  # [BN, BDV]
        b_qk = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        b_x = tile_logits(b_qk, cells, row, o_m[:, None], o_n, inside, MASKED)
        b_p = weight_of(b_x, b_shift[:, None], b_log[:, None], cells)
        b_dp = tl.dot(b_go, tl.trans(b_v), input_precision=PRECISION)  # [BM, BN]
        if cells.weight_gain is not None:
            b_dp *= tl.exp2(of_cells(cells.weight_gain, cells, row, o_n, inside))
        b_ds = b_p * (b_dp - b_delta[:, None])
        if HEAT:
            b_logit = b_x - b_shift[:, None]
            if cells.log_gain is not None:
                b_logit -= of_cells(cells.log_gain, cells, row, o_n, inside)
            b_heat += tl.sum(b_ds * b_logit, 1) * LN2
        b_ds = b_ds * row[1]  # 1 / temperature
        if SLOPE:
            b_away += tl.sum(b_ds * tl.abs((o_m + cells.offset)[:, None] - o_n).to(tl.float32), 1)
        b_ds = through_softcap(b_ds, b_qk, cells)
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq, b_heat, b_away


@triton.jit
def add_region(
    sums, b_q, b_go, b_norm, b_delta, region, p_k, p_v, cells, row, o_m, low, high, first,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    HEAT: tl.constexpr, SLOPE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add all keys of a region: those at the edges with masks, those between without."""
    start, left, right, stop = key_range(cells, None, region.n, first, low, high, BN)
    if (cells.farthest is not None) and (cells.hides is None):
        sums = add_keys(
            sums, b_q, b_go, b_norm, b_delta, region, p_k, p_v, cells, row, o_m, start, tl.minimum(left, stop), first,
            D, DV, BD, BDV, BN, HEAT, SLOPE, True, UPCAST, PRECISION,
        )  # fmt: skip
    if cells.hides is None:
        sums = add_keys(
            sums, b_q, b_go, b_norm, b_delta, region, p_k, p_v, cells, row, o_m, left, right, first,
            D, DV, BD, BDV, BN, HEAT, SLOPE, False, UPCAST, PRECISION,
        )  # fmt: skip
    return add_keys(
        sums, b_q, b_go, b_norm, b_delta, region, p_k, p_v, cells, row, o_m, right, stop, first,
        D, DV, BD, BDV, BN, HEAT, SLOPE, True, UPCAST, PRECISION,
    )  # fmt: skip


@triton.jit
def queries_gradient_kernel(
    p_q, q_strides, own, prefix, p_go, go_strides, p_shift, p_log, p_delta, p_dq, p_heat, p_away, cells, H, M, N, run,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head and batch row.

    p_heat, p_away: sum_j ds (logit - shift) and sum_j dx |distance| of each query, or None. These, shift, log, delta
    and dq are contiguous.
    """
    n_m = tl.cdiv(M, BM)
    i_m = n_m - 1 - tl.program_id(0) % n_m  # long rows first, when causal
    i_bh = (tl.program_id(0) // n_m).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_m = i_m * BM + tl.arange(0, BM)
    b_q = load_block(p_q + i_b * q_strides[0] + i_h * q_strides[1], q_strides[2], o_m, M, D, BD, UPCAST)
    b_go = load_block(p_go + i_b * go_strides[0] + i_h * go_strides[1], go_strides[2], o_m, M, DV, BDV, UPCAST)
    b_norm = load_norms(p_shift + i_bh * M, p_log + i_bh * M, o_m, M)
    b_delta = tl.load(p_delta + i_bh * M + o_m, mask=o_m < M, other=0.0)
    row = row_terms(cells, i_b, i_h, o_m[:, None], M, N)
    low = i_m * BM + cells.offset
    high = low + BM - 1
    sums = tl.zeros([BM, BD], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32)
    before = 0
    if prefix is not None:
        before = prefix.n
        p_k0 = prefix.k + i_b // run * prefix.k_strides[0] + (i_h // G) * prefix.k_strides[1]
        p_v0 = prefix.v + i_b // run * prefix.v_strides[0] + (i_h // G) * prefix.v_strides[1]
        sums = add_region(
            sums, b_q, b_go, b_norm, b_delta, prefix, p_k0, p_v0, cells, row, o_m, low, high, 0,
            D, DV, BD, BDV, BN, p_heat is not None, p_away is not None, UPCAST, PRECISION,
        )  # fmt: skip
    p_k = own.k + i_b * own.k_strides[0] + (i_h // G) * own.k_strides[1]
    p_v = own.v + i_b * own.v_strides[0] + (i_h // G) * own.v_strides[1]
    sums = add_region(
        sums, b_q, b_go, b_norm, b_delta, own, p_k, p_v, cells, row, o_m, low, high, before,
        D, DV, BD, BDV, BN, p_heat is not None, p_away is not None, UPCAST, PRECISION,
    )  # fmt: skip
    b_dq, b_heat, b_away = sums
    rows = o_m < M
    o_row = i_bh * M + o_m
    o_d = tl.arange(0, BD)[None, :]
    b_dq = (b_dq * cells.scale).to(p_dq.dtype.element_ty)
    tl.store(p_dq + o_row[:, None] * D + o_d, b_dq, mask=rows[:, None] & (o_d < D))
    if p_heat is not None:
        tl.store(p_heat + o_row, b_heat, mask=rows)
    if p_away is not None:
        tl.store(p_away + o_row, b_away, mask=rows)
