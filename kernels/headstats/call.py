"""A validated attention call, and the visibility rules that every backend shares."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int, Shaped
    from torch import Tensor

    from headstats.spec import StatSpec

LOG2E, LN2 = math.log2(math.e), math.log(2)
HIDDEN_BIAS = -1e30  # a bias at or below it hides its cell
# A logit in base 2 at or below it hides its cell, too: -1e30 in base 2, less a margin for rounding. It lies above the
# mark of hidden cells, so that one comparison recognises both.
LOWEST = -1.44e30
# The mark of hidden cells among logits: -inf would give nan in differences and in 0 * (-inf).
HIDDEN = -1e36
EVERY = slice(None)
# Arguments that the backward of a backend differentiates.
LEAVES = ("q", "k", "v", "prefix_k", "prefix_v", "pattern_q", "pattern_k", "logit_factor", "logit_raise",
          "temperature", "edit_bias", "gain", "keep_fraction", "sinks", "alibi", "bias")  # fmt: skip
TRAINABLE = (*LEAVES, "gate", "replacement")
EDITS = ("edit_q_segments", "pattern_q", "pattern_k", "pattern_rows", "logit_factor", "logit_raise", "temperature",
         "edit_bias", "knockout", "counterfactual", "counterfactual_rows", "counterfactual_renormalise",
         "counterfactual_seed", "gain", "take", "give", "keep_fraction", "gate", "replacement")  # fmt: skip


@dataclass(eq=False, kw_only=True)
class Call:
    """Arguments of `attend` after validation: unambiguous, and not checked again.

    N counts all keys: the P keys of a shared prefix, if any, and then those in k. Tables over segments have one more
    row and column than there are segments: id -1 (no segment) points to the last one, which is neutral.
    """

    q: Shaped[Tensor, "B H M D"]
    k: Shaped[Tensor, "B Hk N-P D"]
    v: Shaped[Tensor, "B Hk N-P Dv"]
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    spec: StatSpec  # statistics that depend on an argument are resolved to True or False
    bias: Shaped[Tensor, "#B #H #M #N"] | None = None  # always four dimensions
    alibi: Shaped[Tensor, " H"] | None = None
    sinks: Shaped[Tensor, " H"] | None = None
    prefix_k: Shaped[Tensor, "G Hk P D"] | None = None  # batch rows in G equal runs, one prefix each
    prefix_v: Shaped[Tensor, "G Hk P Dv"] | None = None
    key_padding: Bool[Tensor, "B N"] | None = None
    query_padding: Bool[Tensor, "B M"] | None = None  # True = real; statistics of keys average over these
    q_segments: Int[Tensor, "#B M"] | None = None
    k_segments: Int[Tensor, "#B N"] | None = None
    segment_mask: Bool[Tensor, "#B #H Sq+1 Sk+1"] | None = None
    segment_open: Bool[Tensor, "#B #H Sq+1 Sk+1"] | None = None
    n_segments: int = 0  # number of key segments
    targets: Int[Tensor, "#B M T"] | None = None
    key_features: Float[Tensor, "#B N F"] | None = None
    # The fields of an Edit, named by `EDITS`. Each is neutral in heads and rows that the edit does not change, and None
    # if it changes none of them.
    edit_q_segments: Int[Tensor, "#B M"] | None = None  # for the tables below: -1 in rows not changed
    pattern_q: Shaped[Tensor, "B H M D"] | None = None  # logits of pattern_rows are computed from these
    pattern_k: Shaped[Tensor, "B Hk N-P D"] | None = None
    pattern_rows: Bool[Tensor, "#B #H #M"] | None = None
    logit_factor: Shaped[Tensor, "#B #H Sq+1 Sk+1"] | None = None
    logit_raise: Shaped[Tensor, "#B #H Sq+1 Sk+1"] | None = None
    temperature: Shaped[Tensor, "#B #H #M"] | None = None
    edit_bias: Shaped[Tensor, "#B #H Sq+1 Sk+1"] | None = None  # the sum of all log gains that are renormalised
    knockout: Bool[Tensor, "#B #H Sq+1 Sk+1"] | None = None  # hidden before the softmax
    counterfactual: str | None = None
    counterfactual_rows: Bool[Tensor, "#B #H #M"] | None = None
    counterfactual_renormalise: bool = True
    counterfactual_seed: int = 0
    gain: Shaped[Tensor, "#B #H Sq+1 Sk+1"] | None = None  # after the softmax, not renormalised; 0 cuts
    take: Bool[Tensor, "#B #H Sq+1 Sk+1"] | None = None
    give: Bool[Tensor, "#B #H Sq+1 Sk+1"] | None = None
    keep_fraction: Shaped[Tensor, "#B #H #M"] | None = None
    gate: Shaped[Tensor, "#B #H #M"] | None = None  # never None if there is a replacement
    replacement: Shaped[Tensor, "#B #H #M #Dv"] | None = None

    @property
    def n(self) -> int:
        """Number of keys."""
        return self.k.shape[2] + (0 if self.prefix_k is None else self.prefix_k.shape[2])

    @property
    def offset(self) -> int:
        """Position of query 0 among the keys: causal masks are aligned bottom-right."""
        return self.n - self.q.shape[2]

    @property
    def groups(self) -> int:
        """Number of query heads per key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which logits, LSE and statistics are computed."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def trainable(self) -> tuple[str, ...]:
        """Names of the arguments that require gradients; none if autograd is off."""
        if not torch.is_grad_enabled():
            return ()
        return tuple(n for n in TRAINABLE if (t := getattr(self, n)) is not None and t.requires_grad)

    @property
    def may_lose_mass(self) -> bool:
        """Whether the weights of a row may sum to less than 1."""
        return self.sinks is not None or self.changes_weights

    @property
    def changes_weights(self) -> bool:
        """Whether an edit acts on the weights after the softmax."""
        return self.gain is not None or self.take is not None or self.counterfactual is not None

    @property
    def has_two_row_numberings(self) -> bool:
        """Whether the edit's tables use other query segments than the masks.

        They do if the edit leaves some rows unchanged.
        """
        masked = self.segment_mask is not None or self.segment_open is not None
        return masked and self.edit_q_segments is not None and self.edit_q_segments is not self.q_segments

    @property
    def table_q_segments(self) -> Int[Tensor, "#B M"] | None:
        """The query segments that all tables use, unless `has_two_row_numberings`."""
        masked = self.segment_mask is not None or self.segment_open is not None
        return self.q_segments if masked else self.edit_q_segments

    def unedited(self) -> Call:
        """Return the same call without its edit."""
        defaults = {f.name: f.default for f in fields(self) if f.name in EDITS}
        return replace(self, **defaults)

    def apply_gate(self, z: Shaped[Tensor, "B H M Dv"]) -> Shaped[Tensor, "B H M Dv"]:
        """Return gate * z + (1 - gate) * replacement, in z's dtype."""
        if self.gate is None:
            return z
        gate = self.gate[..., None].to(self.dtype)
        out = gate * z.to(self.dtype)
        if self.replacement is not None:
            out = out + (1 - gate) * self.replacement.to(self.dtype)
        return out.to(z.dtype)

    def visible_range(self, i0: int, i1: int) -> tuple[int, int]:
        """Return the range of keys that any query i0 <= i < i1 may see.

        Only causality and window are considered.
        """
        lo, hi = 0, self.n
        if self.segment_open is not None:
            return lo, hi
        if self.causal:
            hi = i1 + self.offset
        if self.window is not None:
            lo = i0 + self.offset - self.window + 1
            hi = min(hi, i1 + self.offset + self.window - 1)
        hi = min(max(hi, 0), self.n)
        return min(max(lo, 0), hi), hi

    def distances(self, i0: int, i1: int, lo: int, hi: int) -> Int[Tensor, "m n"]:
        """Return i + N - M - j for the queries i0 <= i < i1 and keys lo <= j < hi."""
        device = self.q.device
        rows = torch.arange(i0 + self.offset, i1 + self.offset, device=device)
        return rows[:, None] - torch.arange(lo, hi, device=device)

    def visible(
        self, i: slice, j: slice, b: slice = EVERY, heads: slice = EVERY, cut: bool = True
    ) -> Bool[Tensor, "#b #h m n"]:
        """Return which keys the queries see, in a part of the call.

        Causality, window, segments, padding, bias and knock-out all count.  cut: cells that are zeroed after the
        softmax do not count as visible.
        """
        d = self.distances(i.start, i.stop, j.start, j.stop)
        mask = torch.ones_like(d, dtype=torch.bool)
        if self.causal:
            mask &= d >= 0
        if self.window is not None:
            mask &= d.abs() < self.window
        mask = mask[None, None]
        if self.segment_open is not None:
            mask = mask | self.cells(self.segment_open, i, j, b, heads)
        if self.segment_mask is not None:
            mask = mask & self.cells(self.segment_mask, i, j, b, heads)
        if self.knockout is not None:
            mask = mask & ~self.edit_cells(self.knockout, i, j, b, heads)
        if self.gain is not None and cut:
            mask = mask & (self.edit_cells(self.gain, i, j, b, heads) > 0)
        if self.key_padding is not None:
            mask = mask & self.key_padding[b, None, None, j]
        if self.bias is not None:
            mask = mask & ~hidden_by_bias(slice_axes(self.bias, b, heads, i, j))
        return mask

    def cells(
        self, table: Shaped[Tensor, "#B #H Sq+1 Sk+1"], i: slice, j: slice, b: slice = EVERY, heads: slice = EVERY
    ) -> Shaped[Tensor, "#b #h m n"]:
        """Spread a table over pairs of segments over cells.

        Segment -1 reads the table's last row or column.
        """
        assert self.q_segments is not None and self.k_segments is not None  # validated: a table needs both
        return spread_table(table, self.q_segments, self.k_segments, (b, heads, i, j))

    def edit_cells(
        self, table: Shaped[Tensor, "#B #H Sq+1 Sk+1"], i: slice, j: slice, b: slice = EVERY, heads: slice = EVERY
    ) -> Shaped[Tensor, "#b #h m n"]:
        """Spread a table of the edit over cells.

        It is neutral in rows that the edit leaves unchanged.
        """
        assert self.edit_q_segments is not None and self.k_segments is not None  # validated: a table needs both
        return spread_table(table, self.edit_q_segments, self.k_segments, (b, heads, i, j))

    def key_rank(self) -> Int[Tensor, "#B N"]:
        """Return 0, 1, ...

        over the real keys of each batch row from the left, and N for padded keys.
        """
        if self.key_padding is None:
            return torch.arange(self.n, device=self.k.device)[None]
        return torch.where(self.key_padding, self.key_padding.cumsum(1) - 1, self.n)


def spread_table(
    table: Shaped[Tensor, "#B #H Sq+1 Sk+1"],
    q_segments: Int[Tensor, "#B M"],
    k_segments: Int[Tensor, "#B N"],
    where: tuple[slice, slice, slice, slice],
) -> Shaped[Tensor, "#b #h m n"]:
    """Read a table over pairs of segments at a range of cells.

    where: ranges of batch rows, heads, queries and keys.
    """
    b, heads, i, j = where
    table = slice_axis(slice_axis(table, b), heads, 1)
    rows = slice_axis(q_segments, b)[:, i].remainder(table.shape[2])
    columns = slice_axis(k_segments, b)[:, j].remainder(table.shape[3])
    if rows.shape[0] == columns.shape[0] == 1:
        return table[:, :, rows[0]][..., columns[0]]
    nb, nh = max(rows.shape[0], columns.shape[0]), table.shape[1]
    rows, columns = rows.expand(nb, -1)[:, None, :, None], columns.expand(nb, -1)[:, None, None]
    table = table.expand(nb, -1, -1, -1).gather(2, rows.expand(-1, nh, -1, table.shape[3]))
    return table.gather(3, columns.expand(-1, nh, table.shape[2], -1))


def slice_axis(x: Shaped[Tensor, "#B *rest"], where: slice, dim: int = 0) -> Shaped[Tensor, "#b *rest"]:
    """Return a range of an axis, or the whole axis if it only broadcasts."""
    if x.shape[dim] == 1:
        return x
    start, stop, _ = where.indices(x.shape[dim])
    return x.narrow(dim, start, stop - start)


def slice_axes(x: Shaped[Tensor, "#B #H #M #N"], *where: slice) -> Shaped[Tensor, "#b #h #m #n"]:
    """Return a range of each axis, except axes that only broadcast."""
    for dim, axis_range in enumerate(where):
        x = slice_axis(x, axis_range, dim)
    return x


def heads_apart(call: Call, x: Shaped[Tensor, "B H *rest"]) -> Shaped[Tensor, "B Hk G *rest"]:
    """View [B, H, ...] as [B, Hk, H/Hk, ...]."""
    return x.unflatten(1, (call.k.shape[1], call.groups))


def hidden_by_bias(bias: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Return which bias cells mean "not visible".

    These are -inf, the dtype's minimum, and anything at or below -1e30.
    """
    return bias <= max(torch.finfo(bias.dtype).min, HIDDEN_BIAS)


def lse_of(norm: Float[Tensor, "2 B H M"]) -> Float[Tensor, "B H M"]:
    """Return the natural log of the softmax denominator, given its two parts in base 2.

    norm: the row's largest logit, and log2 of the sum of 2^(logit - largest); 0 and -inf for a row that sees no key.
    Backends keep them apart, because beside a large logit the sum would be lost to rounding.
    """
    return (norm[0] + norm[1]) * LN2


def grad_lse_of(grad_norm: Float[Tensor, "2 B H M"]) -> Float[Tensor, "B H M"]:
    """Return d loss / d lse, given the gradient that `lse_of` sends to norm."""
    return grad_norm[1] / LN2
