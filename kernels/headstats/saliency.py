"""Saliency of attention, s_ij = p_ij dL/dp_ij.

This is each weight times the gradient of a loss with respect to it. Given the gradient dz_i at z_i = sum_j p_ij v_j,
dL/dp_ij = dz_i . v_j. So s_ij can be computed in the tile that holds p_ij, and no M x N matrix is held, of weights or
of gradients. -s_ij is the first-order change of the loss if cell (i, j) is cut without renormalising.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from headstats.blocked import tiles
from headstats.blocked.tiles import Tile, scores
from headstats.call import Call, heads_apart
from headstats.patterns import PatternArguments, SegmentPairs, TileWeights, check_queries, pattern_call, row_tiles
from headstats.validate.keys import check_tensor

if TYPE_CHECKING:
    from typing import Unpack

    from jaxtyping import Float, Int
    from torch import Tensor


@dataclass(eq=False)
class Saliency:
    """Sums of s_ij = p_ij dL/dp_ij, signed, and of |s_ij|.

    All are float32, or float64 for float64 inputs.

    query, query_abs: over the keys of each query; query = dz_i . z_i.  key, key_abs: over the queries of each key.
    segments, segments_abs: over the cells of each pair (segment of the query, segment of the key); None if not
        requested.
    rows: s_ij of the requested queries; None if not requested.
    head_norm: sqrt(sum_ij (sum_h |s_hij|)^2), by which LVLMs-Saliency (arXiv 2601.20279) divides the sum over heads:
        rows.abs().sum(1) / head_norm[:, None, None] are rows of its map; None if not requested.
    """

    query: Float[Tensor, "B H M"]
    query_abs: Float[Tensor, "B H M"]
    key: Float[Tensor, "B H N"]
    key_abs: Float[Tensor, "B H N"]
    segments: Float[Tensor, "B H S T"] | None = None
    segments_abs: Float[Tensor, "B H S T"] | None = None
    rows: Float[Tensor, "B H R N"] | None = None
    head_norm: Float[Tensor, " B"] | None = None


@torch.no_grad()
def saliency(
    q: Float[Tensor, "B H M D"],
    k: Float[Tensor, "B Hk N D"],
    v: Float[Tensor, "B Hk N Dv"],
    lse: Float[Tensor, "B H M"] | None,
    grad_out: Float[Tensor, "B H M Dv"],
    *,
    queries: Int[Tensor, "#B R"] | None = None,
    from_segments: Int[Tensor, "#B M"] | None = None,
    to_segments: Int[Tensor, "#B N"] | None = None,
    head_norm: bool = False,
    **how: Unpack[PatternArguments],
) -> Saliency:
    """Compute the first-order contribution of each attention weight to a loss.

        r = headstats.attend(q, k, v)
        r.out.retain_grad()
        loss(r.out).backward()
        s = headstats.saliency(q, k, v, r.lse, r.out.grad)  # s.query [B, H, M], s.key [B, H, N]

    grad_out: the gradient of the loss at `out` of `attend`: call `r.out.retain_grad()` before `backward`, then pass
        `r.out.grad`. The gate of an edit is included: dz = gate * grad_out.
    queries: the queries whose rows are returned, [R] or [B, R]; -1 = no query.
    from_segments, to_segments: the segment of each query and key, both or neither; -1 = in no segment.
    head_norm: also compute `Saliency.head_norm`. It needs all heads at once, in tiles of few queries, and is slower.
    lse, how: as in `pattern_rows`. Padded queries (`query_padding`) are left out of all results.

    The gradient in the row of query i includes everything that depends on out_i. With a causal model, rows after the
    position whose prediction the loss reads are exactly 0.

    Raises TypeError or ValueError for arguments that do not fit.
    """
    call = pattern_call(q, k, v, how)
    if (from_segments is None) != (to_segments is None):
        missing = "from_segments" if from_segments is None else "to_segments"
        raise ValueError(f"{missing} is None: pairs of segments need both from_segments and to_segments")
    pairs = None if from_segments is None else SegmentPairs(call, from_segments, to_segments)
    query_ids = None if queries is None else check_queries(queries, call)
    cells = SaliencyCells(call, lse, grad_out)
    totals = SaliencySums(call, pairs, head_norm)
    for t in _tiles_of_all_heads(call) if head_norm else tiles.tiles(call):
        totals.add(t, cells.of(t))
    cells.weights.compare_lse()
    rows = None
    if query_ids is not None:
        rows = q.new_zeros(*q.shape[:2], query_ids.shape[1], call.n, dtype=call.dtype)
        for t, at in row_tiles(call, query_ids):
            rows[t.b, :, at, t.j] = cells.of(t).flatten(1, 2)
    return Saliency(**totals.fields(), rows=rows)


class SaliencyCells:
    """s_ij of a call, tile by tile."""

    def __init__(self, call: Call, lse: Tensor | None, grad_out: Any):
        check_tensor("grad_out", grad_out, call.q)
        shape = (*call.q.shape[:3], call.v.shape[3])
        if grad_out.shape != shape:
            raise ValueError(f"grad_out has shape {list(grad_out.shape)}: that of out, {list(shape)}, expected")
        dz = grad_out.to(call.dtype)
        if call.gate is not None:
            dz = dz * call.gate[..., None].to(call.dtype)
        if call.query_padding is not None:
            dz = dz * call.query_padding[:, None, :, None]
        self.dz, self.weights = heads_apart(call, dz), TileWeights(call, lse)

    def of(self, t: Tile) -> Float[Tensor, "b h g m n"]:
        """Return s of a tile."""
        p, _ = self.weights.of(t)
        return p.mul_(scores(self.dz[t.b, t.h, :, t.i], self.weights.v, t))


class SaliencySums:
    """Sums of s over tiles: signed, and of absolute values."""

    def __init__(self, call: Call, pairs: SegmentPairs | None, head_norm: bool):
        b, h, m, _ = call.q.shape
        hk, self.pairs = call.k.shape[1], pairs

        def zeros(*shape: int) -> Tensor:
            return call.q.new_zeros(shape, dtype=call.dtype)

        self.query, self.key = ([zeros(b, hk, h // hk, size) for _ in range(2)] for size in (m, call.n))
        self.segments = [] if pairs is None else [pairs.zeros() for _ in range(2)]
        self.squares = zeros(b) if head_norm else None

    def add(self, t: Tile, s: Float[Tensor, "b h g m n"]) -> None:
        """Add a tile to the sums; s is overwritten."""
        for turn in range(2):
            self.query[turn][t.b, t.h, :, t.i] = s.sum(-1)
            self.key[turn][t.b, t.h, :, t.j] += s.sum(-2)
            if self.pairs is not None:
                self.pairs.add(self.segments[turn], t, s)
            s.abs_()
        if self.squares is not None:
            self.squares[t.b] += s.sum((1, 2)).square().sum((1, 2))

    def fields(self) -> dict[str, Tensor]:
        """Return the fields of Saliency that are sums."""
        sums = {"query": self.query, "key": self.key}
        if self.segments:
            sums["segments"] = self.segments
        fields = {}
        for name, (signed, absolute) in sums.items():
            fields[name], fields[f"{name}_abs"] = signed.flatten(1, 2), absolute.flatten(1, 2)
        if self.squares is not None:
            fields["head_norm"] = self.squares.sqrt()
        return fields


def _tiles_of_all_heads(call: Call) -> Iterator[Tile]:
    """Yield tiles of all heads of one batch row.

    Each holds as many queries as the budget of cells allows.
    """
    (nb, h, m, _), hk = call.q.shape, call.k.shape[1]
    rows = max(1, tiles.CELLS // (h * call.n))
    for b in range(nb):
        for i in range(0, m, rows):
            i1 = min(i + rows, m)
            yield Tile(slice(b, b + 1), slice(0, hk), slice(i, i1), slice(*call.visible_range(i, i1)))
