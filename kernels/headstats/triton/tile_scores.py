"""Masked logits of one tile, in base 2, for all Triton kernels.

Only this file defines how logits are computed.

All functions broadcast. A tile of BM queries and BN keys passes queries as [BM, 1] and keys as [1, BN], or the other
way round for a transposed tile. Keys may also be [BM, BN], where every query has its own. The batch row is a scalar, or
[BM, 1] where a tile holds queries of several batch rows.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# (calls between kernels pass Python constants for tl.constexpr)

import triton
import triton.language as tl

from headstats import call
from headstats.edits import hash_noise, lowering, weights
from headstats.triton import kernel_arguments as arguments

LOG2E = tl.constexpr(call.LOG2E)
LN2 = tl.constexpr(0.6931471805599453)
HIDDEN = tl.constexpr(call.HIDDEN)
ZERO = tl.constexpr(weights.ZERO)
ALONE = tl.constexpr(lowering.ALONE)
UNIFORM, IDENTITY, REVERSED, RANDOM = (tl.constexpr(i) for i in range(4))  # indices into lowering.LAYOUTS
EQUAL = tl.constexpr(1e-6)  # logits in base 2 with a smaller relative difference count as equal
LOWEST = tl.constexpr(call.LOWEST)  # where a running maximum starts, so that 2^(HIDDEN - m) = 0 in an empty row
DROPPED, UNIT = tl.constexpr(32 - hash_noise.BITS), tl.constexpr(2.0**-hash_noise.BITS)
HIDES, OPENS = tl.constexpr(arguments.HIDES), tl.constexpr(arguments.OPENS)


@triton.jit
def tanh(x):
    """Return tanh(x). Overflow of the power correctly gives 1, and underflow -1."""
    return 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0)


@triton.jit
def mix(x):
    """Return `hash_noise.mix` of unsigned words."""
    x = x + 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def row_terms(cells, i_b, i_h, o_i, M, N):
    """Load once what queries contribute to their cells.

    This is slope, 1 / temperature, and the offsets of their data.

    o_i: queries; those from M on read the data of the last one.
    """
    o_i = tl.minimum(o_i, M - 1).to(tl.int64)
    b_slope = 0.0
    b_cool = 1.0
    o_bias = 0
    o_padding = 0
    o_columns = 0
    o_table = 0
    b_level = 0.0
    b_top = 0.0
    b_state = 0
    if cells.alibi is not None:
        b_slope = tl.load(cells.alibi + i_h).to(tl.float32) * LOG2E
    if cells.temperature is not None:
        s_b, s_h, s_m = cells.temperature_strides
        b_cool = 1.0 / tl.load(cells.temperature + i_b * s_b + i_h * s_h + o_i * s_m).to(tl.float32)
    if cells.bias is not None:
        s_b, s_h, s_m, _s_n = cells.bias_strides
        o_bias = i_b * s_b + i_h * s_h + o_i * s_m
    if cells.padding is not None:
        o_padding = i_b * N
    if cells.q_segments is not None:
        s_qb, s_kb = cells.segment_strides
        s_b, s_h, s_r = cells.table_strides
        o_table = i_b * s_b + i_h * s_h + tl.load(cells.q_segments + i_b * s_qb + o_i) * s_r
        o_columns = i_b * s_kb
    if cells.layout is not None:
        i_bh = i_b * cells.heads + i_h
        b_level = tl.load(cells.levels + i_bh * M + o_i)
        if cells.layout == REVERSED:
            b_top = tl.load(cells.tops + i_bh * M + o_i)
        if cells.layout == RANDOM:
            b_state = tl.load(cells.states + i_bh).to(tl.uint32, bitcast=True)
            b_state = mix((o_i + cells.offset).to(tl.uint32) ^ b_state)
    return b_slope, b_cool, o_bias, o_padding, o_columns, o_table, (b_level, b_top, b_state)


@triton.jit
def of_cells(p_table, cells, row, o_n, inside):
    """Load a table over pairs of segments at the tile's cells. row: from row_terms.

    inside: which keys exist.
    """
    _slope, _cool, _bias, _padding, o_columns, o_table, _after = row
    return tl.load(p_table + o_table + tl.load(cells.k_segments + o_columns + o_n, mask=inside, other=0))


@triton.jit
def tile_logits(b_x, cells, row, o_i, o_n, inside, MASKED: tl.constexpr):
    """Turn q . k into logits times log2(e), HIDDEN where not visible.

    row: from row_terms.  o_n: keys, counted over all N.  inside: which of them exist.  MASKED: whether some cell may
    be hidden or outside; must be true if cells.hides.  Edits after the softmax are not included: if cells.after,
    `reweighted` turns the logits into logarithms of the remaining weights.
    """
    b_slope, b_cool, o_bias, o_padding, _columns, _table, _after = row
    b_far = o_i + cells.offset - o_n
    if cells.softcap is not None:
        b_x = tanh(b_x * (cells.scale / cells.softcap)) * (cells.softcap * LOG2E)
    else:
        b_x = b_x * (cells.scale * LOG2E)
    if cells.logit_factor is not None:
        b_x *= of_cells(cells.logit_factor, cells, row, o_n, inside)
    if cells.logit_raise is not None:
        b_x += of_cells(cells.logit_raise, cells, row, o_n, inside) * tl.abs(b_x)
    if cells.alibi is not None:
        b_x -= b_slope * tl.abs(b_far).to(tl.float32)
    if cells.bias is not None:
        b_bias = tl.load(cells.bias + o_bias + o_n.to(tl.int64) * cells.bias_strides[3], mask=inside, other=0.0)
        b_bias = b_bias.to(tl.float32)
        b_x += b_bias * LOG2E
    if cells.temperature is not None:
        b_x *= b_cool
    if cells.log_gain is not None:
        b_x += of_cells(cells.log_gain, cells, row, o_n, inside)
    if MASKED:
        seen = inside
        near = inside
        if cells.nearest is not None:
            near = near & (b_far >= cells.nearest)
        if cells.farthest is not None:
            near = near & (b_far <= cells.farthest)
        if cells.rules is not None:
            b_rule = of_cells(cells.rules, cells, row, o_n, inside)
            if cells.opens is not None:
                near = near | ((b_rule & OPENS) != 0)
            seen = seen & ((b_rule & HIDES) == 0)
        seen = seen & near
        if cells.padding is not None:
            seen = seen & (tl.load(cells.padding + o_padding + o_n, mask=inside, other=0) != 0)
        if cells.bias is not None:
            seen = seen & (b_bias > cells.bias_floor)
        b_x = tl.where(seen, b_x, HIDDEN)
    if cells.within is not None:
        b_x = reweighted(b_x, cells, row, o_i, o_n, inside)
    return b_x


@triton.jit
def weight_of(b_x, b_shift, b_log, cells):
    """Turn logits into weights, given the norms of their rows.

    Where no edit acts after the softmax, no logit exceeds its row's largest. One that does is larger by rounding, which
    differs between kernels and would be a factor of 2^64 beside logits of 1e9.
    """
    b_y = b_x - b_shift
    if cells.after is None:
        b_y = tl.where(b_y > 0.0, 0.0, b_y)
    return tl.exp2(b_y - b_log)


@triton.jit
def reweighted(b_x, cells, row, o_i, o_n, inside):
    """Turn logits into logarithms of the weights after edits behind the softmax.

    They are in the same units.

    The arguments are those of `tile_logits`.
    """
    if cells.layout is not None:
        _slope, _cool, _bias, _padding, _columns, _table, after = row
        b_level, b_top, b_state = after
        if cells.layout == UNIFORM:
            b_new = b_level + tl.zeros_like(b_x)
        elif cells.layout == IDENTITY:
            b_new = tl.where(o_i + cells.offset == o_n, b_level, ZERO)
        elif cells.layout == REVERSED:
            b_below = b_top - b_x
            some = b_below > EQUAL * (1.0 + tl.abs(b_top))
            b_left = b_top + tl.log2(1.0 - tl.exp2(-tl.where(some, b_below, 1.0)))
            b_new = tl.where(some, b_level + b_left, ZERO)
        else:
            b_word = mix(mix(o_n.to(tl.uint32)) ^ b_state)
            b_new = b_level + tl.log2(((b_word >> DROPPED).to(tl.float32) + 0.5) * UNIT)
        b_x = tl.where((b_x > LOWEST) & (b_level < ALONE), b_new, b_x)
    if cells.weight_gain is not None:
        b_x += of_cells(cells.weight_gain, cells, row, o_n, inside)
        b_x = tl.where(b_x > LOWEST, tl.maximum(b_x, ZERO), b_x)  # all weights of 0 get the same logarithm
    return b_x
