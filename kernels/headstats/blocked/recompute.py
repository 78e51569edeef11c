"""The tile backward: gradients by recomputation from q, k, v, lse and out.

It works whichever backend ran the forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.blocked.logit_gradients import LogitGradients, RowGradients
from headstats.blocked.rows import largest_logit
from headstats.blocked.tiles import (
    KeyTensors,
    Tile,
    add_to_keys,
    key_tensors,
    logits,
    mix_values,
    pattern_keys,
    scores,
    tile_queries,
    tile_weight_edit,
    tiles,
    zeros_like,
)
from headstats.call import HIDDEN, Call, heads_apart

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def backward(
    call: Call, leaf_names: set[str], out: Tensor, norm: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> dict[str, Tensor]:
    """Return d loss / d (q, k, v, prefix) and the other requested leaves by name.

    Given are out, norm (see `call.lse_of`) and d loss / d (out, lse).
    """
    grad_out = grad_out.to(call.dtype)
    # Sum_j p_ij dL/dp_ij = dout_i . out_i, minus the part through lse (d lse / d score = p). Where weights are edited,
    # the values were multiplied by other weights than p, and the sum is taken tile by tile.
    delta = -grad_lse if call.changes_weights else (grad_out * out).sum(-1) - grad_lse
    empty = norm[1] == -torch.inf
    rows = (heads_apart(call, x) for x in (delta.masked_fill(empty, 0), grad_lse.masked_fill(empty, 0), grad_out))
    return _gradients(call, leaf_names, *rows)


def _gradients(
    call: Call, leaf_names: set[str], delta: Tensor, grad_lse: Tensor, grad_out: Tensor
) -> dict[str, Tensor]:
    """Do the same, given delta (see `backward`) and d loss / d (lse, out), 0 in empty rows."""
    k, v = key_tensors(call)
    dv = zeros_like(v)
    products, logit_gradients = ProductGradients(call, k), LogitGradients(call, leaf_names)
    for t in tiles(call):
        rows = (t.b, t.h, slice(None), t.i)
        s, origin = logits(call, t, tile_queries(call, t, call.q), k, products.other)
        # The norm is that of these logits, not of the forward's: one rounding more or less would be a factor of
        # exp(64) where logits are 1e9.
        top = s.amax(-1) if s.shape[-1] else s.new_full(s.shape[:-1], HIDDEN)
        empty, shift, sink = largest_logit(call, t, top)
        x, change = s.sub_(shift[..., None]), tile_weight_edit(call, t)
        logits_copy = x.clone() if "temperature" in logit_gradients.grads else None
        e = x.exp2_() if change is None else x.exp2()
        row = RowGradients(shift, *inverse_sums(e.sum(-1), empty, shift, sink), delta[rows], grad_lse[rows])
        if change is None:  # p = e * inverse, and the inverse multiplies whole rows elsewhere
            go = grad_out[rows] * row.inverse[..., None]
            d_weight = scores(go, v, t)
            add_to_keys(dv, t, e, go)
            ds = d_weight.sub_((row.delta * row.inverse)[..., None]).mul_(e)
        else:
            go, x = grad_out[rows], x.add_(row.inverse.log2()[..., None])  # log2 p
            weights, ds = logit_gradients.through_weights(t, change, x, scores(go, v, t))
            add_to_keys(dv, t, weights, go)
            row.delta = row.delta + ds.sum(-1)
            ds.addcmul_(x.exp2_(), row.delta[..., None], value=-1)
        ds = logit_gradients.backward(t, ds, logits_copy, row, origin)
        if origin.tanh is not None:
            ds.mul_(1 - origin.tanh.square_())
        products.backward(t, ds.mul_(call.scale), origin.swapped)
    grads = {**products.grads(), "v": dv.own, **logit_gradients.grads}
    return grads if dv.shared is None else grads | {"prefix_v": dv.shared}


def inverse_sums(
    total: Float[Tensor, "b h g m"],
    empty: Bool[Tensor, "b h g m"],
    shift: Float[Tensor, "b h g m"],
    sink: Float[Tensor, "#b h g #m"] | None,
) -> tuple[Float[Tensor, "b h g m"], Float[Tensor, "b h g m"] | None]:
    """Return 1 / sum of 2^(logit - largest), learned sink included, and the sink's weight.

    total: the sum over keys.  The first is 1 in empty rows, whose weights are 0 anyway.
    """
    if sink is None:
        return torch.where(empty, 1, total).reciprocal(), None
    of_sink = torch.exp2(sink - shift)
    inverse = torch.where(empty, 1, total + of_sink).reciprocal()
    return inverse, of_sink * inverse


class ProductGradients:
    """Sums over tiles of the gradients of q and k, and of Edit.pattern_from."""

    def __init__(self, call: Call, k: KeyTensors):
        self.call, self.keys, self.other = call, k, pattern_keys(call)
        self.dq, self.dk = k.own.new_zeros(call.q.shape), zeros_like(k)
        if self.other is not None:  # whose prefix is the same
            self.dq2, self.dk2 = torch.zeros_like(self.dq), KeyTensors(torch.zeros_like(k.own), self.dk.shared)

    def backward(self, t: Tile, ds: Float[Tensor, "b h g m n"], swapped: Bool[Tensor, "#b #h #g #m"] | None) -> None:
        """Add the gradients of a tile. ds: d loss / d (q.k).

        swapped: rows whose products were of q2 and k2.
        """
        call = self.call
        if swapped is None:
            self._add(t, ds, call.q, self.keys, self.dq, self.dk)
            return
        assert call.pattern_q is not None and self.other is not None  # rows are swapped only with these
        swapped = swapped[..., None]
        self._add(t, ds.masked_fill(swapped, 0), call.q, self.keys, self.dq, self.dk)
        self._add(t, ds.masked_fill(~swapped, 0), call.pattern_q, self.other, self.dq2, self.dk2)

    def _add(self, t: Tile, ds: Tensor, q: Tensor, k: KeyTensors, dq: Tensor, dk: KeyTensors) -> None:
        heads_apart(self.call, dq)[t.b, t.h, :, t.i] = mix_values(ds, k, t)
        add_to_keys(dk, t, ds, tile_queries(self.call, t, q))

    def grads(self) -> dict[str, Tensor]:
        """Return the gradients by name."""
        grads = {"q": self.dq, "k": self.dk.own}
        if self.other is not None:
            grads |= {"pattern_q": self.dq2, "pattern_k": self.dk2.own}
        return grads if self.dk.shared is None else grads | {"prefix_k": self.dk.shared}
