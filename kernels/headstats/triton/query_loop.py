"""Triton: what kernels share that own a block of keys and walk over the queries which see it.

Their tiles stand on their side: keys as [BN, 1], queries as [1, BM].
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# (Python constants stand for tl.constexpr in calls between kernels)

import triton
import triton.language as tl

from headstats.triton.tile_scores import LOG2E


@triton.jit
def query_range(cells, M, n, first, i_n, BM: tl.constexpr, BN: tl.constexpr):
    """(start, left, right, stop) of the queries for the keys i_n ... i_n + BN - 1 of a region's n: start ... stop holds
    those that see some of them, left ... right those that see all. All but stop are multiples of BM."""
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
    """Vectors of queries as columns: [BD, BM]."""
    o_d = tl.arange(0, BD)[:, None]
    p_t = p + o_m[None, :].to(tl.int64) * s_row + o_d
    if MASKED:
        b = tl.load(p_t, mask=(o_m[None, :] < M) & (o_d < D), other=0.0)
    else:
        b = tl.load(p_t) if BD == D else tl.load(p_t, mask=o_d < D, other=0.0)
    return b.to(tl.float32) if UPCAST else b


@triton.jit
def load_block(p, s_row, o_r, n, D: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr):
    """Vectors as rows: [BN, BD], of which those from n on and beyond D are 0."""
    o_d = tl.arange(0, BD)[None, :]
    p_t = p + o_r[:, None].to(tl.int64) * s_row + o_d
    b = tl.load(p_t, mask=(o_r[:, None] < n) & (o_d < D), other=0.0)
    return b.to(tl.float32) if UPCAST else b


@triton.jit
def load_norms(p_lse, o_m, M):
    """lse of queries in base 2, +inf (so that all weights are 0) where there is no query or it sees no key."""
    b_lse = tl.load(p_lse + o_m, mask=o_m < M, other=float("inf")) * LOG2E
    return tl.where(b_lse == float("-inf"), float("inf"), b_lse)
