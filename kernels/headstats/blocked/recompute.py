"""Gradients by recomputation: from q, k, v, lse and out, tile by tile, whatever backend ran forward."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.blocked.logit_gradients import Shaping
from headstats.blocked.tiles import (
    Keys,
    Tile,
    collect,
    keys_and_values,
    logits,
    mixed,
    pattern_keys,
    queries,
    scores,
    tiles,
    weights_edit,
    zeros_like,
)
from headstats.call import LOG2E, Call, heads_apart

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor


def backward(
    call: Call, wanted: set[str], out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> dict[str, Tensor]:
    """d loss / d (q, k, v, prefix) and what else of LEAVES is wanted, given out, lse and d loss / d (out, lse)."""
    grad_out = grad_out.to(call.dtype)
    # Sum_j p_ij dL/dp_ij = dout_i . out_i, less what comes in through lse (d lse / d score = p). Where weights were
    # edited, p is not what multiplied the values, and the sum is taken tile by tile.
    delta = -grad_lse if call.changes_weights else (grad_out * out).sum(-1) - grad_lse
    return gradients(call, wanted, lse, delta, grad_out)


def gradients(call: Call, wanted: set[str], lse: Tensor, delta: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """The same, given what each unit of weight is charged (delta) and d loss / d out before the gate."""
    go = heads_apart(call, grad_out)
    # In an empty row all cells are at -1e30, so that any finite lse gives exp() = 0.
    empty = lse == -torch.inf
    lse = heads_apart(call, lse.masked_fill(empty, 0) * LOG2E)
    delta = heads_apart(call, delta.masked_fill(empty, 0))
    k, v = keys_and_values(call)
    dv = zeros_like(v)
    products, shaping = Products(call, k), Shaping(call, wanted)
    for t in tiles(call):
        rows = (t.b, t.h, slice(None), t.i)
        s, origin = logits(call, t, queries(call, t, call.q), k, products.other)
        kept = s.clone() if "temperature" in shaping.grads else None
        x = s.sub_(lse[rows][..., None])  # log2 p
        change, d_weight, charged = weights_edit(call, t), scores(go[rows], v, t), delta[rows]
        if change is None:
            p = x.exp2_()
            collect(dv, t, p, go[rows])
            ds = d_weight.sub_(charged[..., None]).mul_(p)
        else:
            weights, ds = shaping.through_weights(t, change, x, d_weight)
            collect(dv, t, weights, go[rows])
            charged = charged + ds.sum(-1)
            ds.addcmul_(x.exp2_(), charged[..., None], value=-1)
        ds = shaping.back(t, ds, kept, charged, lse[rows], origin)
        if origin.tanh is not None:
            ds.mul_(1 - origin.tanh.square_())
        products.back(t, ds.mul_(call.scale), origin.swapped)
    found = {**products.found(), "v": dv.own, **shaping.grads}
    return found if dv.shared is None else found | {"prefix_v": dv.shared}


class Products:
    """Sums of gradients of q and k over tiles, and of those that Edit.pattern_from brings."""

    def __init__(self, call: Call, k: Keys):
        self.call, self.keys, self.other = call, k, pattern_keys(call)
        self.dq, self.dk = k.own.new_zeros(call.q.shape), zeros_like(k)
        if self.other is not None:  # whose prefix is the same
            self.dq2, self.dk2 = torch.zeros_like(self.dq), Keys(torch.zeros_like(k.own), self.dk.shared)

    def back(self, t: Tile, ds: Float[Tensor, "b h g m n"], swapped: Bool[Tensor, "#b #h #g #m"] | None) -> None:
        """ds: d loss / d (q.k).  swapped: rows whose products were of the other q and k."""
        call = self.call
        if swapped is None:
            self._add(t, ds, call.q, self.keys, self.dq, self.dk)
            return
        assert call.pattern_q is not None and self.other is not None  # they are what was swapped in
        swapped = swapped[..., None]
        self._add(t, ds.masked_fill(swapped, 0), call.q, self.keys, self.dq, self.dk)
        self._add(t, ds.masked_fill(~swapped, 0), call.pattern_q, self.other, self.dq2, self.dk2)

    def _add(self, t: Tile, ds: Tensor, q: Tensor, k: Keys, dq: Tensor, dk: Keys) -> None:
        heads_apart(self.call, dq)[t.b, t.h, :, t.i] = mixed(ds, k, t)
        collect(dk, t, ds, queries(self.call, t, q))

    def found(self) -> dict[str, Tensor]:
        """Gradients by name."""
        found = {"q": self.dq, "k": self.dk.own}
        if self.other is not None:
            found |= {"pattern_q": self.dq2, "pattern_k": self.dk2.own}
        return found if self.dk.shared is None else found | {"prefix_k": self.dk.shared}
