"""Fast forms of statistics on whole rows in a tile, and means over all tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from headstats.blocked.rows import TileSoftmax, first_maximum, to_pattern
from headstats.blocked.tiles import CELLS, Tile, group_heads, mix_values
from headstats.call import HIDDEN, LOG2E, Call, slice_axis
from headstats.stats import BY_NAME, Result, TopK, Value, map_tensors, segment_members

if TYPE_CHECKING:
    from jaxtyping import Float, Shaped
    from torch import Tensor


def keeps_logits(call: Call) -> bool:
    """Whether some statistic needs more than the weights, so that logits must be kept."""
    return any(name in NEEDS_LOGITS or name not in FAST for name in call.spec.requested())


def statistic(call: Call, t: Tile, row: TileSoftmax, name: str, value: Value) -> Result:
    """Compute a statistic of a tile.

    Its fast form is used if it has one, else its definition on the tile's pattern.
    """
    stat = BY_NAME[name]
    result = FAST[name](call, t, row, value) if name in FAST else stat.dense(to_pattern(call, t, row), value)
    if stat.axis == "key" or isinstance(result, TopK):
        return result
    return map_tensors(result, lambda x: row.where_empty(x, stat.empty))


def _entropy(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    # -sum p log2 p with p = e * inverse and log2 p = x - log_total
    assert row.ex is not None  # summed by softmax, since an entropy is requested
    return (row.mass * row.log_total).sub_(row.ex).mul_(row.inverse).mul_(1 / LOG2E)


def _entropy_normalised(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    assert row.x is not None
    most = (row.is_visible | row.x.isnan()).sum(-1).clamp_min(1).to(row.e.dtype).log()
    return torch.where(most > 0, _entropy(call, t, row, _) / most.clamp_min(0.5), 0.0)


def _argmax(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    assert row.argmax is not None  # computed by softmax, since it is requested
    return (row.argmax + t.j.start).masked_fill_(row.top.isnan(), -1)


def _max_prob(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    return torch.exp2(row.top) * row.inverse


def _topk(call: Call, t: Tile, row: TileSoftmax, k: int) -> TopK:
    # Largest, next largest, ...: unlike torch.topk this settles ties, and a maximum is cheap.
    assert row.x is not None
    x = row.x.clone()
    values, indices = x.new_zeros(*x.shape[:-1], k), x.new_full((*x.shape[:-1], k), -1, dtype=torch.int64)
    for place in range(min(k, x.shape[-1])):
        top, at = first_maximum(x)
        values[..., place] = torch.exp2(top) * row.inverse
        indices[..., place] = torch.where(top > row.floor, at + t.j.start, -1)
        x.scatter_(-1, at[..., None], HIDDEN)
    return TopK(values, indices)


def _participation(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    return row.e.square().sum(-1) * row.inverse.square()


def _effective(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    e, mass = row.e, row.mass
    if call.may_lose_mass:  # all weights may be tiny, and their squares would underflow
        up = torch.exp2(-row.top.clamp(min=-100))
        e, mass = e * up[..., None], mass * up
    return mass.square() / e.square().sum(-1).clamp_min(torch.finfo(e.dtype).tiny)


def _distance(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    return _weighted_distance(call, t, row).mul_(row.inverse)


def _weighted_distance(call: Call, t: Tile, row: TileSoftmax) -> Tensor:
    # i + N - M - j = the query's place in the tile + the distance from the tile's first query
    (m, n), first = row.e.shape[-2:], t.i.start + call.offset - t.j.start
    back = torch.arange(first, first - n, -1, device=row.e.device, dtype=row.e.dtype)
    place = torch.arange(m, device=row.e.device, dtype=row.e.dtype)
    return (row.e @ back).addcmul_(place, row.mass)


def _distances(call: Call, t: Tile, like: Tensor) -> Float[Tensor, "m n"]:
    return call.distances(t.i.start, t.i.stop, t.j.start, t.j.stop).to(like.dtype)


def _distance_var(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    # About the mean, not from raw moments; the second term removes the rounding error of the mean.
    per_mass = row.mass.clamp_min(torch.finfo(row.e.dtype).tiny).reciprocal()
    away = _distances(call, t, row.e) - (_weighted_distance(call, t, row) * per_mass)[..., None]
    weighted = row.e * away
    residual = weighted.sum(-1) * per_mass
    return (weighted.mul_(away).sum(-1) * per_mass - residual.square()).clamp_min(0)


def _waad(call: Call, t: Tile, row: TileSoftmax, window: int) -> Tensor:
    return (row.e * _distances(call, t, row.e).abs_().clamp_(max=window)).sum(-1) * row.inverse


def _local(call: Call, t: Tile, row: TileSoftmax, window: int) -> Tensor:
    near = _distances(call, t, row.e).abs_() < window
    return (row.e * near).sum(-1) * row.inverse


def _sink(call: Call, t: Tile, row: TileSoftmax, k: int) -> Tensor:
    if call.key_padding is None:
        return row.e[..., : max(0, k - t.j.start)].sum(-1) * row.inverse
    first = call.key_rank()[t.b, t.j] < k
    return (row.e * first[:, None, None, None]).sum(-1) * row.inverse


def _at_distance(d: int) -> Callable[[Call, Tile, TileSoftmax, Any], Tensor]:
    def probe(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
        start = t.i.start + call.offset - d - t.j.start  # column of the key at this distance in the tile's first row
        m, n = row.e.shape[-2:]
        result = torch.zeros_like(row.mass)
        i0, i1 = max(0, -start), min(m, n - start)
        if i0 < i1:
            result[..., i0:i1] = row.e.diagonal(start, -2, -1)
        return result.mul_(row.inverse)

    return probe


def _per_key(row: TileSoftmax, w: Float[Tensor, "#b n F"]) -> Tensor:
    """Return sum_j p_ij w_jf."""
    if w.shape[0] == 1:
        total = row.e @ w[0]
    else:
        total = torch.bmm(row.e.flatten(1, 3), w).view(*row.e.shape[:-1], -1)
    return total.mul_(row.inverse[..., None])


def _segments(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    assert call.k_segments is not None  # validated
    return _per_key(row, segment_members(slice_axis(call.k_segments, t.b)[:, t.j], call.n_segments, row.e.dtype))


def _segment_value_norms(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    assert call.k_segments is not None and row.v is not None
    inside = segment_members(slice_axis(call.k_segments, t.b)[:, t.j], call.n_segments, row.e.dtype)
    total = row.e.new_zeros(*row.e.shape[:-1], call.n_segments)
    for columns, v in row.v.parts(t):
        weights = v.norm(dim=-1, keepdim=True) * inside[:, None, columns]
        total += row.e[..., columns] @ weights[:, :, None]
    return total.mul_(row.inverse[..., None])


def _segment_outputs(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    assert call.k_segments is not None and row.v is not None
    ids = slice_axis(call.k_segments, t.b)[:, t.j]
    total = row.e.new_zeros(*row.e.shape[:-1], call.n_segments, row.v.own.shape[-1])
    for s in range(call.n_segments):
        inside = ids == s
        where = inside.any(0).nonzero()
        if len(where) == 0:
            continue
        lo, hi = int(where[0]), int(where[-1]) + 1  # a segment is usually one run of keys
        weights = row.e[..., lo:hi] * inside[:, None, None, None, lo:hi]
        run = replace(t, j=slice(t.j.start + lo, t.j.start + hi))
        total[..., s, :] = mix_values(weights, row.v, run)
    return total.mul_(row.inverse[..., None, None])


def _key_features(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    assert call.key_features is not None  # validated
    return _per_key(row, slice_axis(call.key_features.detach(), t.b)[:, t.j].to(row.e.dtype))


def _targets(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    assert call.targets is not None  # validated
    n = row.e.shape[-1]
    columns = slice_axis(call.targets, t.b)[:, None, None, t.i] - t.j.start  # -1 (none) and keys not seen are outside
    columns = columns.expand(*row.e.shape[:-1], -1)
    if n == 0:
        return row.e.new_zeros(columns.shape)
    weights = row.e.gather(-1, columns.clamp(0, n - 1)) * row.inverse[..., None]
    return weights.masked_fill_((columns < 0) | (columns >= n), 0)


def _value_norm(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    assert row.z is not None  # set after the product with v
    return row.z.norm(dim=-1) * row.inverse


def _column_weights(call: Call, t: Tile, row: TileSoftmax) -> Tensor:
    """Return the factors of e in sums of p over real queries."""
    return row.inverse if call.query_padding is None else row.inverse * call.query_padding[t.b, None, None, t.i]


def _of_real(call: Call, t: Tile, row: TileSoftmax) -> Tensor:
    """Return e, without NaN of padded queries: their factor 0 would keep it."""
    if call.query_padding is None or not bool(row.mass.isnan().any()):
        return row.e
    return torch.where(call.query_padding[t.b, None, None, t.i, None], row.e, 0)


def _received(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    return (_column_weights(call, t, row)[..., None, :] @ _of_real(call, t, row))[..., 0, :]


def _received_max(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    return (_of_real(call, t, row) * _column_weights(call, t, row)[..., None]).amax(-2)


def _fai(call: Call, t: Tile, row: TileSoftmax, horizon: tuple[int, int]) -> Tensor:
    d = _distances(call, t, row.e)
    counted = torch.where((d >= horizon[0]) & (d <= horizon[1]), _of_real(call, t, row), 0)
    return (_column_weights(call, t, row)[..., None, :] @ counted)[..., 0, :]


def _column_norm(call: Call, t: Tile, row: TileSoftmax, _) -> Tensor:
    weights = row.where_empty(_column_weights(call, t, row), 0)  # there, weights are 1 / tiny, whose square is infinite
    return (weights.square()[..., None, :] @ _of_real(call, t, row).square())[..., 0, :]


FAST: dict[str, Callable[[Call, Tile, TileSoftmax, Any], Result]] = {
    "entropy": _entropy,
    "entropy_normalised": _entropy_normalised,
    "max_prob": _max_prob,
    "argmax": _argmax,
    "topk": _topk,
    "participation": _participation,
    "effective_keys": _effective,
    "distance": _distance,
    "distance_var": _distance_var,
    "waad": _waad,
    "sink": _sink,
    "diagonal": _at_distance(0),
    "previous": _at_distance(1),
    "local": _local,
    "segments": _segments,
    "targets": _targets,
    "key_features": _key_features,
    "value_norm": _value_norm,
    "segment_value_norms": _segment_value_norms,
    "segment_outputs": _segment_outputs,
    "received": _received,
    "received_max": _received_max,
    "fai": _fai,
    "column_norm": _column_norm,
}
NEEDS_LOGITS = {"entropy_normalised", "topk"}


def mean_over_queries(call: Call, total: Shaped[Tensor, "B Hk G N"], name: str, value: Value) -> Tensor:
    """Divide column sums by the number of real queries that count for the column."""
    stat = BY_NAME[name]
    count = total.new_zeros(total.shape)
    m, n = call.q.shape[2], call.n
    tables = (call.bias, call.segment_mask, call.segment_open, call.knockout, call.gain)
    wide = total[..., 0].numel() if any(x is not None for x in tables) else 1
    step = max(1, CELLS // 4 // (n * wide))
    for i in range(0, m, step):
        rows = slice(i, min(i + step, m))
        mask = call.visible(rows, slice(0, n))
        if call.query_padding is not None:
            mask = mask & call.query_padding[:, None, rows, None]
        seen = stat.among(mask, call.distances(rows.start, rows.stop, 0, n), value).sum(-2)
        count += group_heads(call, seen)
    return torch.where(count > 0, total / count.clamp_min(1), stat.empty)
