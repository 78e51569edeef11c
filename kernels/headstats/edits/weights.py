"""Edits of the weights themselves, after the softmax: counterfactual attention, gain, redistribution.

They act on whole rows, in the order of `Edit`. The reference calls them on the pattern, blocked on a tile (which
holds all keys that its queries may see), and its backward differentiates them there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from headstats.call import EVERY, HIDDEN, Call, part
from headstats.edits import hash_noise as noise

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

# The logarithm of a weight that is 0 although its cell is visible: lower than any other, and no hidden cell's.
ZERO = HIDDEN / 64


class Base(NamedTuple):
    """In which base logarithms of weights are."""

    exp: Callable[[Tensor], Tensor]
    log: Callable[[Tensor], Tensor]


NATURAL, BINARY = Base(torch.exp, torch.log), Base(torch.exp2, torch.log2)


@dataclass
class Change:
    """What is done to the weights of some queries, spread over their cells. Leading dimensions are the weights'."""

    gain: Float[Tensor, "*#lead m n"] | None
    take: Bool[Tensor, "*#lead m n"] | None
    give: Bool[Tensor, "*#lead m n"] | None
    keep: Float[Tensor, "*#lead #m"] | None
    counterfactual: str | None
    renormalise: bool
    rows: Bool[Tensor, "*#lead #m"] | None  # on which the counterfactual acts; None = all
    own: Bool[Tensor, "m n"] | None  # the query's own position
    words: Int[Tensor, "*lead m N"] | None  # the cells' hashes, of all keys
    first_key: int
    n: int  # all keys


def spread(
    call: Call,
    i: slice,
    j: slice,
    b: slice = EVERY,
    heads: slice = EVERY,
    shape: Callable[[Tensor], Tensor] = lambda x: x,
) -> Change | None:
    """The change of a part of the call, or None where weights are left alone. shape: [b, h, ...] to [*lead, ...]."""
    if not call.changes_weights:
        return None

    def cells(table: Tensor | None) -> Tensor | None:
        return None if table is None else shape(call.edit_cells(table, i, j, b, heads))

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else shape(part(part(part(x, b), heads, 1), i, 2))

    kind, gain, keep = call.counterfactual, cells(call.gain), rows(call.keep_fraction)
    own = call.distances(i.start, i.stop, j.start, j.stop) == 0 if kind == "identity" else None
    words = shape(_words(call, i, b, heads)) if kind in ("random", "shuffled") else None
    return Change(
        gain=None if gain is None else gain.to(call.dtype), take=cells(call.take), give=cells(call.give),
        keep=None if keep is None else keep.to(call.dtype), counterfactual=kind,
        renormalise=call.counterfactual_renormalise, rows=rows(call.counterfactual_rows), own=own, words=words,
        first_key=j.start, n=call.n,
    )  # fmt: skip


def _words(call: Call, i: slice, b: slice, heads: slice) -> Int[Tensor, "b h m N"]:
    """Hashes of all keys, by the query's position: so that a query decoded alone finds the same."""

    def numbers(where: slice, size: int) -> Tensor:
        return torch.arange(size, device=call.q.device)[where]

    queries = numbers(i, call.q.shape[2]) + call.offset
    return noise.words(
        call.counterfactual_seed, numbers(b, call.q.shape[0]), numbers(heads, call.q.shape[1]), queries,
        numbers(EVERY, call.n),
    )  # fmt: skip


def changed(
    c: Change, x: Float[Tensor, "*lead m n"], total: Float[Tensor, "*lead m"], base: Base
) -> tuple[Float[Tensor, "*lead m n"], Float[Tensor, "*lead m n"]]:
    """Weights after the change, and their logarithms, given the logarithms before it.

    Weights are in units of 1 / total, so that p = weight / total. Logarithms are HIDDEN where a cell is hidden, before
    and after; ZERO where a weight has become 0. What no edit touches comes back to the last bit.
    """
    e, x = laid_out(c, base.exp(x), x, total, base)
    e, x = gained(c, e, x, base)
    return (e, x) if c.take is None else moved(e, x, transfer(c, e, x, base), base)


def laid_out(c: Change, e: Tensor, x: Tensor, total: Tensor, base: Base) -> tuple[Tensor, Tensor]:
    """The weights that `Edit` lists under counterfactual, and their logarithms."""
    if c.counterfactual is None:
        return e, x
    if c.counterfactual == "shuffled":
        log = torch.where(x > HIDDEN / 4, x.gather(-1, shuffled_from(c, x)), x)
        other = base.exp(log)
    else:
        of = e.sum(-1, keepdim=True) if c.renormalise else total[..., None]
        other = of * (reversed_shares(c, e, x, of) if c.counterfactual == "reversed" else fixed_shares(c, x))
        some = other > 0
        none = x.new_full((), ZERO)  # in x's dtype: every weight of 0 has the same logarithm
        log = torch.where(some, base.log(torch.where(some, other, 1)), torch.where(x > HIDDEN / 4, none, HIDDEN))
    acts = acting(c, x)
    return torch.where(acts, other, e), torch.where(acts, log, x)


def acting(c: Change, x: Tensor) -> Bool[Tensor, "*#lead #m 1"]:
    """Rows on which the counterfactual acts."""
    return x.new_ones((1,) * x.dim(), dtype=torch.bool) if c.rows is None else c.rows[..., None]


def fixed_shares(c: Change, x: Tensor) -> Float[Tensor, "*lead m n"]:
    """What part of the row's sum, or of 1, each cell has, where that depends on no weight."""
    visible = x > HIDDEN / 4
    if c.counterfactual == "identity":
        assert c.own is not None  # made for this
        return (visible & c.own).to(x.dtype)
    if c.counterfactual == "uniform":
        return visible.to(x.dtype) / (visible.sum(-1, keepdim=True).clamp_min(1) if c.renormalise else c.n)
    assert c.words is not None  # made for this
    u = noise.uniform(c.words, x.dtype)
    mine = torch.where(visible, u[..., c.first_key : c.first_key + x.shape[-1]], 0)
    return mine / (mine if c.renormalise else u).sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def reversed_shares(c: Change, e: Tensor, x: Tensor, of: Tensor) -> Float[Tensor, "*lead m n"]:
    """How far each weight is below the row's largest, as parts of `of` or normalised; equal weights stay."""
    away = torch.where(x > HIDDEN / 4, e.amax(-1, keepdim=True) - e, 0)
    if not c.renormalise:
        return away / of
    most = away.sum(-1, keepdim=True)
    return torch.where(most > 0, away / torch.where(most > 0, most, 1), e / torch.where(of > 0, of, 1))


def shuffled_from(c: Change, x: Tensor) -> Int[Tensor, "*lead m n"]:
    """Where each visible cell's weight comes from: the k-th that is seen gets that of the k-th smallest hash."""
    assert c.words is not None  # made for this
    visible, words = x > HIDDEN / 4, c.words[..., c.first_key : c.first_key + x.shape[-1]]
    order = torch.where(visible, words, noise.WORD + 1).argsort(-1)  # hidden cells last
    return order.gather(-1, (visible.cumsum(-1) - 1).clamp_min(0))


def gained(c: Change, e: Tensor, x: Tensor, base: Base) -> tuple[Tensor, Tensor]:
    """Weights and logarithms after Edit.gain."""
    if c.gain is None:
        return e, x
    some = c.gain > 0
    return e * c.gain, torch.where(some, x + base.log(torch.where(some, c.gain, 1)), HIDDEN)


@dataclass
class Transfer:
    """What rows take from some cells and give to others."""

    lost: Float[Tensor, "*lead m n"]  # the part of its weight that each cell loses
    sum: Float[Tensor, "*lead m 1"]  # of what is lost
    takers: Float[Tensor, "*lead m n"]  # logarithms of the weights of give, HIDDEN elsewhere
    log_sum: Float[Tensor, "*lead m 1"]  # of the weights of give


def transfer(c: Change, e: Tensor, x: Tensor, base: Base) -> Transfer:
    """Cells of give share what comes as a softmax of their logarithms: their sum may underflow beside the row's."""
    assert c.take is not None and c.give is not None and c.keep is not None  # validated: all or none
    takers = x.masked_fill(~c.give, HIDDEN)
    most = takers.detach().amax(-1, keepdim=True)
    acts = most > ZERO / 2  # else nothing is there to give to
    lost = torch.where(c.take & acts, 1 - c.keep[..., None], 0)
    total = torch.where(acts, base.exp(takers - most).sum(-1, keepdim=True), 1)
    return Transfer(lost, (e * lost).sum(-1, keepdim=True), takers, most + base.log(total))


def moved(e: Tensor, x: Tensor, t: Transfer, base: Base) -> tuple[Tensor, Tensor]:
    """Weights and logarithms after the transfer."""
    some = t.sum > 0
    ratio = base.log(torch.where(some, t.sum, 1)) - t.log_sum  # of what comes to what was there
    grown = ratio.clamp_min(0) + base.log(1 + base.exp(-ratio.abs()))
    grown, kept = torch.where(some & (t.takers > HIDDEN / 4), grown, 0), 1 - t.lost
    left = kept > 0
    log = torch.where(left, x + grown + base.log(torch.where(left, kept, 1)), torch.where(x > HIDDEN / 4, ZERO, x))
    return e * kept + t.sum * base.exp(t.takers - t.log_sum), log
