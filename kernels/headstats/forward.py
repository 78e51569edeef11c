"""Triton forward: attention and row statistics in one pass over the keys, by online softmax.

Works in base 2: x = score * log2(e). With running maximum m, normaliser l = sum 2^(x - m) and a new maximum m',
alpha = 2^(m - m'):
    out, l, any sum_j 2^(x - m) w_j     ->  alpha * old + new
    entropy term T = sum 2^(x - m) (x - m)  ->  alpha * (T + (m - m') l) + new
    sum of squared weights              ->  alpha^2 * old + new
and at the end  lse = ln2 (m + log2 l),  entropy = ln2 (log2 l - T / l),  largest weight = 1 / l.
Every statistic is a compile-time switch: what is not asked for leaves no instruction behind.
"""

# pyright: reportArgumentType=false
# (Python constants stand for tl.constexpr in calls between kernels)

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read when @triton.jit runs, that is, here

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(-1e30)
LOWEST = tl.constexpr(-5e29)  # the running maximum starts here, so that 2^(HIDDEN - m) = 0 in an empty row


@triton.jit
def tanh(x):
    """Overflow of the power gives 1 and underflow -1, as it should."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def visit_keys(
    b_o, b_m, b_l, b_t, b_a, b_d, b_p,
    b_q, p_k, p_v, p_pad, o_m, start, stop, N, OFFSET, window, softcap, scale, s_kn, s_vn,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PADDING: tl.constexpr,
    ENTROPY: tl.constexpr, ARGMAX: tl.constexpr, DISTANCE: tl.constexpr, PARTICIPATION: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Takes the keys start <= j < stop into the running sums. start is a multiple of BN."""
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, BDV)
    o_c = tl.arange(0, BN)
    for i_n in range(start, stop, BN):
        o_n = i_n + o_c
        p_kt = p_k + o_n[None, :].to(tl.int64) * s_kn + o_d[:, None]
        p_vt = p_v + o_n[:, None].to(tl.int64) * s_vn + o_v[None, :]
        if MASKED:
            b_k = tl.load(p_kt, mask=(o_n[None, :] < N) & (o_d[:, None] < D), other=0.0)  # [BD, BN]
            b_v = tl.load(p_vt, mask=(o_n[:, None] < N) & (o_v[None, :] < DV), other=0.0)  # [BN, BDV]
        else:
            b_k = tl.load(p_kt) if BD == D else tl.load(p_kt, mask=o_d[:, None] < D, other=0.0)
            b_v = tl.load(p_vt) if BDV == DV else tl.load(p_vt, mask=o_v[None, :] < DV, other=0.0)
        if UPCAST:
            b_k = b_k.to(tl.float32)
            b_v = b_v.to(tl.float32)
        b_x = tl.dot(b_q, b_k, input_precision=PRECISION)  # [BM, BN]
        if SOFTCAP:
            b_x = tanh(b_x * (scale / softcap)) * (softcap * LOG2E)
        else:
            b_x = b_x * (scale * LOG2E)
        if MASKED:
            seen = (o_n < N)[None, :]
            b_far = (o_m + OFFSET)[:, None] - o_n[None, :]
            if CAUSAL:
                seen = seen & (b_far >= 0)
            if WINDOW:
                seen = seen & (b_far < window) & (b_far > -window)
            if PADDING:
                b_real = tl.load(p_pad + o_n, mask=o_n < N, other=0)
                seen = seen & (b_real != 0)[None, :]
            b_x = tl.where(seen, b_x, HIDDEN)

        if ARGMAX:
            b_top, b_at = tl.max(b_x, 1, return_indices=True, return_indices_tie_break_left=True)
            b_a = tl.where(b_top > b_m, i_n + b_at, b_a)  # strictly greater: ties go to the leftmost key
        else:
            b_top = tl.max(b_x, 1)
        b_new = tl.maximum(b_m, b_top)
        b_alpha = tl.exp2(b_m - b_new)
        b_x = b_x - b_new[:, None]
        b_w = tl.exp2(b_x)
        b_sum = tl.sum(b_w, 1)
        if ENTROPY:
            b_t = b_alpha * (b_t + (b_m - b_new) * b_l) + tl.sum(b_w * b_x, 1)
        if DISTANCE:
            # Distances inside the tile are small numbers: subtracting positions after summing would cancel.
            b_near = (o_m + OFFSET - i_n).to(tl.float32)
            b_d = b_alpha * b_d + b_near * b_sum - tl.sum(b_w * o_c.to(tl.float32)[None, :], 1)
        if PARTICIPATION:
            b_p = b_alpha * b_alpha * b_p + tl.sum(b_w * b_w, 1)
        b_l = b_alpha * b_l + b_sum
        b_o = tl.dot(b_w.to(b_v.dtype), b_v, b_o * b_alpha[:, None], input_precision=PRECISION)
        b_m = b_new
    return b_o, b_m, b_l, b_t, b_a, b_d, b_p


@triton.jit
def attend_kernel(
    p_q, p_k, p_v, p_out, p_lse, p_sinks, p_pad, p_gate, p_entropy, p_max, p_argmax, p_distance, p_participation,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gm,
    H, M, N, window, softcap, scale,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr, PADDING: tl.constexpr,
    GATE: tl.constexpr, ENTROPY: tl.constexpr, MAX_PROB: tl.constexpr, ARGMAX: tl.constexpr,
    DISTANCE: tl.constexpr, PARTICIPATION: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head. out [B,H,M,DV] and the statistics [B,H,M] are contiguous."""
    n_m = tl.cdiv(M, BM)
    i_m = n_m - 1 - tl.program_id(0) % n_m  # long rows first, when causal
    i_bh = (tl.program_id(0) // n_m).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    OFFSET = N - M
    o_m = i_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    rows = o_m < M
    p_qt = p_q + i_b * s_qb + i_h * s_qh + o_m[:, None].to(tl.int64) * s_qm + o_d[None, :]
    b_q = tl.load(p_qt, mask=rows[:, None] & (o_d[None, :] < D), other=0.0)  # [BM, BD]
    if UPCAST:
        b_q = b_q.to(tl.float32)
    p_kh = p_k + i_b * s_kb + (i_h // G) * s_kh
    p_vh = p_v + i_b * s_vb + (i_h // G) * s_vh
    p_padb = p_pad + i_b * N if PADDING else p_pad

    start = 0
    stop = N
    whole = N // BN * BN  # keys before this are seen by every query of the block
    if CAUSAL:
        stop = tl.minimum(N, (i_m + 1) * BM + OFFSET)
        whole = tl.maximum(tl.minimum(N, i_m * BM + OFFSET + 1), 0) // BN * BN
    if WINDOW:
        start = tl.maximum(0, i_m * BM + OFFSET - window + 1) // BN * BN
        stop = tl.minimum(stop, (i_m + 1) * BM + OFFSET + window - 1)
    if WINDOW or PADDING:
        whole = start

    b_o = tl.zeros([BM, BDV], tl.float32)
    b_m = tl.full([BM], LOWEST, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_t = tl.zeros([BM], tl.float32)
    b_a = tl.full([BM], -1, tl.int32)
    b_d = tl.zeros([BM], tl.float32)
    b_p = tl.zeros([BM], tl.float32)
    b_o, b_m, b_l, b_t, b_a, b_d, b_p = visit_keys(
        b_o, b_m, b_l, b_t, b_a, b_d, b_p,
        b_q, p_kh, p_vh, p_padb, o_m, start, whole, N, OFFSET, window, softcap, scale, s_kn, s_vn,
        D, DV, BD, BDV, BN, False, CAUSAL, WINDOW, SOFTCAP, PADDING,
        ENTROPY, ARGMAX, DISTANCE, PARTICIPATION, UPCAST, PRECISION,
    )  # fmt: skip
    b_o, b_m, b_l, b_t, b_a, b_d, b_p = visit_keys(
        b_o, b_m, b_l, b_t, b_a, b_d, b_p,
        b_q, p_kh, p_vh, p_padb, o_m, whole, stop, N, OFFSET, window, softcap, scale, s_kn, s_vn,
        D, DV, BD, BDV, BN, True, CAUSAL, WINDOW, SOFTCAP, PADDING,
        ENTROPY, ARGMAX, DISTANCE, PARTICIPATION, UPCAST, PRECISION,
    )  # fmt: skip

    empty = b_l == 0.0
    b_shift = b_m
    b_total = b_l
    b_scale = 1.0
    if SINKS:
        b_sink = tl.load(p_sinks + i_h).to(tl.float32) * LOG2E
        b_shift = tl.maximum(b_m, b_sink)
        b_scale = tl.exp2(b_m - b_shift)
        b_total = b_l * b_scale + tl.exp2(b_sink - b_shift)
    b_inv = tl.where(empty, 0.0, b_scale / tl.where(empty, 1.0, b_total))  # weight = 2^(x - m) * inv
    b_log = tl.log2(tl.where(empty, 1.0, b_total))
    o_row = i_bh * M + o_m
    tl.store(p_lse + o_row, tl.where(empty, float("-inf"), (b_shift + b_log) * LN2), mask=rows)
    if ENTROPY:
        # -sum p log2 p with log2 p = (x - m) + (m - shift) - log2 total
        b_h = b_inv * (b_l * (b_log + b_shift - b_m) - b_t)
        tl.store(p_entropy + o_row, tl.where(empty, 0.0, b_h * LN2), mask=rows)
    if MAX_PROB:
        tl.store(p_max + o_row, b_inv, mask=rows)
    if ARGMAX:
        tl.store(p_argmax + o_row, b_a.to(tl.int64), mask=rows)
    if DISTANCE:
        tl.store(p_distance + o_row, b_d * b_inv, mask=rows)
    if PARTICIPATION:
        tl.store(p_participation + o_row, b_p * b_inv * b_inv, mask=rows)
    if GATE:
        p_g = p_gate + i_b * s_gb + i_h * s_gh + o_m.to(tl.int64) * s_gm
        b_inv = b_inv * tl.load(p_g, mask=rows, other=0.0).to(tl.float32)
    o_v = tl.arange(0, BDV)
    p_o = p_out + o_row[:, None] * DV + o_v[None, :]
    tl.store(p_o, (b_o * b_inv[:, None]).to(p_out.dtype.element_ty), mask=rows[:, None] & (o_v[None, :] < DV))
