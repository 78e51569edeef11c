"""Edits of weights after the softmax: counterfactual, gain, redistribution.

They act on whole rows, in the order of `Edit`. The reference applies them to the pattern. The blocked backend applies
them to a tile, which holds all keys that its queries may see, and its backward differentiates them there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from headstats.call import EVERY, HIDDEN, Call, slice_axis
from headstats.edits import hash_noise

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# The logarithm of a weight that is 0 although its cell is visible: below every other weight, above hidden cells.
ZERO = -1e28


class LogBase(NamedTuple):
    """The base of the logarithms of weights."""

    exp: Callable[[Tensor], Tensor]
    log: Callable[[Tensor], Tensor]


NATURAL, BINARY = LogBase(torch.exp, torch.log), LogBase(torch.exp2, torch.log2)


@dataclass
class WeightEdit:
    """The edit of the weights of some queries, spread over their cells.

    Leading dimensions are those of the weights.
    """

    gain: Float[Tensor, "*#lead m n"] | None
    take: Bool[Tensor, "*#lead m n"] | None
    give: Bool[Tensor, "*#lead m n"] | None
    keep: Float[Tensor, "*#lead #m"] | None
    counterfactual: str | None
    renormalise: bool
    rows: Bool[Tensor, "*#lead #m"] | None  # rows on which the counterfactual acts; None = all
    own: Bool[Tensor, "m n"] | None  # True at the query's own position
    words: Int[Tensor, "*lead m N"] | None  # hashes of the cells of all keys
    first_key: int
    n: int  # number of all keys


def edit_of_cells(
    call: Call,
    i: slice,
    j: slice,
    b: slice = EVERY,
    heads: slice = EVERY,
    shape: Callable[[Tensor], Tensor] = lambda x: x,
) -> WeightEdit | None:
    """Return the edit of a part of the call, or None if weights do not change.

    shape: [b, h, ...] to [*lead, ...].
    """
    if not call.changes_weights:
        return None

    def cells(table: Tensor | None) -> Tensor | None:
        return None if table is None else shape(call.edit_cells(table, i, j, b, heads))

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else shape(slice_axis(slice_axis(slice_axis(x, b), heads, 1), i, 2))

    kind, gain, keep = call.counterfactual, cells(call.gain), rows(call.keep_fraction)
    own = call.distances(i.start, i.stop, j.start, j.stop) == 0 if kind == "identity" else None
    words = shape(_words(call, i, b, heads)) if kind in ("random", "shuffled") else None
    return WeightEdit(
        gain=None if gain is None else gain.to(call.dtype), take=cells(call.take), give=cells(call.give),
        keep=None if keep is None else keep.to(call.dtype), counterfactual=kind,
        renormalise=call.counterfactual_renormalise, rows=rows(call.counterfactual_rows), own=own, words=words,
        first_key=j.start, n=call.n,
    )  # fmt: skip


def _words(call: Call, i: slice, b: slice, heads: slice) -> Int[Tensor, "b h m N"]:
    """Hash all keys by the query's position.

    A query decoded alone therefore gets the same hashes.
    """

    def numbers(where: slice, size: int) -> Tensor:
        return torch.arange(size, device=call.q.device)[where]

    queries = numbers(i, call.q.shape[2]) + call.offset
    return hash_noise.words(
        call.counterfactual_seed, numbers(b, call.q.shape[0]), numbers(heads, call.q.shape[1]), queries,
        numbers(EVERY, call.n),
    )  # fmt: skip


def apply_edit(
    c: WeightEdit, x: Float[Tensor, "*lead m n"], total: Float[Tensor, "*lead m"], base: LogBase
) -> tuple[Float[Tensor, "*lead m n"], Float[Tensor, "*lead m n"]]:
    """Return the weights after the edit and their logarithms.

    x: the logarithms before the edit.

    Weights are in units of 1 / total, so that p = weight / total. Logarithms are HIDDEN where a cell is hidden, before
    and after, and ZERO where a weight has become 0. Cells that no edit changes are returned bit for bit.
    """
    e, x = apply_counterfactual(c, base.exp(x), x, total, base)
    e, x = apply_gain(c, e, x, base)
    return (e, x) if c.take is None else apply_transfer(e, x, compute_transfer(c, e, x, base), base)


def apply_counterfactual(c: WeightEdit, e: Tensor, x: Tensor, total: Tensor, base: LogBase) -> tuple[Tensor, Tensor]:
    """Return the weights that `Edit` lists under counterfactual, and their logarithms."""
    if c.counterfactual is None:
        return e, x
    if c.counterfactual == "shuffled":
        log = torch.where(x > HIDDEN / 4, x.gather(-1, shuffle_sources(c, x)), x)
        other = base.exp(log)
    else:
        of = e.sum(-1, keepdim=True) if c.renormalise else total[..., None]
        other = of * (reversed_shares(c, e, x, of) if c.counterfactual == "reversed" else fixed_shares(c, x))
        positive = other > 0
        zero = x.new_full((), ZERO)  # in x's dtype: every weight of 0 has the same logarithm
        log = torch.where(
            positive, base.log(torch.where(positive, other, 1)), torch.where(x > HIDDEN / 4, zero, HIDDEN)
        )
    acts = rows_of_counterfactual(c, x)
    return torch.where(acts, other, e), torch.where(acts, log, x)


def rows_of_counterfactual(c: WeightEdit, x: Tensor) -> Bool[Tensor, "*#lead #m 1"]:
    """Return the rows on which the counterfactual acts."""
    return x.new_ones((1,) * x.dim(), dtype=torch.bool) if c.rows is None else c.rows[..., None]


def fixed_shares(c: WeightEdit, x: Tensor) -> Float[Tensor, "*lead m n"]:
    """Return each cell's share of the row's sum, or of 1.

    For counterfactuals that do not depend on the weights.
    """
    visible = x > HIDDEN / 4
    if c.counterfactual == "identity":
        assert c.own is not None  # set for "identity"
        return (visible & c.own).to(x.dtype)
    if c.counterfactual == "uniform":
        return visible.to(x.dtype) / (visible.sum(-1, keepdim=True).clamp_min(1) if c.renormalise else c.n)
    assert c.words is not None  # set for "random"
    u = hash_noise.uniform(c.words, x.dtype)
    drawn = torch.where(visible, u[..., c.first_key : c.first_key + x.shape[-1]], 0)
    return drawn / (drawn if c.renormalise else u).sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def reversed_shares(c: WeightEdit, e: Tensor, x: Tensor, of: Tensor) -> Float[Tensor, "*lead m n"]:
    """Return how far each weight is below the row's largest.

    The result is divided by `of` or normalised; equal weights stay.
    """
    away = torch.where(x > HIDDEN / 4, e.amax(-1, keepdim=True) - e, 0)
    if not c.renormalise:
        return away / of
    total = away.sum(-1, keepdim=True)
    return torch.where(total > 0, away / torch.where(total > 0, total, 1), e / torch.where(of > 0, of, 1))


def shuffle_sources(c: WeightEdit, x: Tensor) -> Int[Tensor, "*lead m n"]:
    """Return the source of each visible cell's weight.

    For the k-th visible cell, it is the cell with the k-th smallest hash.
    """
    assert c.words is not None  # set for "shuffled"
    visible, words = x > HIDDEN / 4, c.words[..., c.first_key : c.first_key + x.shape[-1]]
    order = torch.where(visible, words, hash_noise.WORD + 1).argsort(-1)  # hidden cells last
    return order.gather(-1, (visible.cumsum(-1) - 1).clamp_min(0))


def apply_gain(c: WeightEdit, e: Tensor, x: Tensor, base: LogBase) -> tuple[Tensor, Tensor]:
    """Return weights and logarithms after Edit.gain."""
    if c.gain is None:
        return e, x
    positive = c.gain > 0
    return e * c.gain, torch.where(positive, x + base.log(torch.where(positive, c.gain, 1)), HIDDEN)


@dataclass
class Transfer:
    """The weight that rows take from some cells and give to others."""

    lost: Float[Tensor, "*lead m n"]  # the fraction of its weight that each cell loses
    sum: Float[Tensor, "*lead m 1"]  # total weight lost
    receivers: Float[Tensor, "*lead m n"]  # logarithms of the weights of give, HIDDEN elsewhere
    log_sum: Float[Tensor, "*lead m 1"]  # log-sum of the weights of give


def compute_transfer(c: WeightEdit, e: Tensor, x: Tensor, base: LogBase) -> Transfer:
    """Compute the transfer.

    Cells of give share it by a softmax of their logarithms, since their sum may underflow.
    """
    assert c.take is not None and c.give is not None and c.keep is not None  # validated: all or none
    receivers = x.masked_fill(~c.give, HIDDEN)
    largest = receivers.detach().amax(-1, keepdim=True)
    acts = largest > ZERO / 2  # else no cell can receive weight
    lost = torch.where(c.take & acts, 1 - c.keep[..., None], 0)
    total = torch.where(acts, base.exp(receivers - largest).sum(-1, keepdim=True), 1)
    return Transfer(lost, (e * lost).sum(-1, keepdim=True), receivers, largest + base.log(total))


def apply_transfer(e: Tensor, x: Tensor, t: Transfer, base: LogBase) -> tuple[Tensor, Tensor]:
    """Return weights and logarithms after the transfer."""
    moves = t.sum > 0
    ratio = base.log(torch.where(moves, t.sum, 1)) - t.log_sum  # of the weight received to the weight before
    log_growth = ratio.clamp_min(0) + base.log(1 + base.exp(-ratio.abs()))
    log_growth = torch.where(moves & (t.receivers > HIDDEN / 4), log_growth, 0)
    remaining = 1 - t.lost
    positive, zero = remaining > 0, torch.where(x > HIDDEN / 4, ZERO, x)
    log = torch.where(positive, x + log_growth + base.log(torch.where(positive, remaining, 1)), zero)
    return e * remaining + t.sum * base.exp(t.receivers - t.log_sum), log
