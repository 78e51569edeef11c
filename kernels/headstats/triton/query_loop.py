"""Triton: parts shared by kernels that loop over queries.

Their programs own a block of keys and loop over the queries that see it.

Their tiles are transposed: keys as [BN, 1], queries as [1, BM].
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# (calls between kernels pass Python constants for tl.constexpr)

import triton
import triton.language as tl


@triton.jit
def query_range(cells, M, n, first, i_n, BM: tl.constexpr, BN: tl.constexpr):
    """Return (start, left, right, stop) of the queries for the keys i_n ...

    i_n + BN - 1 of a region's n keys.

    start ... stop contains the queries that see some of these keys, left ... right those that see all. All but stop are
    multiples of BM.
    """
    low = first + i_n - cells.offset
    high = first + tl.minimum(i_n + BN, n) - 1 - cells.offset
    start = 0
    left = 0
    right = M // BM * BM
    stop = M
    if cells.opens is None:
        if cells.nearest is not None:
            start = tl.maximum(0, low + cells.nearest) // BM * BM
            left = tl.cdiv(tl.maximum(high + cells.nearest, 0), BM) * BM
        if cells.farthest is not None:
            stop = tl.maximum(tl.minimum(M, high + cells.farthest + 1), 0)
            right = tl.minimum(right, tl.maximum(low + cells.farthest + 1, 0) // BM * BM)
    if cells.hides is not None:
        left = start
        right = start
    left = tl.maximum(start, left)
    return start, left, tl.maximum(left, right), stop


@triton.jit
def load_columns(p, s_row, o_m, M, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr):
    """Load vectors of queries as columns: [BD, BM]."""
    o_d = tl.arange(0, BD)[:, None]
    p_t = p + o_m[None, :].to(tl.int64) * s_row + o_d
    if MASKED:
        b = tl.load(p_t, mask=(o_m[None, :] < M) & (o_d < D), other=0.0)
    else:
        b = tl.load(p_t) if BD == D else tl.load(p_t, mask=o_d < D, other=0.0)
    return b.to(tl.float32) if UPCAST else b


@triton.jit
def load_block(p, s_row, o_r, n, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """Load vectors as rows: [BN, BD], with 0 from row n on and beyond D."""
    o_d = tl.arange(0, BD)[None, :]
    p_t = p + o_r[:, None].to(tl.int64) * s_row + o_d
    b = tl.load(p_t, mask=(o_r[:, None] < n) & (o_d < D), other=0.0)
    return b.to(tl.float32) if UPCAST else b


@triton.jit
def load_norms(p_shift, p_log, o_m, M):
    """Load the norms of queries: a weight is 2^((x - shift) - log).

    The second part is +inf, so that all weights are 0, where no query exists or the query sees no key.
    """
    b_shift = tl.load(p_shift + o_m, mask=o_m < M, other=0.0)
    b_log = tl.load(p_log + o_m, mask=o_m < M, other=float("inf"))
    return b_shift, tl.where(b_log == float("-inf"), float("inf"), b_log)
