"""Gradients of the edits of weights, in closed form over whole rows.

Logarithms are in base 2.

With w the weights before a step and w' after it, and d = d loss / d w':

- transfer, with l the fraction that a cell loses, L = sum l w, and r the softmax of ln w over the cells of give:
  w' = w (1 - l) + L r, so with D = sum r d, d loss / d ln w = w ((1 - l) d + l D) + L r (d - D),
  and d loss / d keep_fraction = sum over take of w (d - D);
- gain g: d loss / d g = w d; d loss / d ln w is the same times g;
- counterfactuals by shares c of the row's sum m: d loss / d w_j = sum c d for all cells j; by shares of 1: 0;
- reversed, a_j = max w - w_j: d loss / d w_j = -d loss / d a_j, and at the maximum the sum of d loss / d a;
- shuffled: d loss / d ln w goes back to the cell that the weight came from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from headstats.call import HIDDEN
from headstats.edits import weights
from headstats.edits.weights import BINARY, Transfer, WeightEdit

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class WeightGradients(NamedTuple):
    """Gradients through the edit of the weights of whole rows.

    weights: the weights after the edit.  log_p: d loss / d ln p of cells, before the edit.  gain, keep: d loss / d gain
    of cells, and d loss / d keep_fraction of rows; None without that edit.
    """

    weights: Float[Tensor, "*lead m n"]
    log_p: Float[Tensor, "*lead m n"]
    gain: Float[Tensor, "*lead m n"] | None
    keep: Float[Tensor, "*lead m"] | None


def backward(c: WeightEdit, x: Float[Tensor, "*lead m n"], d: Float[Tensor, "*lead m n"]) -> WeightGradients:
    """Compute the gradients of whole rows.

    x: log2 p before the edit.  d: d loss / d weight after it.
    """
    before = x.exp2()
    replaced, log_replaced = weights.apply_counterfactual(c, before, x, torch.ones_like(x[..., 0]), BINARY)
    after, log = weights.apply_gain(c, replaced, log_replaced, BINARY)
    gain = torch.ones_like(x[..., :1]) if c.gain is None else c.gain
    # At each step back, d loss / d ln weight = weight * direct + shared.
    direct, shared, d_keep = d, torch.zeros_like(d), None
    if c.take is not None:
        t = weights.compute_transfer(c, after, log, BINARY)
        direct, shared, d_keep = _through_transfer(c.take, after, t, d)
        after, _ = weights.apply_transfer(after, log, t, BINARY)
    d_gain = None if c.gain is None else replaced * direct + shared / torch.where(gain > 0, gain, 1)
    direct = direct * gain
    d_log = replaced * direct + shared
    if c.counterfactual is not None:
        d_replaced = direct + shared / torch.where(replaced > 0, replaced, 1)
        d_before = _through_counterfactual(c, before, x, d_replaced, d_log)
        d_log = torch.where(weights.rows_of_counterfactual(c, x), d_before, d_log)
    return WeightGradients(after, d_log, d_gain, d_keep)


def _through_transfer(take: Tensor, e: Tensor, t: Transfer, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients through a transfer.

    They are d loss / d weight through the kept and lost parts, d loss / d ln weight through the shares, and
    d loss / d keep_fraction.
    """
    share = torch.where(t.receivers > HIDDEN / 4, (t.receivers - t.log_sum).exp2(), 0)
    mean = (share * d).sum(-1, keepdim=True)
    acts = t.log_sum > weights.ZERO / 2
    d_keep = torch.where(take & acts, e * (d - mean), 0).sum(-1)
    return (1 - t.lost) * d + t.lost * mean, t.sum * share * (d - mean), d_keep


def _through_counterfactual(c: WeightEdit, e: Tensor, x: Tensor, d: Tensor, d_log: Tensor) -> Tensor:
    """Return d loss / d ln p through the counterfactual.

    d, d_log: d loss / d (weight, ln weight) after it.
    """
    visible = x > HIDDEN / 4
    if c.counterfactual == "shuffled":
        return torch.zeros_like(x).scatter_add(-1, weights.shuffle_sources(c, x), d_log.masked_fill(~visible, 0))
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
