"""Causal attention and nothing else: what the instrumented kernel must come down to when nothing is asked of it."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN, LOWEST = tl.constexpr(-1e36), tl.constexpr(-1.44e30)


@triton.jit
def plain_loop(b_o, b_m, b_l, b_q, p_k, p_v, s_kn, s_vn, o_m, start, stop, N, offset, scale,
               D: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    o_d = tl.arange(0, BD)
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        here = o_n < N
        p_kt = p_k + (o_n.to(tl.int64) * s_kn)[None, :] + o_d[:, None]
        p_vt = p_v + (o_n.to(tl.int64) * s_vn)[:, None] + o_d[None, :]
        if MASKED:
            b_k = tl.load(p_kt, mask=here[None, :] & (o_d[:, None] < D), other=0.0)
            b_v = tl.load(p_vt, mask=here[:, None] & (o_d[None, :] < D), other=0.0)
        else:
            b_k = tl.load(p_kt)
            b_v = tl.load(p_vt)
        b_x = tl.dot(b_q, b_k) * (scale * LOG2E)
        if MASKED:
            b_x = tl.where(here[None, :] & (o_m[:, None] + offset - o_n[None, :] >= 0), b_x, HIDDEN)
        b_new = tl.maximum(b_m, tl.max(b_x, 1))
        b_alpha = tl.exp2(b_m - b_new)
        b_w = tl.exp2(b_x - b_new[:, None])
        b_l = b_alpha * b_l + tl.sum(b_w, 1)
        b_o = tl.dot(b_w.to(b_v.dtype), b_v, b_o * b_alpha[:, None])
        b_m = b_new
    return b_o, b_m, b_l


@triton.jit
def plain_kernel(p_q, s_qb, s_qh, s_qm, p_k, p_v, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, N, p_out, p_shift, p_log, scale,
                 offset, H, M, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
                 BN: tl.constexpr):  # fmt: skip
    n_m = tl.cdiv(M, BM)
    i_m = n_m - 1 - tl.program_id(0) % n_m
    i_bh = (tl.program_id(0) // n_m).to(tl.int64)
    i_h = i_bh % H
    i_b = i_bh // H
    o_m = i_m * BM + tl.arange(0, BM)
    rows = o_m < M
    low = i_m * BM + offset
    high = i_m * BM + BM - 1 + offset
    o_d = tl.arange(0, BD)
    p_qt = p_q + i_b * s_qb + i_h * s_qh + o_m[:, None].to(tl.int64) * s_qm + o_d[None, :]
    b_q = tl.load(p_qt, mask=rows[:, None] & (o_d[None, :] < D), other=0.0)
    p_k += (i_h // G) * s_kh
    p_v += (i_h // G) * s_vh
    p_k += i_b * s_kb
    p_v += i_b * s_vb
    b_m = tl.full([BM], LOWEST, tl.float32)
    b_l = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, BD], tl.float32)
    stop = tl.minimum(N, high + 1)
    whole = tl.maximum(tl.minimum(N, low + 1), 0) // BN * BN
    b_o, b_m, b_l = plain_loop(
        b_o, b_m, b_l, b_q, p_k, p_v, s_kn, s_vn, o_m, 0, whole, N, offset, scale, D, BD, BN, False
    )
    b_o, b_m, b_l = plain_loop(
        b_o, b_m, b_l, b_q, p_k, p_v, s_kn, s_vn, o_m, whole, stop, N, offset, scale, D, BD, BN, True
    )
    empty = b_l == 0.0
    b_inv = tl.where(empty, 0.0, 1.0 / tl.where(empty, 1.0, b_l))
    b_log = tl.log2(tl.where(empty, 1.0, b_l))
    o_row = i_bh * M + o_m
    tl.store(p_shift + o_row, tl.where(empty, 0.0, b_m), mask=rows)
    tl.store(p_log + o_row, tl.where(empty, float("-inf"), b_log), mask=rows)
    p_o = p_out + o_row[:, None] * D + o_d[None, :]
    tl.store(p_o, (b_o * b_inv[:, None]).to(p_out.dtype.element_ty), mask=rows[:, None] & (o_d[None, :] < D))
