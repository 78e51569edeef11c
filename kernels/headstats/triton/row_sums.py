"""Triton: the running sums of a tile of queries.

They are started, updated by tiles of keys, and turned into statistics.

`stats` and `ends` are `kernel_arguments.Outputs` and `kernel_arguments.RowTerms`. A field that is None there compiles
to no instruction.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportAttributeAccessIssue=false
# (calls between kernels pass Python constants for tl.constexpr)

import triton
import triton.language as tl

from headstats.triton.tile_scores import HIDDEN, LN2, LOG2E, LOWEST

TINY = tl.constexpr(1e-37)


@triton.jit
def no_sums(BM: tl.constexpr, BDV: tl.constexpr, BF: tl.constexpr):
    """Return the sums over no keys.

    In order: products with values; running maximum m and normaliser l; the same before gains that act after the
    softmax; then entropy term, place of the maximum, distances, squared deviations of distance, squared weights,
    visible keys, mass within the local window, clipped distances; products with features.
    """
    b_o = tl.zeros([BM, BDV], tl.float32)
    b_f = tl.zeros([BM, BF], tl.float32)
    b_m = tl.full([BM], LOWEST, tl.float32)
    b_zero = tl.zeros([BM], tl.float32)
    b_at = tl.full([BM], -1, tl.int32)
    b_count = tl.zeros([BM], tl.int32)
    b_seven = (b_zero, b_at, b_zero, b_zero, b_zero, b_count, b_zero, b_zero)
    return b_o, (b_m, b_zero), (b_m, b_zero), b_seven, b_f


@triton.jit
def add_weights(softmax, b_x):
    """Add a tile of logits to a running maximum and normaliser."""
    b_m, b_l = softmax
    b_new = tl.maximum(b_m, tl.max(b_x, 1))
    return b_new, b_l * tl.exp2(b_m - b_new) + tl.sum(tl.exp2(b_x - b_new[:, None]), 1)


@triton.jit
def add_tile(
    softmax, others, stats, b_x, b_near, b_place, b_far, i_n, first, n, MASKED: tl.constexpr, FLAT: tl.constexpr
):
    """Add a tile of logits to all sums except products.

    For products, it returns the tile's weights and the factor of old sums.

    i_n, first, n, FLAT: the place of the tile, as in `forward.visit_keys`; n: keys of a batch row in this region.
    b_near [BM] - b_place [1, BN] or [BM, BN] is the distance of query and key as a float, b_far the same as an integer.
    """
    b_m, b_l = softmax
    b_t, b_a, b_d, b_s, b_p, b_n, b_local, b_close = others
    if stats.argmax is not None:
        b_top, b_at = tl.max(b_x, 1, return_indices=True, return_indices_tie_break_left=True)
        b_at = first + ((i_n + b_at) % n if FLAT else i_n + b_at)
        b_a = tl.where(b_top > b_m, b_at, b_a)  # strictly greater: ties go to the leftmost key
    else:
        b_top = tl.max(b_x, 1)
    if stats.entropy_normalised is not None:
        b_n += tl.sum(tl.where(b_x <= LOWEST, 0, 1), 1) if MASKED else b_x.shape[1]
    b_new = tl.maximum(b_m, b_top)
    b_alpha = tl.exp2(b_m - b_new)
    b_x = b_x - b_new[:, None]
    b_w = tl.exp2(b_x)
    b_sum = tl.sum(b_w, 1)
    if (stats.entropy is not None) or (stats.entropy_normalised is not None):
        b_t = b_alpha * (b_t + (b_m - b_new) * b_l) + tl.sum(b_w * tl.where(b_x < HIDDEN, HIDDEN, b_x), 1)
    if (stats.distance is not None) or (stats.distance_var is not None):
        # Places inside the tile are small numbers: subtracting positions after summing would lose digits.
        b_first = tl.sum(b_w * b_place, 1)
        if stats.distance_var is not None:
            b_mean = b_first / tl.maximum(b_sum, TINY)
            b_off = b_place - b_mean[:, None]
            b_gap = b_near - b_mean - b_d / tl.maximum(b_l, TINY)  # from the mean so far to the tile's
            b_old = b_alpha * b_l
            b_s = b_alpha * b_s + tl.sum(b_w * b_off * b_off, 1)
            b_s += b_gap * b_gap * (b_old * (b_sum / tl.maximum(b_old + b_sum, TINY)))
        b_d = b_alpha * b_d + b_near * b_sum - b_first
    if (stats.participation is not None) or (stats.effective_keys is not None):
        b_p = b_alpha * b_alpha * b_p + tl.sum(b_w * b_w, 1)
    if stats.local is not None:
        b_local *= b_alpha
        if MASKED:
            b_local += tl.sum(tl.where(tl.abs(b_far) < stats.local_window, b_w, 0.0), 1)
    if stats.waad is not None:
        b_close *= b_alpha  # no term is subtracted from another, which would lose digits for a large window
        if MASKED:
            b_short = tl.minimum(tl.abs(b_far), stats.waad_window)
            b_close += tl.sum(b_w * b_short.to(tl.float32), 1)
        else:
            b_close += b_sum * stats.waad_window
    others = b_t, b_a, b_d, b_s, b_p, b_n, b_local, b_close
    return (b_new, b_alpha * b_l + b_sum), others, b_w, b_alpha


@triton.jit
def normalise(softmax, before, ends, cells, b_cool, i_h, BM: tl.constexpr):
    """Return (empty, shift, log2 of the normaliser, inverse).

    A weight is 2^(x - m) * inverse. A learned sink is included.

    before: maximum and normaliser before gains after the softmax, which do not change it.  empty: no key is visible.
    """
    b_m, b_l = softmax
    b_shift, b_total = softmax
    if cells.after is not None:
        b_shift, b_total = before
    empty = b_total == 0.0
    if ends.sinks is not None:
        b_sink = tl.load(ends.sinks + i_h).to(tl.float32) * LOG2E
        if cells.temperature is not None:
            b_sink = b_sink * tl.reshape(b_cool, [BM])
        b_high = tl.maximum(b_shift, b_sink)
        b_total = b_total * tl.exp2(b_shift - b_high) + tl.exp2(b_sink - b_high)
        b_shift = b_high
    b_scale = 1.0
    if (cells.after is not None) or (ends.sinks is not None):
        b_scale = tl.where(b_l == 0.0, 0.0, tl.exp2(b_m - b_shift))
    b_inv = tl.where(empty, 0.0, b_scale / tl.where(empty, 1.0, b_total))
    return empty, b_shift, tl.log2(tl.where(empty, 1.0, b_total)), b_inv


@triton.jit
def store_statistics(stats, softmax, others, b_o, b_f, norm, o_row, rows, BF: tl.constexpr):
    """Store the statistics of each query. norm: from `normalise`.

    o_row: the query's place among [B, H, M].
    """
    b_m, b_l = softmax
    b_t, b_a, b_d, b_s, b_p, b_n, b_local, b_close = others
    _empty, b_shift, b_log, b_inv = norm
    if (stats.entropy is not None) or (stats.entropy_normalised is not None):
        # -sum p log2 p with log2 p = (x - m) + (m - shift) - log2 total
        b_h = tl.where(b_l == 0.0, 0.0, b_inv * (b_l * ((b_shift - b_m) + b_log) - b_t)) * LN2
        if stats.entropy is not None:
            tl.store(stats.entropy + o_row, b_h, mask=rows)
        if stats.entropy_normalised is not None:
            b_most = tl.log2(tl.maximum(b_n, 1).to(tl.float32)) * LN2
            tl.store(stats.entropy_normalised + o_row, tl.where(b_n > 1, b_h / tl.maximum(b_most, 0.5), 0.0), mask=rows)
    if stats.max_prob is not None:
        tl.store(stats.max_prob + o_row, b_inv, mask=rows)
    if stats.argmax is not None:
        tl.store(stats.argmax + o_row, tl.where(b_inv == b_inv, b_a, -1).to(tl.int64), mask=rows)
    if stats.distance is not None:
        tl.store(stats.distance + o_row, b_d * b_inv, mask=rows)
    if stats.distance_var is not None:
        b_v = b_s / tl.maximum(b_l, TINY)
        tl.store(stats.distance_var + o_row, tl.where(b_inv == 0.0, 0.0, b_v), mask=rows)
    if stats.participation is not None:
        tl.store(stats.participation + o_row, b_p * b_inv * b_inv, mask=rows)
    if stats.effective_keys is not None:
        b_e = b_l * b_l / tl.maximum(b_p, TINY)
        tl.store(stats.effective_keys + o_row, tl.where(b_inv == 0.0, 0.0, b_e), mask=rows)
    if stats.local is not None:
        tl.store(stats.local + o_row, b_local * b_inv, mask=rows)
    if stats.waad is not None:
        tl.store(stats.waad + o_row, b_close * b_inv, mask=rows)
    if stats.value_norm is not None:
        tl.store(stats.value_norm + o_row, tl.sqrt(tl.sum(b_o * b_o, 1)) * b_inv, mask=rows)
    if stats.per_key is not None:
        o_f = tl.arange(0, BF)
        p_f = stats.per_key + o_row[:, None] * stats.n_features + o_f[None, :]
        tl.store(p_f, b_f * b_inv[:, None], mask=rows[:, None] & (o_f[None, :] < stats.n_features))


@triton.jit
def store_output(p_out, ends, b_o, b_inv, i_b, i_h, o_m, o_row, rows, DV: tl.constexpr, BDV: tl.constexpr):
    """Store gate * z + (1 - gate) * replacement, with z = b_o * b_inv.

    i_b: a scalar, or [BM, 1]. o_m: [BM, 1].
    """
    o_v = tl.arange(0, BDV)[None, :]
    whole = rows[:, None] & (o_v < DV)
    b_z = b_o * b_inv[:, None]
    if ends.gate is not None:
        s_b, s_h, s_m = ends.gate_strides
        p_gate = ends.gate + i_b * s_b + i_h * s_h + o_m.to(tl.int64) * s_m
        b_gate = tl.load(p_gate, mask=rows[:, None], other=0.0).to(tl.float32)
        b_z *= b_gate
        if ends.replacement is not None:
            s_b, s_h, s_m, s_v = ends.replacement_strides
            p_new = ends.replacement + i_b * s_b + i_h * s_h + o_m.to(tl.int64) * s_m + o_v * s_v
            b_z += (1.0 - b_gate) * tl.load(p_new, mask=whole, other=0.0).to(tl.float32)
    tl.store(p_out + o_row[:, None] * DV + o_v, b_z.to(p_out.dtype.element_ty), mask=whole)
