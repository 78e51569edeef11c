"""Triton: statistics of keys, in a second pass over q and k that reads norm.

p_ij = 2^((x_ij - shift_i) - log_i). A program owns a block of keys of one head and loops over the queries that see it,
so sums over queries stay in its registers. It needs no values, no product with them, and no atomics. The number of
queries to divide by is counted in the same loop.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# (calls between kernels pass Python constants for tl.constexpr)

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from headstats.call import Call
from headstats.triton import kernel_arguments as arguments
from headstats.triton.forward import INTERPRETED
from headstats.triton.query_loop import load_block, load_columns, load_norms, query_range
from headstats.triton.tile_scores import LOWEST, reweighted, row_terms, tile_logits, weight_of

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

# Keys, queries and pipeline stages, for head sizes up to 64, 128 and 256.
HALF_TILES = ((128, 64, 3), (128, 64, 2), (32, 32, 1))
FLOAT32_TILES = ((64, 32, 2), (32, 32, 1), (32, 16, 1))


class ColumnOutputs(NamedTuple):
    """Results for the statistics of keys, [B, H, N]; None: not requested.

    They are contiguous.
    """

    received: Tensor | None = None
    received_max: Tensor | None = None
    column_norm: Tensor | None = None
    fai: Tensor | None = None
    fai_nearest: int | None = None
    fai_farthest: int | None = None


@triton.jit
def visit_queries(
    sums, b_k, p_q, s_m, p_shift, p_log, p_real, cells, outputs, i_b, i_h, o_n, inside, start, stop, M, N,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the queries start <= i < stop to the sums over queries.

    start is a multiple of BM.
    """
    b_sum, b_seen, b_max, b_square, b_far_sum, b_far_seen = sums
    for i_m in range(start, stop, BM):
        o_m = i_m + tl.arange(0, BM)
        b_q = load_columns(p_q, s_m, o_m, M, D, BD, MASKED, UPCAST)
        b_shift, b_log = load_norms(p_shift, p_log, o_m, M)
        real = o_m < M
        if p_real is not None:
            real = tl.load(p_real + o_m, mask=real, other=0) != 0
        b_x = tl.dot(b_k, b_q, input_precision=PRECISION)  # [BN, BM]
        row = row_terms(cells, i_b, i_h, o_m[None, :], M, N)
        b_x = tile_logits(b_x, cells, row, o_m[None, :], o_n[:, None], inside[:, None], MASKED)
        if cells.after is not None:
            b_x = reweighted(b_x, cells, row, o_m[None, :], o_n[:, None], inside[:, None])
        counted = (tl.where(b_x <= LOWEST, 0, 1) != 0) & real[None, :]  # NaN counts
        b_p = tl.where(counted, weight_of(b_x, b_shift[None, :], b_log[None, :], cells), 0.0)
        if (outputs.received is not None) or (outputs.received_max is not None):
            b_sum += tl.sum(b_p, 1)
        if outputs.received is not None:
            b_seen += tl.sum(counted.to(tl.int32), 1)
        if outputs.received_max is not None:
            b_max = tl.maximum(b_max, tl.max(b_p, 1))
        if outputs.column_norm is not None:
            b_square += tl.sum(b_p * b_p, 1)
        if outputs.fai is not None:
            b_far = (o_m + cells.offset)[None, :] - o_n[:, None]
            within = (b_far >= outputs.fai_nearest) & (b_far <= outputs.fai_farthest)
            b_far_sum += tl.sum(tl.where(within, b_p, 0.0), 1)
            b_far_seen += tl.sum((counted & within).to(tl.int32), 1)
    return b_sum, b_seen, b_max, b_square, b_far_sum, b_far_seen


@triton.jit
def columns_kernel(
    p_q, q_strides, region, p_shift, p_log, p_real, cells, outputs, H, M, N, first, run,
    G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN keys of one head and batch row.

    first: position of the region's first key among all N.  run: batch rows that share the region's keys.
    shift, log [B,H,M] and p_real (uint8, [B,M]) are contiguous.
    """
    n_n = tl.cdiv(region.n, BN)
    i_n = tl.program_id(0) % n_n * BN
    i_bh = (tl.program_id(0) // n_n).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    o_r = i_n + tl.arange(0, BN)
    o_n = first + o_r
    inside = o_r < region.n
    p_k = region.k + i_b // run * region.k_strides[0] + (i_h // G) * region.k_strides[1]
    b_k = load_block(p_k, region.k_strides[2], o_r, region.n, D, BD, UPCAST)
    p_qh = p_q + i_b * q_strides[0] + i_h * q_strides[1]
    p_shift += i_bh * M
    p_log += i_bh * M
    if p_real is not None:
        p_real += i_b * M

    b_zero = tl.zeros([BN], tl.float32)
    b_none = tl.zeros([BN], tl.int32)
    sums = b_zero, b_none, b_zero, b_zero, b_zero, b_none
    start, left, right, stop = query_range(cells, M, region.n, first, i_n, BM, BN)
    if (cells.nearest is not None) and (cells.hides is None):
        sums = visit_queries(
            sums, b_k, p_qh, q_strides[2], p_shift, p_log, p_real, cells, outputs, i_b, i_h, o_n, inside,
            start, tl.minimum(left, stop), M, N, D, BD, BM, True, UPCAST, PRECISION,
        )  # fmt: skip
    if cells.hides is None:
        sums = visit_queries(
            sums, b_k, p_qh, q_strides[2], p_shift, p_log, p_real, cells, outputs, i_b, i_h, o_n, inside,
            left, right, M, N, D, BD, BM, False, UPCAST, PRECISION,
        )  # fmt: skip
    sums = visit_queries(
        sums, b_k, p_qh, q_strides[2], p_shift, p_log, p_real, cells, outputs, i_b, i_h, o_n, inside,
        right, stop, M, N, D, BD, BM, True, UPCAST, PRECISION,
    )  # fmt: skip

    b_sum, b_seen, b_max, b_square, b_far_sum, b_far_seen = sums
    o_row = i_bh * N + o_n
    if outputs.received is not None:
        tl.store(outputs.received + o_row, b_sum / tl.maximum(b_seen, 1).to(tl.float32), mask=inside)
    if outputs.received_max is not None:
        tl.store(outputs.received_max + o_row, tl.where(b_sum == b_sum, b_max, b_sum), mask=inside)  # NaN stays
    if outputs.column_norm is not None:
        tl.store(outputs.column_norm + o_row, tl.sqrt(b_square), mask=inside)
    if outputs.fai is not None:
        tl.store(outputs.fai + o_row, b_far_sum / tl.maximum(b_far_seen, 1).to(tl.float32), mask=inside)


def statistics(call: Call, norm: Float[Tensor, "2 B H M"]) -> dict[str, Tensor]:
    """Compute the requested statistics of keys, [B, H, N]."""
    b, h, m, _ = call.q.shape
    stats, outputs = allocate(call)
    q, real, meta = arguments.unit_stride(call.q), call.query_padding, constants(call, INTERPRETED)
    real = None if real is None else real.contiguous().view(torch.uint8)
    prefix, run = arguments.prefix(call)
    regions = [(arguments.keys(call.k, call.v), call.n - call.k.shape[2], 1)]
    if prefix is not None:
        regions.append((prefix, 0, run))
    kernel: Any = columns_kernel
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        for region, first, share in regions:
            kernel[(b * h * -(-region.n // meta["BN"]),)](
                q,
                q.stride()[:3],
                region,
                norm[0],
                norm[1],
                real,
                arguments.cells(call),
                outputs,
                h,
                m,
                call.n,
                first,
                share,
                **meta,
            )
    return stats


def allocate(call: Call) -> tuple[dict[str, Tensor], ColumnOutputs]:
    """Allocate the requested statistics.

    Returns them by name and as the kernel's argument.
    """
    b, h, _, _ = call.q.shape
    requested = call.spec.requested()
    names = [name for name in ColumnOutputs._fields if name in requested]
    stats = {name: call.q.new_empty(b, h, call.n, dtype=torch.float32) for name in names}
    horizon: dict[str, Any] = {}
    if call.spec.fai:
        horizon = dict(zip(("fai_nearest", "fai_farthest"), call.spec.fai, strict=True))
    return stats, ColumnOutputs(**stats, **horizon)


def constants(call: Call, interpreted: bool = False) -> dict[str, Any]:
    """Return the kernel's compile-time arguments: sizes, precision, tile shape."""
    d, full = call.q.shape[3], call.q.dtype == torch.float32
    sizes = {"G": call.groups, "D": d, "BD": arguments.power_of_two(d)}
    switches = {"UPCAST": interpreted and not full, "PRECISION": "ieee" if full else "tf32"}
    if interpreted:
        return sizes | switches | {"BM": 16, "BN": 16}
    bn, bm, stages = (FLOAT32_TILES if full else HALF_TILES)[0 if d <= 64 else 1 if d <= 128 else 2]
    if call.edit_q_segments is not None or call.bias is not None:
        bn, bm, stages = min(bn, 64), min(bm, 32), 1  # their tables take registers
    return sizes | switches | {"BM": bm, "BN": bn, "num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}
