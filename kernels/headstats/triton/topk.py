"""Triton: the k largest weights of each query, in a separate pass over q and k.

A program owns a block of queries and keeps, for each, the k largest cells so far, unordered. Keys come from left to
right. The largest cells of a tile are inserted one by one while they are strictly larger than the smallest kept cell,
which is dropped; of equal kept cells, the rightmost is dropped. So ties go to the left, as the definition requires.
After the first tiles few cells are inserted: of N keys in random order, about k ln(N / k). For more than MOST_KEPT,
there are several passes, and each continues below the last cell of the previous one.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportCallIssue=false
# (calls between kernels pass Python constants for tl.constexpr)

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from headstats.call import Call
from headstats.stats import TopK
from headstats.triton import kernel_arguments as arguments
from headstats.triton.forward import INTERPRETED, key_range
from headstats.triton.query_loop import load_block
from headstats.triton.tile_scores import HIDDEN, LOWEST, reweighted, row_terms, tile_logits

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

# Queries, keys and pipeline stages, for head sizes up to 64, 128 and 256.
HALF_TILES = ((64, 64, 2), (64, 64, 2), (64, 32, 2))
FLOAT32_TILES = ((32, 32, 2), (32, 32, 1), (16, 32, 1))
MOST_KEPT = 64


@triton.jit
def keep_larger(b_x, b_best, b_place, i_n, BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr):
    """Merge a tile [BM, BN] into the largest cells [BM, K] and their places.

    i_n: the first key of the tile.
    """
    o_c = tl.arange(0, BN)[None, :]
    o_k = tl.arange(0, K)[None, :]
    b_top, b_at = tl.max(b_x, 1, return_indices=True, return_indices_tie_break_left=True)
    b_low = tl.min(b_best, 1)
    while tl.max((b_top > b_low).to(tl.int32), 0) > 0:
        better = (b_top > b_low)[:, None]
        # Of the slots with the smallest cell, choose the one with the rightmost key; the slot number breaks ties of
        # empty slots.
        b_code = tl.where(b_best == b_low[:, None], (b_place + 1) * K + o_k, -1)
        out = better & (b_code == tl.max(b_code, 1)[:, None])
        b_best = tl.where(out, b_top[:, None], b_best)
        b_place = tl.where(out, (i_n + b_at)[:, None], b_place)
        b_x = tl.where(better & (o_c == b_at[:, None]), HIDDEN, b_x)
        b_top, b_at = tl.max(b_x, 1, return_indices=True, return_indices_tie_break_left=True)
        b_low = tl.min(b_best, 1)
    return b_best, b_place


@triton.jit
def visit_keys(
    best, b_q, region, p_k, cells, row, after, o_m, start, stop, first,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merge the keys start <= c < stop of a region, from left to right."""
    b_best, b_place = best
    for i_n in range(start, stop, BN):
        o_r = i_n + tl.arange(0, BN)
        inside = (o_r < region.n)[None, :]
        b_k = load_block(p_k, region.k_strides[2], o_r, region.n, D, BD, UPCAST)  # [BN, BD]
        b_x = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BM, BN]
        b_x = tile_logits(b_x, cells, row, o_m[:, None], (first + o_r)[None, :], inside, MASKED)
        if cells.after is not None:
            b_x = reweighted(b_x, cells, row, o_m[:, None], (first + o_r)[None, :], inside)
        if after is not None:
            b_last, b_last_place = after
            below = (b_x < b_last) | ((b_x == b_last) & ((first + o_r)[None, :] > b_last_place))
            b_x = tl.where(below, b_x, HIDDEN)
        b_best, b_place = keep_larger(b_x, b_best, b_place, first + i_n, BM, BN, K)
    return b_best, b_place


@triton.jit
def visit_region(
    best, b_q, region, p_k, cells, row, after, o_m, low, high, first,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Merge all keys of a region.

    Keys at the edges need masks, those between do not.
    """
    start, left, right, stop = key_range(cells, None, region.n, first, low, high, BN)
    if (cells.farthest is not None) and (cells.hides is None):
        best = visit_keys(
            best, b_q, region, p_k, cells, row, after, o_m, start, tl.minimum(left, stop), first,
            D, BD, BM, BN, K, True, UPCAST, PRECISION,
        )  # fmt: skip
    if cells.hides is None:
        best = visit_keys(
            best, b_q, region, p_k, cells, row, after, o_m, left, right, first,
            D, BD, BM, BN, K, False, UPCAST, PRECISION,
        )  # fmt: skip
    return visit_keys(
        best, b_q, region, p_k, cells, row, after, o_m, right, stop, first, D, BD, BM, BN, K, True, UPCAST, PRECISION
    )


@triton.jit
def largest_kernel(
    p_q, q_strides, own, prefix, p_best, p_place, p_last, p_last_place, cells, H, M, N, run, k,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, K: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head and batch row.

    p_best (logits in base 2) and p_place: [B,H,M,k].

    p_last, p_last_place: for each query the last cell of the previous pass, [B,H,M], or None.
    """
    n_m = tl.cdiv(M, BM)
    i_m = n_m - 1 - tl.program_id(0) % n_m  # long rows first, when causal
    i_bh = (tl.program_id(0) // n_m).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_m = i_m * BM + tl.arange(0, BM)
    b_q = load_block(p_q + i_b * q_strides[0] + i_h * q_strides[1], q_strides[2], o_m, M, D, BD, UPCAST)
    row = row_terms(cells, i_b, i_h, o_m[:, None], M, N)
    low = i_m * BM + cells.offset
    high = low + BM - 1
    o_k = tl.arange(0, K)[None, :]
    b_place = tl.full([BM, K], -1, tl.int32)
    # A slot beyond k holds infinity, so it is never replaced.
    best = tl.where(o_k < k, LOWEST, float("inf")) + tl.zeros([BM, K], tl.float32), b_place
    after = None
    if p_last is not None:
        o_row = (i_bh * M + o_m)[:, None]
        b_last = tl.load(p_last + o_row, mask=(o_m < M)[:, None], other=0.0)
        after = (b_last, tl.load(p_last_place + o_row, mask=(o_m < M)[:, None], other=0))
    before = 0
    if prefix is not None:
        before = prefix.n
        p_k0 = prefix.k + i_b // run * prefix.k_strides[0] + (i_h // G) * prefix.k_strides[1]
        best = visit_region(
            best, b_q, prefix, p_k0, cells, row, after, o_m, low, high, 0, D, BD, BM, BN, K, UPCAST, PRECISION
        )
    p_k = own.k + i_b * own.k_strides[0] + (i_h // G) * own.k_strides[1]
    best = visit_region(
        best, b_q, own, p_k, cells, row, after, o_m, low, high, before, D, BD, BM, BN, K, UPCAST, PRECISION
    )
    b_best, b_place = best
    o_out = (i_bh * M + o_m)[:, None] * k + o_k
    here = (o_m < M)[:, None] & (o_k < k)
    tl.store(p_best + o_out, b_best, mask=here)
    tl.store(p_place + o_out, b_place, mask=here)


def topk(call: Call, norm: Float[Tensor, "2 B H M"]) -> TopK:
    """Return the k largest weights, largest first, and their keys."""
    k = call.spec.topk
    if k <= MOST_KEPT:
        best, place = _pass(call, k, None)
    else:  # all passes have the same size, so that a cell's logit has the same bits in each
        last = torch.full_like(norm[0], torch.inf), torch.full_like(norm[0], -1, dtype=torch.int32)
        passes = []
        for _ in range(-(-k // MOST_KEPT)):
            passes.append(_pass(call, MOST_KEPT, last))
            last = tuple(x[..., -1].contiguous() for x in passes[-1])
        best, place = (torch.cat(x, -1)[..., :k] for x in zip(*passes, strict=True))
    values = torch.where(place >= 0, torch.exp2((best - norm[0][..., None]) - norm[1][..., None]), 0.0)
    undefined = norm[1].isnan()[..., None]
    return TopK(values.masked_fill_(undefined, torch.nan), place.long().masked_fill_(undefined, -1))


def _pass(
    call: Call, k: int, last: tuple[Float[Tensor, "B H M"], Int[Tensor, "B H M"]] | None
) -> tuple[Float[Tensor, "B H M k"], Int[Tensor, "B H M k"]]:
    """Return the k largest logits (base 2) after the cell `last` of each query.

    Also returns their keys. Largest first; ties go left.
    """
    b, h, m, _ = call.q.shape
    q = arguments.unit_stride(call.q)
    best = torch.empty(b, h, m, k, dtype=torch.float32, device=q.device)
    place = torch.empty_like(best, dtype=torch.int32)
    meta = constants(call, k, INTERPRETED)
    prefix, run = arguments.prefix(call)
    p_last, p_last_place = (None, None) if last is None else last
    kernel: Any = largest_kernel
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        kernel[(b * h * -(-m // meta["BM"]),)](
            q, q.stride()[:3], arguments.keys(call.k, call.v), prefix, best, place, p_last, p_last_place,
            arguments.cells(call), h, m, call.n, run, k, **meta,
        )  # fmt: skip
    by_place = place.sort(-1)  # so that the stable sort by size keeps ties in order of place
    best, order = best.gather(-1, by_place.indices).sort(dim=-1, descending=True, stable=True)
    return best, by_place.values.gather(-1, order)


def constants(call: Call, k: int, interpreted: bool = False) -> dict[str, Any]:
    """Return the kernel's compile-time arguments: sizes, precision, tile shape."""
    d, full = call.q.shape[3], call.q.dtype == torch.float32
    sizes = {"G": call.groups, "D": d, "BD": arguments.power_of_two(d), "K": arguments.power_of_two(k)}
    switches = {"UPCAST": interpreted and not full, "PRECISION": "ieee" if full else "tf32"}
    if interpreted:
        return sizes | switches | {"BM": 16, "BN": 16}
    bm, bn, stages = (FLOAT32_TILES if full else HALF_TILES)[0 if d <= 64 else 1 if d <= 128 else 2]
    return sizes | switches | {"BM": bm, "BN": bn, "num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}
