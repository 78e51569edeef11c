"""The tile backward: gradients by recomputation from q, k, v, lse and out.

It works whichever backend ran the forward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.blocked.logit_gradients import LogitGradients
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
from headstats.call import LOG2E, Call, heads_apart

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def backward(
    call: Call, leaf_names: set[str], out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> dict[str, Tensor]:
    """Return d loss / d (q, k, v, prefix) and the other requested leaves by name.

    Given are out, lse and d loss / d (out, lse).
    """
    grad_out = grad_out.to(call.dtype)
    # Sum_j p_ij dL/dp_ij = dout_i . out_i, minus the part through lse (d lse / d score = p). Where weights are edited,
    # the values were multiplied by other weights than p, and the sum is taken tile by tile.
    delta = -grad_lse if call.changes_weights else (grad_out * out).sum(-1) - grad_lse
    return gradients(call, leaf_names, lse, delta, grad_out)


def gradients(call: Call, leaf_names: set[str], lse: Tensor, delta: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """Do the same, given delta (see `backward`) and d loss / d out before the gate."""
    go = heads_apart(call, grad_out)
    # In an empty row all cells are at -1e30, so that any finite lse gives exp() = 0.
    empty = lse == -torch.inf
    lse = heads_apart(call, lse.masked_fill(empty, 0) * LOG2E)
    delta = heads_apart(call, delta.masked_fill(empty, 0))
    k, v = key_tensors(call)
    dv = zeros_like(v)
    products, logit_gradients = ProductGradients(call, k), LogitGradients(call, leaf_names)
    for t in tiles(call):
        rows = (t.b, t.h, slice(None), t.i)
        s, origin = logits(call, t, tile_queries(call, t, call.q), k, products.other)
        logits_copy = s.clone() if "temperature" in logit_gradients.grads else None
        x = s.sub_(lse[rows][..., None])  # log2 p
        change, d_weight, delta_rows = tile_weight_edit(call, t), scores(go[rows], v, t), delta[rows]
        if change is None:
            p = x.exp2_()
            add_to_keys(dv, t, p, go[rows])
            ds = d_weight.sub_(delta_rows[..., None]).mul_(p)
        else:
            weights, ds = logit_gradients.through_weights(t, change, x, d_weight)
            add_to_keys(dv, t, weights, go[rows])
            delta_rows = delta_rows + ds.sum(-1)
            ds.addcmul_(x.exp2_(), delta_rows[..., None], value=-1)
        ds = logit_gradients.backward(t, ds, logits_copy, delta_rows, lse[rows], origin)
        if origin.tanh is not None:
            ds.mul_(1 - origin.tanh.square_())
        products.backward(t, ds.mul_(call.scale), origin.swapped)
    grads = {**products.grads(), "v": dv.own, **logit_gradients.grads}
    return grads if dv.shared is None else grads | {"prefix_v": dv.shared}


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
