"""Gradients of the edits of weights, in closed form over whole rows. Logarithms are in base 2.

With w the weights before a step and w' after it, and d = d loss / d w':

- transfer, with l the part that a cell loses, L = sum l w, and r the softmax of ln w over the cells of give:
  w' = w (1 - l) + L r, so with D = sum r d, d loss / d ln w = w ((1 - l) d + l D) + L r (d - D),
  and d loss / d keep_fraction = sum over take of w (d - D);
- gain g: d loss / d g = w d, d loss / d ln w the same times g;
- counterfactuals by shares c of the row's sum m: d loss / d w_j = sum c d, of all cells j; of 1: nothing;
- reversed, a_j = max w - w_j: d loss / d w_j = -d loss / d a_j, and their sum at the maximum;
- shuffled: d loss / d ln w goes back to where the weight came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from headstats.call import HIDDEN
from headstats.edits import weights
from headstats.edits.weights import BINARY, Change, Transfer

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class Gradients(NamedTuple):
    """weights: after the edit.  log_p: d loss / d ln p before it, of cells.  gain: of cells.  keep: of rows."""

    weights: Float[Tensor, "*lead m n"]
    log_p: Float[Tensor, "*lead m n"]
    gain: Float[Tensor, "*lead m n"] | None
    keep: Float[Tensor, "*lead m"] | None


def back(c: Change, x: Float[Tensor, "*lead m n"], d: Float[Tensor, "*lead m n"]) -> Gradients:
    """Of whole rows, given log2 p and d loss / d weight."""
    before = x.exp2()
    laid, log_laid = weights.laid_out(c, before, x, torch.ones_like(x[..., 0]), BINARY)
    after, log = weights.gained(c, laid, log_laid, BINARY)
    gain = torch.ones_like(x[..., :1]) if c.gain is None else c.gain
    # d loss / d ln weight is weight * direct + shared, once for each step back.
    direct, shared, d_keep = d, torch.zeros_like(d), None
    if c.take is not None:
        t = weights.transfer(c, after, log, BINARY)
        direct, shared, d_keep = _through_transfer(c.take, after, t, d)
        after, _ = weights.moved(after, log, t, BINARY)
    d_gain = None if c.gain is None else laid * direct + shared / torch.where(gain > 0, gain, 1)
    direct = direct * gain
    d_log = laid * direct + shared
    if c.counterfactual is not None:
        d_laid = direct + shared / torch.where(laid > 0, laid, 1)
        d_log = torch.where(weights.acting(c, x), _through_layout(c, before, x, d_laid, d_log), d_log)
    return Gradients(after, d_log, d_gain, d_keep)


def _through_transfer(take: Tensor, e: Tensor, t: Transfer, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d weight by what is kept and lost; d loss / d ln weight by the shares; d loss / d keep_fraction."""
    share = torch.where(t.takers > HIDDEN / 4, (t.takers - t.log_sum).exp2(), 0)
    mean = (share * d).sum(-1, keepdim=True)
    acts = t.log_sum > weights.ZERO / 2
    d_keep = torch.where(take & acts, e * (d - mean), 0).sum(-1)
    return (1 - t.lost) * d + t.lost * mean, t.sum * share * (d - mean), d_keep


def _through_layout(c: Change, e: Tensor, x: Tensor, d: Tensor, d_log: Tensor) -> Tensor:
    """d loss / d ln p through the counterfactual. d, d_log: d loss / d (weight, ln weight) after it."""
    visible = x > HIDDEN / 4
    if c.counterfactual == "shuffled":
        return torch.zeros_like(x).scatter_add(-1, weights.shuffled_from(c, x), d_log.masked_fill(~visible, 0))
    if c.counterfactual != "reversed":
        if not c.renormalise:
            return torch.zeros_like(x)
        return e * (weights.fixed_shares(c, x) * d).sum(-1, keepdim=True)
    top = visible & e.ge(e.amax(-1, keepdim=True))
    d_away = d.masked_fill(~visible, 0)
    if c.renormalise:
        mass = e.sum(-1, keepdim=True)
        shares = weights.reversed_shares(c, e, x, mass)
        away = (e.amax(-1, keepdim=True) - e).masked_fill(~visible, 0).sum(-1, keepdim=True)
        mean = (shares * d).sum(-1, keepdim=True)
        d_away = (d_away - mean).masked_fill(~visible, 0) * (mass / torch.where(away > 0, away, 1))
    ties = top.sum(-1, keepdim=True).clamp_min(1)
    through = torch.where(top, d_away.sum(-1, keepdim=True) / ties, 0) - d_away
    if c.renormalise:
        through = torch.where(away.gt(0), through + mean, d)
    return e * through
