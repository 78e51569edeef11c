"""Gradients of what shapes logits: logit = (x - alibi |distance| + bias) / temperature + Edit.bias, and sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from headstats.call import Call, part
from headstats.tiles import LOG2E, Tile, of_cells, of_rows

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

NAMES = ("temperature", "edit_bias", "sinks", "alibi", "bias")


class Shaping:
    """Sums of gradients over tiles, each in the shape of its argument."""

    def __init__(self, call: Call, wanted: set[str]):
        self.call = call
        self.grads = {n: torch.zeros_like(getattr(call, n), dtype=call.dtype) for n in NAMES if n in wanted}

    def back(
        self,
        t: Tile,
        ds: Float[Tensor, "b h g m n"],
        s: Float[Tensor, "b h g m n"] | None,
        delta: Float[Tensor, "b h g m"],
        lse: Float[Tensor, "b h g m"],
    ) -> None:
        """Takes ds from d loss / d logit to d loss / d x, and adds up what passes on the way.

        s: logits, in base 2 as lse is; needed for temperature.  delta: what each unit of weight is charged.
        """
        call = self.call
        heat = None if call.temperature is None else of_rows(call, t, call.temperature)
        if "edit_bias" in self.grads:
            self._edit_bias(t, ds)
        if call.sinks is not None and self.grads:
            sink = of_rows(call, t, call.sinks[None, :, None])
            sink = sink if heat is None else sink / heat
            d_sink = -torch.exp2(sink * LOG2E - lse) * delta  # its value is zero
            if "sinks" in self.grads:
                self._add("sinks", t, d_sink if heat is None else d_sink / heat)
            if "temperature" in self.grads and heat is not None:
                self._add("temperature", t, -d_sink * sink / heat)
        if "temperature" in self.grads:
            assert s is not None and heat is not None  # there is a gradient of it
            x = s / LOG2E if call.edit_bias is None else s / LOG2E - of_cells(call, t, call.edit_bias)
            self._add("temperature", t, -(ds * x).sum(-1) / heat)  # hidden cells: ds is 0 and x finite
        if heat is not None:
            ds.div_(heat[..., None])
        if "alibi" in self.grads:
            away = call.distances(t.i.start, t.i.stop, t.j.start, t.j.stop).abs_().to(ds.dtype)
            self._add("alibi", t, -(ds * away).sum(-1))
        if "bias" in self.grads:
            self._add("bias", t, ds)

    def _add(self, name: str, t: Tile, x: Float[Tensor, "b h g *rest"]) -> None:
        """Sums over what the argument was broadcast along."""
        x, heads = x.flatten(1, 2), slice(t.h.start * self.call.groups, t.h.stop * self.call.groups)
        grad = self.grads[name]
        if grad.dim() == 1:  # a number for each head
            grad[heads] += x.sum((0, 2))
            return
        grad = part(part(grad, t.b), heads, 1)
        if name != "edit_bias":  # which has segments in the place of queries and keys
            grad = part(grad, t.i, 2)
            grad = part(grad, t.j, 3) if grad.dim() == 4 else grad
        grad += x.sum_to_size(grad.shape)

    def _edit_bias(self, t: Tile, ds: Tensor) -> None:
        call = self.call
        assert call.q_segments is not None and call.k_segments is not None  # validated
        sizes = self.grads["edit_bias"].shape[2:]
        ids = (part(call.q_segments, t.b)[:, t.i], part(call.k_segments, t.b)[:, t.j])
        rows, columns = (
            (x.remainder(n)[..., None] == torch.arange(n, device=x.device)).to(ds.dtype).expand(len(ds), -1, -1)
            for x, n in zip(ids, sizes, strict=True)
        )
        per_column = torch.einsum("bhgmn,bnk->bhgmk", ds, columns)
        self._add("edit_bias", t, torch.einsum("bhgmk,bms->bhgsk", per_column, rows))
