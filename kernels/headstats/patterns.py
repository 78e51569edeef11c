"""Views of the attention pattern: exact rows, pooled maps, segment mass.

All are recomputed from q and k, tile by tile like the blocked backend, whichever backend ran. No M x N pattern is
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
    group_heads,
    key_tensors,
    logits,
    pattern_keys,
    query_heads,
    tile_queries,
)
from headstats.call import Call, heads_apart, lse_of, slice_axis
from headstats.edit import Edit
from headstats.spec import StatSpec
from headstats.stats import segment_members
from headstats.validate.call import make_call
from headstats.validate.edit import ACTING
from headstats.validate.keys import check_ids, check_tensor

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Bool, Float, Int, Shaped
    from torch import Tensor


class PatternArguments(TypedDict, total=False):
    """The arguments of `attend` that shape its weights, with the same meaning.

    Pass what the call was given.
    """

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
    """A pattern at lower resolution.

    Bin r of the queries holds query_edges[r] <= i < query_edges[r + 1].
    """

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
    **how: Unpack[PatternArguments],
) -> Float[Tensor, "B H R N"]:
    """Compute the weights p_ij of some queries: exact rows of the pattern.

        r = headstats.attend(q, k, v, window=64)
        headstats.pattern_rows(q, k, r.lse, torch.tensor([0, 5]), window=64)  # [B, H, 2, N]

    queries: [R], the same for all batch rows, or [B, R]; -1 = no query, which gives a row of zeros.
    lse: as `attend` returned it for this q, k and `how`. It is compared with the lse of the rows, so that arguments
        that do not belong together are refused. None: no comparison.
    how: the other arguments of `attend` (see PatternArguments). Of an edit, gate and replacement are not read, since
        they act later. Values are not needed; in prefix=(k0, v0), v0 is not read.

    float32, or float64 for float64 inputs. Raises TypeError or ValueError for arguments that do not fit.
    """
    call = pattern_call(q, k, None, how)
    query_ids = check_queries(queries, call)
    weights = TileWeights(call, lse)
    rows = call.q.new_zeros(*call.q.shape[:2], query_ids.shape[1], call.n, dtype=call.dtype)
    for t, at in row_tiles(call, query_ids):
        rows[t.b, :, at, t.j] = weights.of(t)[0].flatten(1, 2)
    weights.compare_lse()
    return rows


@torch.no_grad()
def pooled_pattern(
    q: Float[Tensor, "B H M D"],
    k: Float[Tensor, "B Hk N D"],
    lse: Float[Tensor, "B H M"] | None,
    *,
    resolution: tuple[int, int],
    reduce: Pooling = "mean",
    **how: Unpack[PatternArguments],
) -> PooledPattern:
    """Compute a map of the whole pattern of each head at a lower resolution.

        headstats.pooled_pattern(q, k, r.lse, resolution=(256, 256), reduce="max").values  # [B, H, 256, 256]

    resolution: the largest number of bins of queries, and of keys. Bins are runs of neighbours of nearly equal size:
        the first M mod Rq of them are one longer. If there are fewer queries or keys than bins, each is its own bin.
        Padded queries (`query_padding`) have no weight here.
    reduce: over the cells of a bin,
        "mean": sum of the weights / number of cells, including hidden ones: a density, so that mean x cells = sum
        "mean_visible": sum of the weights / number of cells that a real query sees; 0 where there is none. A bin on
            the causal diagonal is then as bright as its visible cells
        "max": the largest weight, so that no spike is lost, however narrow
        "sum": sum of the weights; over all bins of keys, that is the number of queries in the bin
    lse, how: as in `pattern_rows`.
    """
    call = pattern_call(q, k, None, how)
    bins = _check_resolution(resolution, call)
    if reduce not in ("mean", "mean_visible", "max", "sum"):
        raise ValueError(f"reduce={reduce!r}: one of 'mean', 'mean_visible', 'max', 'sum' expected")
    weights, m = TileWeights(call, lse), call.q.shape[2]
    sizes = [_bin_sizes(count, n_bins, call) for count, n_bins in zip((m, call.n), bins, strict=True)]
    bin_of = torch.arange(bins[0], device=q.device).repeat_interleave(sizes[0])
    shape = (q.shape[0], call.k.shape[1], call.groups, *bins)
    pooled, seen = (q.new_zeros(shape, dtype=call.dtype) for _ in range(2))
    for t in tiles.tiles(call):
        p = _of_real_queries(call, t, weights.of(t)[0])
        by_key_bin = _pool_keys(p, call.n, bins[1], t.j, largest=reduce == "max")
        if reduce == "max":
            where = bin_of[t.i, None].expand(by_key_bin.shape)
            pooled[t.b, t.h].scatter_reduce_(3, where, by_key_bin, "amax")
            continue
        pooled[t.b, t.h].index_add_(3, bin_of[t.i], by_key_bin)
        if reduce == "mean_visible":
            visible = group_heads(call, call.visible(t.i, t.j, t.b, query_heads(call, t))).to(p.dtype)
            count = _pool_keys(_of_real_queries(call, t, visible), call.n, bins[1], t.j, largest=False)
            seen[t.b, t.h].index_add_(3, bin_of[t.i], count.expand(by_key_bin.shape))
    weights.compare_lse()
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
    **how: Unpack[PatternArguments],
) -> Float[Tensor, "B H S T"]:
    """Compute the attention from the queries of a segment to the keys of a segment.

        headstats.segment_mass(q, k, r.lse, sentence_of_query, sentence_of_key)  # [B, H, S, T]

    from_segments, to_segments: the segment number (0, 1, ...) of each query and key; -1 = in no segment. They may
        differ from those of the masks (q_segments, k_segments).
    reduce: "mass": mean over the queries of s of sum_{j in t} p_ij: a share of their attention, in [0, 1].
        "mean": mean of p_ij over the cells of s x t, including hidden ones, that is, mass / number of keys in t. This
        is the block mean of Thought Anchors (arXiv 2506.19143), from which vertical scores are computed.
    Queries that are padded or see no key, and padded keys, are not counted; a segment without members gives 0.
    lse, how: as in `pattern_rows`.
    """
    call = pattern_call(q, k, None, how)
    if reduce not in ("mass", "mean"):
        raise ValueError(f"reduce={reduce!r}: 'mass' or 'mean' expected")
    pairs = SegmentPairs(call, from_segments, to_segments)
    weights, total = TileWeights(call, lse), pairs.zeros()
    count = total.new_zeros(total.shape[:-1])
    for t in tiles.tiles(call):
        p, seen = weights.of(t)
        pairs.add(total, t, _of_real_queries(call, t, p))
        count[t.b, t.h] += pairs.of_queries(t, _of_real_queries(call, t, seen[..., None].to(p.dtype)))[..., 0]
    weights.compare_lse()
    total /= count.clamp_min(1)[..., None]
    if reduce == "mean":
        real = pairs.columns if call.key_padding is None else pairs.columns * call.key_padding[..., None]
        total /= real.sum(1).clamp_min(1)[:, None, None, None]
    return total.flatten(1, 2)


def pattern_call(q: Tensor, k: Tensor, v: Tensor | None, how: PatternArguments) -> Call:
    """Return the validated call without statistics.

    Parts of an edit that act after the weights are removed.
    """
    if unknown := sorted(set(how) - set(PatternArguments.__annotations__)):
        allowed = ", ".join(PatternArguments.__annotations__)
        raise TypeError(f"{', '.join(unknown)}: of attend's arguments these shape its weights: {allowed}")
    arguments: dict[str, Any] = dict(how)
    edit = arguments.get("edit")
    if v is None:  # values are not read: keys take their place
        v, prefix = k, arguments.get("prefix")
        if isinstance(prefix, tuple | list) and len(prefix) == 2:
            arguments["prefix"] = (prefix[0], prefix[0])
        if isinstance(edit, Edit):
            edit = replace(edit, gate=None, replacement=None)
    if isinstance(edit, Edit):
        acts = any(getattr(edit, name) is not None for name in ACTING)
        arguments["edit"] = replace(edit, report_mass=False) if acts else None
    return make_call(q, k, v, **arguments, spec=StatSpec.none())


class TileWeights:
    """The weights of a call, tile by tile.

    Their lse is compared with the given one.
    """

    def __init__(self, call: Call, lse: Tensor | None):
        self.call, self.lse = call, None
        (self.k, self.v), self.other = key_tensors(call), pattern_keys(call)
        self.gap = call.q.new_zeros((), dtype=call.dtype)
        if lse is not None:
            check_tensor("lse", lse, call.q)
            if lse.shape != call.q.shape[:3]:
                raise ValueError(f"lse has shape {list(lse.shape)}: [B, H, M] = {list(call.q.shape[:3])} expected")
            self.lse = heads_apart(call, lse)

    def of(self, t: Tile) -> tuple[Float[Tensor, "b h g m n"], Bool[Tensor, "b h g m"]]:
        """Return p of a tile, and which of its queries see a key."""
        call = self.call
        s, _ = logits(call, t, tile_queries(call, t, call.q), self.k, self.other)
        row = softmax(call, t, s, keep=False, room=None)
        if self.lse is not None:
            expected = self.lse[t.b, t.h, :, t.i]
            # Both are -inf in an empty row, and their difference is nan.
            gap = (lse_of(row.norm) - expected).abs().nan_to_num(nan=0.0) - 1e-5 * expected.abs().nan_to_num(posinf=0.0)
            self.gap = torch.maximum(self.gap, gap.amax())
        seen = ~row.empty
        return row.e.mul_(row.inverse[..., None]), seen

    def compare_lse(self) -> None:
        """Raise if the lse of some row differs from the given one.

        Called once, since it waits for a GPU.
        """
        if self.gap > 0.02:  # rounding is far below this, even of half-precision kernels; another mask is far above
            raise ValueError(
                f"lse is not that of these q, k and arguments: it differs by up to {float(self.gap):.3g} nats. Pass "
                "the lse of the same call, and to this function what attend was given (causal, window, edit, ...)"
            )


class SegmentPairs:
    """Sums of cells by pair (segment of the query, segment of the key)."""

    def __init__(self, call: Call, from_segments: Any, to_segments: Any):
        b, m, dtype = call.q.shape[0], call.q.shape[2], call.dtype
        for name, ids in (("from_segments", from_segments), ("to_segments", to_segments)):
            check_tensor(name, ids, call.q, floating=False)
        rows = check_ids("from_segments", from_segments, (b, m), call.q, "M", limit=None)
        columns = check_ids("to_segments", to_segments, (b, call.n), call.q, "N", limit=None)
        assert rows is not None and columns is not None  # both are tensors
        self.call = call
        self.rows = segment_members(rows, int(rows.max()) + 1, dtype)  # [#B, M, S]
        self.columns = segment_members(columns, int(columns.max()) + 1, dtype)  # [#B, N, T]

    def zeros(self) -> Float[Tensor, "B Hk G S T"]:
        """Return zeros to add sums to."""
        b, hk = self.call.q.shape[0], self.call.k.shape[1]
        return self.columns.new_zeros(b, hk, self.call.groups, self.rows.shape[2], self.columns.shape[2])

    def of_queries(self, t: Tile, x: Float[Tensor, "b h g m T"]) -> Float[Tensor, "b h g S T"]:
        """Sum over the queries of each segment."""
        return slice_axis(self.rows, t.b)[:, None, None, t.i].mT @ x

    def add(self, total: Float[Tensor, "B Hk G S T"], t: Tile, x: Float[Tensor, "b h g m n"]) -> None:
        """Add the cells of a tile to the total."""
        columns = slice_axis(self.columns, t.b)[:, t.j]
        total[t.b, t.h] += self.of_queries(t, x @ (columns[0] if len(columns) == 1 else columns[:, None, None]))


def check_queries(queries: Any, call: Call) -> Int[Tensor, "#B R"]:
    """Check the ids of queries and return them with a batch axis."""
    check_tensor("queries", queries, call.q, floating=False)
    ids = check_ids("queries", queries, (call.q.shape[0], -1), call.q, "R", limit=call.q.shape[2])
    assert ids is not None  # queries is a tensor
    return ids


def row_tiles(call: Call, query_ids: Int[Tensor, "#B R"]) -> Iterator[tuple[Tile, slice]]:
    """Yield tiles of runs of the listed queries, with all heads.

    The second item is the range of the run in the list.
    """
    nb, h = call.q.shape[:2]
    separate = len(query_ids) > 1 or call.prefix_k is not None  # a tile with a prefix holds one head or one batch row
    batch = [slice(b, b + 1) for b in range(nb)] if separate else [slice(0, nb)]
    longest = max(1, tiles.CELLS // ((1 if separate else nb) * h * call.n))
    lists = query_ids.tolist()
    for row, b in enumerate(batch):
        ids, start = lists[row % len(lists)], 0
        while start < len(ids):
            stop, first = start + 1, ids[start]
            while stop < len(ids) and stop - start < longest and ids[stop] == first + stop - start and first >= 0:
                stop += 1
            if first >= 0:
                i = slice(first, first + stop - start)
                tile = Tile(b, slice(0, call.k.shape[1]), i, slice(*call.visible_range(i.start, i.stop)))
                yield tile, slice(start, stop)
            start = stop


def _check_resolution(resolution: Any, call: Call) -> tuple[int, int]:
    is_pair = isinstance(resolution, tuple | list) and len(resolution) == 2
    if not is_pair or not all(type(x) is int and x >= 1 for x in resolution):
        raise ValueError(f"resolution={resolution!r}: two ints >= 1 expected, bins of queries and bins of keys")
    return min(resolution[0], call.q.shape[2]), min(resolution[1], call.n)


def _bin_sizes(count: int, bins: int, call: Call) -> Int[Tensor, " bins"]:
    return count // bins + (torch.arange(bins, device=call.q.device) < count % bins)


def _of_real_queries(call: Call, t: Tile, x: Shaped[Tensor, "b h g m n"]) -> Shaped[Tensor, "b h g m n"]:
    """Return x with zeros for padded queries."""
    return x if call.query_padding is None else x * call.query_padding[t.b, None, None, t.i, None]


def _pool_keys(
    x: Float[Tensor, "*lead m n"], n: int, bins: int, keys: slice, largest: bool
) -> Float[Tensor, "*lead m bins"]:
    """Sum or take the maximum over bins of all n keys.

    x holds a range of the keys; the other keys have 0.
    """
    x = torch.nn.functional.pad(x, (keys.start, n - keys.stop))
    width, longer = divmod(n, bins)
    cut = longer * (width + 1)  # the longer bins come first, so that both parts are regular grids
    runs = (x[..., :cut].unflatten(-1, (longer, width + 1)), x[..., cut:].unflatten(-1, (bins - longer, width)))
    return torch.cat([run.amax(-1) if largest else run.sum(-1) for run in runs], -1)
