"""Gradients of the arguments that shape logits, and of learned sinks.

logit = (x - alibi |distance| + bias) / temperature + log gain, where x = factor z + raise |factor z|.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from headstats.blocked import weight_gradients
from headstats.blocked.tiles import LogitParts, Tile, query_heads, tile_edit_cells, tile_rows
from headstats.call import LOG2E, Call, slice_axis
from headstats.edits.weights import WeightEdit

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

NAMES = ("logit_factor", "logit_raise", "temperature", "edit_bias", "gain", "keep_fraction", "sinks", "alibi", "bias")
TABLES = ("logit_factor", "logit_raise", "edit_bias", "gain")  # over pairs of segments


@dataclass
class RowGradients:
    """What the gradients of whole rows are computed from.

    shift: the largest logit, in base 2.  inverse: 1 / sum of 2^(logit - shift).  sink: the weight of the learned sink.
    delta: sum_j p_ij dL/dp_ij - dL/dlse_i.  grad_lse: dL/dlse_i.
    """

    shift: Float[Tensor, "b h g m"]
    inverse: Float[Tensor, "b h g m"]
    sink: Float[Tensor, "b h g m"] | None
    delta: Float[Tensor, "b h g m"]
    grad_lse: Float[Tensor, "b h g m"]


class LogitGradients:
    """Sums of gradients over tiles, each in the shape of its argument."""

    def __init__(self, call: Call, leaf_names: set[str]):
        self.call = call
        self.grads = {n: torch.zeros_like(getattr(call, n), dtype=call.dtype) for n in NAMES if n in leaf_names}

    def backward(
        self,
        t: Tile,
        ds: Float[Tensor, "b h g m n"],
        s: Float[Tensor, "b h g m n"] | None,
        row: RowGradients,
        origin: LogitParts,
    ) -> Float[Tensor, "b h g m n"]:
        """Turn ds = d loss / d logit (overwritten) into d loss / d z.

        The gradients of the arguments on the way are added up.

        s: logits less the row's largest, in base 2; needed for temperature.
        """
        call = self.call
        temperature = None if call.temperature is None else tile_rows(call, t, call.temperature)
        if "edit_bias" in self.grads:
            self.add_table("edit_bias", t, ds)
        d_sink = None if row.sink is None else -row.sink * row.delta  # the sink has the value 0
        if "sinks" in self.grads and d_sink is not None:
            self.add("sinks", t, d_sink if temperature is None else d_sink / temperature)
        if "temperature" in self.grads:
            assert s is not None and temperature is not None  # it requires a gradient
            self.add("temperature", t, -self._sum_of_logits(t, ds, s, row, d_sink, temperature) / temperature)
        if temperature is not None:
            ds.div_(temperature[..., None])
        if "alibi" in self.grads:
            distance = call.distances(t.i.start, t.i.stop, t.j.start, t.j.stop).abs_().to(ds.dtype)
            self.add("alibi", t, -(ds * distance).sum(-1))
        if "bias" in self.grads:
            self.add("bias", t, ds)
        return ds if origin.z is None else self._through_reshaping(t, ds, origin.z / LOG2E)

    def _sum_of_logits(
        self, t: Tile, ds: Tensor, s: Tensor, row: RowGradients, d_sink: Tensor | None, temperature: Tensor
    ) -> Float[Tensor, "b h g m"]:
        """Return the sum of d loss / d logit times logit over keys and the sink, for logits that temperature divides.

        Adding a number to all logits changes lse alone, so that the sum of d loss / d logit is d loss / d lse. The
        largest logit is therefore left out of the sum, where it would cost digits, and added with that factor.
        """
        call = self.call
        x = s / LOG2E if call.edit_bias is None else s / LOG2E - tile_edit_cells(call, t, call.edit_bias)
        total = (ds * x).sum(-1)  # in hidden cells ds is 0 and x is finite
        if d_sink is not None and call.sinks is not None:
            sink = tile_rows(call, t, call.sinks[None, :, None]) / temperature
            total = total + d_sink * (sink - row.shift / LOG2E)
        return total + row.grad_lse * row.shift / LOG2E

    def through_weights(
        self, t: Tile, change: WeightEdit, x: Float[Tensor, "b h g m n"], d_weight: Float[Tensor, "b h g m n"]
    ) -> tuple[Float[Tensor, "b h g m n"], Float[Tensor, "b h g m n"]]:
        """Return the weights after an edit, and d loss / d ln p before it. x: log2 p."""
        edit = weight_gradients.backward(change, x, d_weight)
        if "gain" in self.grads and edit.gain is not None:
            self.add_table("gain", t, edit.gain)
        if "keep_fraction" in self.grads and edit.keep is not None:
            self.add("keep_fraction", t, edit.keep)
        return edit.weights, edit.log_p

    def _through_reshaping(self, t: Tile, ds: Tensor, z: Tensor) -> Tensor:
        """Go back through Edit.logit_raise and then logit_factor."""
        call = self.call
        factor = None if call.logit_factor is None else tile_edit_cells(call, t, call.logit_factor)
        scaled = z if factor is None else z * factor
        if "logit_raise" in self.grads:
            self.add_table("logit_raise", t, ds * scaled.abs())
        if call.logit_raise is not None:
            ds = ds * (1 + tile_edit_cells(call, t, call.logit_raise) * scaled.sign())
        if "logit_factor" in self.grads:
            self.add_table("logit_factor", t, ds * z)
        return ds if factor is None else ds * factor

    def add(self, name: str, t: Tile, x: Float[Tensor, "b h g *rest"]) -> None:
        """Add x, summed over the axes along which the argument was broadcast."""
        x, heads = x.flatten(1, 2), query_heads(self.call, t)
        grad = self.grads[name]
        if grad.dim() == 1:  # a number for each head
            grad[heads] += x.sum((0, 2))
            return
        grad = slice_axis(slice_axis(grad, t.b), heads, 1)
        if name not in TABLES:  # tables have segments in place of queries and keys
            grad = slice_axis(grad, t.i, 2)
            grad = slice_axis(grad, t.j, 3) if grad.dim() == 4 else grad
        grad += x.sum_to_size(grad.shape)

    def add_table(self, name: str, t: Tile, x: Float[Tensor, "b h g m n"]) -> None:
        """Add x, summed over the cells of each pair of segments."""
        call = self.call
        assert call.edit_q_segments is not None and call.k_segments is not None  # validated
        ids = (slice_axis(call.edit_q_segments, t.b)[:, t.i], slice_axis(call.k_segments, t.b)[:, t.j])
        rows, columns = (
            (x_ids.remainder(n)[..., None] == torch.arange(n, device=x.device)).to(x.dtype).expand(len(x), -1, -1)
            for x_ids, n in zip(ids, self.grads[name].shape[2:], strict=True)
        )
        per_column = torch.einsum("bhgmn,bnk->bhgmk", x, columns)
        self.add(name, t, torch.einsum("bhgmk,bms->bhgsk", per_column, rows))
