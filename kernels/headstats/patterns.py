"""The pattern itself, as far as it can be shown: exact rows, pooled maps, mass between segments.

All are rebuilt from q and k, tile by tile as the blocked backend does, whatever backend ran. No M x N pattern is
held: memory is that of the result and of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import torch

from headstats.blocked import tiles
from headstats.blocked.rows import softmax
from headstats.blocked.tiles import (
    Tile,
    by_group,
    keys_and_values,
    logits,
    pattern_keys,
    queries,
    query_heads,
)
from headstats.call import Call, heads_apart, part
from headstats.edit import Edit
from headstats.spec import StatSpec
from headstats.stats import members
from headstats.validate.call import make_call
from headstats.validate.edit import ACTING
from headstats.validate.keys import integers, same_device

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Bool, Float, Int, Shaped
    from torch import Tensor


class How(TypedDict, total=False):
    """The arguments of `attend` that shape its weights, of the same meaning. Give those that the call was given."""

    causal: bool
    window: int | None
    softcap: float | None
    scale: float | None
    bias: Float[Tensor, "#B #H #M #N"] | None
    alibi: Float[Tensor, " H"] | None
    sinks: Float[Tensor, " H"] | None
    q_segments: Int[Tensor, "#B M"] | None
    k_segments: Int[Tensor, "#B N"] | None
    segment_mask: Bool[Tensor, "#B #H Sq Sk"] | None
    segment_open: Bool[Tensor, "#B #H Sq Sk"] | None
    key_padding: Bool[Tensor, "B N"] | None
    query_padding: Bool[Tensor, "B M"] | None
    prefix: tuple[Tensor, Tensor] | None
    edit: Edit | None


class PooledPattern(NamedTuple):
    """A pattern at lower resolution. Bin r of the queries holds query_edges[r] <= i < query_edges[r + 1]."""

    values: Float[Tensor, "B H Rq Rk"]
    query_edges: Int[Tensor, " Rq+1"]
    key_edges: Int[Tensor, " Rk+1"]


Pooling = Literal["mean", "mean_visible", "max", "sum"]


@torch.no_grad()
def pattern_rows(
    q: Float[Tensor, "B H M D"],
    k: Float[Tensor, "B Hk N D"],
    lse: Float[Tensor, "B H M"] | None,
    queries: Int[Tensor, "#B R"],
    **how: Unpack[How],
) -> Float[Tensor, "B H R N"]:
    """The weights p_ij of chosen queries: rows of the pattern, exactly.

    queries: [R], the same for all batch rows, or [B, R]; -1 = none, which gives a row of zeros.
    lse: as `attend` returned it for this q, k and `how`. It is compared with that of the rows, so that arguments that
        do not belong together are refused; None: not compared.
    how: what else `attend` was given (see How). Of an edit, gate and replacement are not read: they act later.
        Values are not needed; in prefix=(k0, v0), v0 is not read.

    float32, or float64 for float64 inputs. Raises TypeError or ValueError for arguments that do not fit.
    """
    call = call_of(q, k, None, how)
    chosen = chosen_queries(queries, call)
    weights = Weights(call, lse)
    rows = call.q.new_zeros(*call.q.shape[:2], chosen.shape[1], call.n, dtype=call.dtype)
    for t, at in row_tiles(call, chosen):
        rows[t.b, :, at, t.j] = weights.of(t)[0].flatten(1, 2)
    weights.compare()
    return rows


@torch.no_grad()
def pooled_pattern(
    q: Float[Tensor, "B H M D"],
    k: Float[Tensor, "B Hk N D"],
    lse: Float[Tensor, "B H M"] | None,
    *,
    resolution: tuple[int, int],
    reduce: Pooling = "mean",
    **how: Unpack[How],
) -> PooledPattern:
    """A map of the whole pattern of each head, at most resolution[0] bins of queries by resolution[1] bins of keys.

    Bins are runs of neighbours, as equal as can be: the first M mod Rq of them are one longer. Where there are fewer
    queries or keys than bins, each is a bin of its own. Padded queries (`query_padding`) have no weight here.
    reduce: over the cells of a bin,
        "mean": sum of the weights / number of cells, hidden ones included: a density, so that mean x cells = sum
        "mean_visible": sum of the weights / number of cells that a real query sees; 0 where there is none. A bin on
            the causal diagonal is then as bright as its visible cells
        "max": the largest weight: no spike is lost, however narrow
        "sum": sum of the weights; over all bins of keys, that is the number of queries in the bin
    lse, how: as in `pattern_rows`.
    """
    call = call_of(q, k, None, how)
    reach = _resolution(resolution, call)
    if reduce not in ("mean", "mean_visible", "max", "sum"):
        raise ValueError(f"reduce={reduce!r}: one of 'mean', 'mean_visible', 'max', 'sum' expected")
    weights, m = Weights(call, lse), call.q.shape[2]
    sizes = [_bin_sizes(count, bins, call) for count, bins in zip((m, call.n), reach, strict=True)]
    bin_of = torch.arange(reach[0], device=q.device).repeat_interleave(sizes[0])
    shape = (q.shape[0], call.k.shape[1], call.groups, *reach)
    pooled, seen = (q.new_zeros(shape, dtype=call.dtype) for _ in range(2))
    for t in tiles.tiles(call):
        p = _of_real_queries(call, t, weights.of(t)[0])
        found = _pool_keys(p, call.n, reach[1], t.j, reduce == "max")
        if reduce == "max":
            where = bin_of[t.i, None].expand(found.shape)
            pooled[t.b, t.h].scatter_reduce_(3, where, found, "amax")
            continue
        pooled[t.b, t.h].index_add_(3, bin_of[t.i], found)
        if reduce == "mean_visible":
            visible = by_group(call, call.visible(t.i, t.j, t.b, query_heads(call, t))).to(p.dtype)
            count = _pool_keys(_of_real_queries(call, t, visible), call.n, reach[1], t.j, False)
            seen[t.b, t.h].index_add_(3, bin_of[t.i], count.expand(found.shape))
    weights.compare()
    if reduce == "mean":
        pooled /= sizes[0][:, None] * sizes[1]
    elif reduce == "mean_visible":
        pooled /= seen.clamp_min(1)
    edges = [torch.nn.functional.pad(x.cumsum(0), (1, 0)) for x in sizes]
    return PooledPattern(pooled.flatten(1, 2), *edges)


@torch.no_grad()
def segment_mass(
    q: Float[Tensor, "B H M D"],
    k: Float[Tensor, "B Hk N D"],
    lse: Float[Tensor, "B H M"] | None,
    from_segments: Int[Tensor, "#B M"],
    to_segments: Int[Tensor, "#B N"],
    *,
    reduce: Literal["mass", "mean"] = "mass",
    **how: Unpack[How],
) -> Float[Tensor, "B H S T"]:
    """How much the queries of a segment read from the keys of a segment.

    from_segments, to_segments: number of the segment of each query and key, 0, 1, ...; -1 = in none. They need not be
        those of the masks (q_segments, k_segments).
    reduce: "mass": mean over the queries of s of sum_{j in t} p_ij: a share of their attention, in [0, 1].
        "mean": mean of p_ij over the cells of s x t, hidden ones included, that is, mass / number of keys in t: the
        block mean of Thought Anchors (arXiv 2506.19143), from which vertical scores are made.
    Queries that are padded or see no key, and padded keys, are not counted; a segment without members gives 0.
    lse, how: as in `pattern_rows`.
    """
    call = call_of(q, k, None, how)
    if reduce not in ("mass", "mean"):
        raise ValueError(f"reduce={reduce!r}: 'mass' or 'mean' expected")
    pairs = SegmentPairs(call, from_segments, to_segments)
    weights, total = Weights(call, lse), pairs.space()
    count = total.new_zeros(total.shape[:-1])
    for t in tiles.tiles(call):
        p, seen = weights.of(t)
        pairs.add(total, t, _of_real_queries(call, t, p))
        count[t.b, t.h] += pairs.of_queries(t, _of_real_queries(call, t, seen[..., None].to(p.dtype)))[..., 0]
    weights.compare()
    total /= count.clamp_min(1)[..., None]
    if reduce == "mean":
        real = pairs.to if call.key_padding is None else pairs.to * call.key_padding[..., None]
        total /= real.sum(1).clamp_min(1)[:, None, None, None]
    return total.flatten(1, 2)


def call_of(q: Tensor, k: Tensor, v: Tensor | None, how: How) -> Call:
    """The validated call, without statistics and without what an edit does after the weights."""
    if unknown := sorted(set(how) - set(How.__annotations__)):
        allowed = ", ".join(How.__annotations__)
        raise TypeError(f"{', '.join(unknown)}: of attend's arguments these shape its weights: {allowed}")
    arguments: dict[str, Any] = dict(how)
    edit = arguments.get("edit")
    if v is None:  # nothing reads values: keys stand in for them
        v, prefix = k, arguments.get("prefix")
        if isinstance(prefix, tuple | list) and len(prefix) == 2:
            arguments["prefix"] = (prefix[0], prefix[0])
        if isinstance(edit, Edit):
            edit = replace(edit, gate=None, replacement=None)
    if isinstance(edit, Edit):
        acts = any(getattr(edit, name) is not None for name in ACTING)
        arguments["edit"] = replace(edit, report_mass=False) if acts else None
    return make_call(q, k, v, **arguments, spec=StatSpec.none())


class Weights:
    """The weights of a call, tile by tile, and whether its rows have the lse that was given."""

    def __init__(self, call: Call, lse: Tensor | None):
        self.call, self.lse = call, None
        (self.k, self.v), self.other = keys_and_values(call), pattern_keys(call)
        self.gap = call.q.new_zeros((), dtype=call.dtype)
        if lse is not None:
            same_device("lse", lse, call.q)
            if lse.shape != call.q.shape[:3]:
                raise ValueError(f"lse has shape {list(lse.shape)}: [B, H, M] = {list(call.q.shape[:3])} expected")
            self.lse = heads_apart(call, lse)

    def of(self, t: Tile) -> tuple[Float[Tensor, "b h g m n"], Bool[Tensor, "b h g m"]]:
        """p of a tile, and which of its queries see a key."""
        call = self.call
        s, _ = logits(call, t, queries(call, t, call.q), self.k, self.other)
        row = softmax(call, t, s, keep=False, room=None)
        if self.lse is not None:
            given = self.lse[t.b, t.h, :, t.i]
            # Both are -inf in an empty row, and their difference is not a number.
            away = (row.lse - given).abs().nan_to_num(nan=0.0) - 1e-5 * given.abs().nan_to_num(posinf=0.0)
            self.gap = torch.maximum(self.gap, away.amax())
        seen = row.where_empty(torch.ones_like(row.lse, dtype=torch.bool), False)
        return row.e.mul_(row.inverse[..., None]), seen

    def compare(self) -> None:
        """Raises if some row's lse was another than the given one. Once for all tiles: a GPU is waited for."""
        if self.gap > 0.02:  # rounding, of half-precision kernels too, is far below; another mask is far above
            raise ValueError(
                f"lse is not that of these q, k and arguments: it differs by up to {float(self.gap):.3g} nats. Pass "
                "the lse of the same call, and to this function what attend was given (causal, window, edit, ...)"
            )


class SegmentPairs:
    """Sums of cells by pair (segment of the query, segment of the key)."""

    def __init__(self, call: Call, from_segments: Any, to_segments: Any):
        b, m, dtype = call.q.shape[0], call.q.shape[2], call.dtype
        for name, ids in (("from_segments", from_segments), ("to_segments", to_segments)):
            same_device(name, ids, call.q, floating=False)
        rows = integers("from_segments", from_segments, (b, m), call.q, "M", limit=None)
        columns = integers("to_segments", to_segments, (b, call.n), call.q, "N", limit=None)
        assert rows is not None and columns is not None  # since they are tensors
        self.call = call
        self.rows = members(rows, int(rows.max()) + 1, dtype)  # [#B, M, S]
        self.to = members(columns, int(columns.max()) + 1, dtype)  # [#B, N, T]

    def space(self) -> Float[Tensor, "B Hk G S T"]:
        """Zeros to add to."""
        b, hk = self.call.q.shape[0], self.call.k.shape[1]
        return self.to.new_zeros(b, hk, self.call.groups, self.rows.shape[2], self.to.shape[2])

    def of_queries(self, t: Tile, x: Float[Tensor, "b h g m T"]) -> Float[Tensor, "b h g S T"]:
        """Sums over the queries of each segment."""
        return part(self.rows, t.b)[:, None, None, t.i].mT @ x

    def add(self, total: Float[Tensor, "B Hk G S T"], t: Tile, x: Float[Tensor, "b h g m n"]) -> None:
        """Adds a tile's cells."""
        to = part(self.to, t.b)[:, t.j]
        total[t.b, t.h] += self.of_queries(t, x @ (to[0] if len(to) == 1 else to[:, None, None]))


def chosen_queries(queries: Any, call: Call) -> Int[Tensor, "#B R"]:
    """Checked, with a batch axis."""
    same_device("queries", queries, call.q, floating=False)
    ids = integers("queries", queries, (call.q.shape[0], -1), call.q, "R", limit=call.q.shape[2])
    assert ids is not None  # since it is a tensor
    return ids


def row_tiles(call: Call, chosen: Int[Tensor, "#B R"]) -> Iterator[tuple[Tile, slice]]:
    """Tiles that hold runs of chosen queries, of all heads, and where in the list the run stands."""
    nb, h = call.q.shape[:2]
    apart = len(chosen) > 1 or call.prefix_k is not None  # a tile with a prefix holds one head or one batch row
    batch = [slice(b, b + 1) for b in range(nb)] if apart else [slice(0, nb)]
    longest = max(1, tiles.CELLS // ((1 if apart else nb) * h * call.n))
    lists = chosen.tolist()
    for row, b in enumerate(batch):
        wanted, start = lists[row % len(lists)], 0
        while start < len(wanted):
            stop, first = start + 1, wanted[start]
            while stop < len(wanted) and stop - start < longest and wanted[stop] == first + stop - start and first >= 0:
                stop += 1
            if first >= 0:
                i = slice(first, first + stop - start)
                yield Tile(b, slice(0, call.k.shape[1]), i, slice(*call.keys_seen(i.start, i.stop))), slice(start, stop)
            start = stop


def _resolution(resolution: Any, call: Call) -> tuple[int, int]:
    whole = isinstance(resolution, tuple | list) and len(resolution) == 2
    if not whole or not all(type(x) is int and x >= 1 for x in resolution):
        raise ValueError(f"resolution={resolution!r}: two ints >= 1 expected, bins of queries and bins of keys")
    return min(resolution[0], call.q.shape[2]), min(resolution[1], call.n)


def _bin_sizes(count: int, bins: int, call: Call) -> Int[Tensor, " bins"]:
    return count // bins + (torch.arange(bins, device=call.q.device) < count % bins)


def _of_real_queries(call: Call, t: Tile, x: Shaped[Tensor, "b h g m n"]) -> Shaped[Tensor, "b h g m n"]:
    """x, with zeros for padded queries."""
    return x if call.query_padding is None else x * call.query_padding[t.b, None, None, t.i, None]


def _pool_keys(
    x: Float[Tensor, "*lead m n"], whole: int, bins: int, held: slice, largest: bool
) -> Float[Tensor, "*lead m bins"]:
    """Sum or maximum over bins of the whole axis, of which x holds a part: the rest are zeros."""
    x = torch.nn.functional.pad(x, (held.start, whole - held.stop))
    width, longer = divmod(whole, bins)
    cut = longer * (width + 1)  # the longer bins come first: two regular grids
    runs = (x[..., :cut].unflatten(-1, (longer, width + 1)), x[..., cut:].unflatten(-1, (bins - longer, width)))
    return torch.cat([run.amax(-1) if largest else run.sum(-1) for run in runs], -1)
