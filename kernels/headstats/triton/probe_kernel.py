"""Triton: weights of single cells from q, k and norm.

p_ij = 2^((x_ij - shift_i) - log_i), without pattern or values.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# (calls between kernels pass Python constants for tl.constexpr)

import triton
import triton.language as tl

from headstats.triton.tile_scores import LOWEST, reweighted, row_terms, tile_logits, weight_of


@triton.jit
def weigh_cells_kernel(
    p_q, q_strides, own, prefix, p_keys, keys_strides, p_shift, p_log, p_out, cells, H, M, N, T, run,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head and batch row.

    p_keys: int64, T keys of each query; invalid keys weigh 0.

    shift, log [B,H,M] and out, [B,H,M,T] or with SUM [B,H,M], are contiguous. run: batch rows that share a prefix.
    """
    n_m = tl.cdiv(M, BM)
    i_bh = (tl.program_id(0) // n_m).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_m = tl.program_id(0) % n_m * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)[None, :]
    rows = o_m < M
    o_m64 = o_m.to(tl.int64)
    p_qt = p_q + i_b * q_strides[0] + i_h * q_strides[1] + o_m64[:, None] * q_strides[2] + o_d
    b_q = tl.load(p_qt, mask=rows[:, None] & (o_d < D), other=0.0).to(tl.float32)  # [BM, BD]
    b_shift = tl.load(p_shift + i_bh * M + o_m, mask=rows, other=0.0)
    b_log = tl.load(p_log + i_bh * M + o_m, mask=rows, other=0.0)
    row = row_terms(cells, i_b, i_h, o_m[:, None], M, N)
    p_k = own.k + i_b * own.k_strides[0] + (i_h // G) * own.k_strides[1]
    if prefix is not None:
        p_k0 = prefix.k + i_b // run * prefix.k_strides[0] + (i_h // G) * prefix.k_strides[1]
    b_total = tl.zeros([BM], tl.float32)
    for i_t in range(0, T):
        o_n = tl.load(p_keys + i_b * keys_strides[0] + o_m64 * keys_strides[1] + i_t, mask=rows, other=-1)
        real = (o_n >= 0) & (o_n < N)
        o_n = tl.where(real, o_n, 0)
        if prefix is not None:
            o_r = tl.where(o_n < prefix.n, o_n * prefix.k_strides[2], (o_n - prefix.n) * own.k_strides[2])
            p_kt = tl.where(o_n < prefix.n, p_k0, p_k)[:, None] + o_r[:, None] + o_d
        else:
            p_kt = p_k + (o_n * own.k_strides[2])[:, None] + o_d
        b_k = tl.load(p_kt, mask=real[:, None] & (o_d < D), other=0.0).to(tl.float32)
        b_x = tl.sum(b_q * b_k, 1)[:, None]
        b_x = tile_logits(b_x, cells, row, o_m[:, None], o_n[:, None], real[:, None], True)
        if cells.after is not None:
            b_x = reweighted(b_x, cells, row, o_m[:, None], o_n[:, None], real[:, None])
        b_x = tl.reshape(b_x, [BM])
        b_p = tl.where(b_x <= LOWEST, 0.0, weight_of(b_x, b_shift, b_log, cells))
        if SUM:
            b_total += b_p
        else:
            tl.store(p_out + (i_bh * M + o_m) * T + i_t, b_p, mask=rows)
    if SUM:
        tl.store(p_out + i_bh * M + o_m, b_total, mask=rows)
