"""Run a model as a circuit, with ablated activations on all other edges.

The computation is exact. A receiver reads the residual stream of the current run plus (ablated − current) of the output
of each sender whose edge into it is cut. Every sender's current output is itself computed by the circuit. This takes
one full forward per batch, through hooks. The changes (ablated − current) of the senders, d_model numbers each, are
held in memory if they are small (`HELD_BYTES`). Otherwise, for long prompts, they are computed again for the receivers
of each layer.

This is the slow, direct way, which works for any model with edges. `interp.circuits.evaluation.packed_forward` is the
engine's way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.circuits.wiring import Wiring
from interp.engine.matmul import redirect_products
from interp.model.hooks import hooks

HELD_BYTES = 256 * 2**20  # of senders' changes, d_model numbers per sender and token


@torch.no_grad()
def run_circuit(
    wiring: Wiring,
    ids: Sequence[Sequence[int]],
    mask: Bool[Tensor, "receivers senders"],
    ablated: dict[str, Tensor],
) -> Float[Tensor, "batch vocab"]:
    """Logits of prompts of one length, run with only the edges in ``mask``.

    ``ablated``: by `sender_hooks`, the senders' outputs along the other edges; broadcast to the activations' shapes.
    """
    return Forward(wiring, mask, ablated)(ids)


class Forward:
    """A forward with cut edges: ``forward(ids)`` is the logits of the prompts.

    The prompts have one length. A sender's change is ablated − current of its contribution to the residual stream.
    """

    def __init__(self, wiring: Wiring, mask: Bool[Tensor, "receivers senders"], ablated: dict[str, Tensor]):
        self.wiring, self.graph, self.ablated = wiring, wiring.graph, ablated
        allowed = torch.from_numpy(self.graph.allowed)
        self.cut, self.uncut = allowed & ~mask, allowed & mask
        self.current: dict[str, Tensor] = {}  # activations of this run, by hook name
        self.changes: Float[Tensor, "senders batch*position*d_model"] | None = None  # None: too large to hold
        # Sums of the changes of all senders so far, now and at the start of the layer.
        self.sum, self.sum_before = torch.zeros(()), torch.zeros(())
        self.streams: Float[Tensor, "receivers batch position d_model"] | None = None  # inputs of one layer's q, k, v

    def __call__(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab"]:
        """Logits of the last position."""
        model, last = self.wiring.model, self.graph.n_layers - 1
        final = f"blocks.{last}.hook_resid_post", lambda x, hook: self._final_stream(x)
        with hooks(model, *self._hooks(range(last + 1)), final), redirect_products(model.dtype, model.device):
            return model.last_logits(ids)

    def _hooks(self, layers: range) -> list[tuple[str, Any]]:
        """The hooks inside the blocks."""
        pairs: list[tuple[str, Any]] = []
        for layer in layers:
            at = f"blocks.{layer}."
            pairs.append((at + "hook_resid_pre", self._enter(layer)))
            pairs += [(f"{at}attn.hook_{c}", self._project(layer, c)) for c in "qkv"]
            pairs.append((at + "attn.hook_z", self._sender(at + "attn.hook_z", self.graph.columns(layer, "z"), layer)))
            pairs.append((at + "hook_attn_out", self._store(at + "hook_attn_out")))
            if self.graph.mlps:
                columns = self.graph.columns(layer, "mlp_out")
                pairs.append((at + "mlp.hook_in", self._mlp(layer)))
                pairs.append((at + "hook_mlp_out", self._sender(at + "hook_mlp_out", columns, None)))
        return pairs

    # ------------------------------------------------------------ outputs of senders

    def _enter(self, layer: int) -> Any:
        """The hook at the input of a block."""
        embed = self._sender("blocks.0.hook_resid_pre", slice(0, 1), None)

        def hook(x: Tensor, hook: Any) -> None:
            if layer == 0:
                size = len(self.graph.senders) * x.numel()
                if size * x.element_size() <= HELD_BYTES:
                    self.changes = x.new_zeros(len(self.graph.senders), x.numel())
                    self.sum = x.new_zeros(x.numel())
                embed(x, hook)
            self.current[f"blocks.{layer}.hook_resid_pre"], self.streams, self.sum_before = x, None, self.sum

        return hook

    def _store(self, name: str) -> Any:
        def hook(x: Tensor, hook: Any) -> None:
            self.current[name] = x

        return hook

    def _sender(self, name: str, columns: slice, layer: int | None) -> Any:
        """The hook at senders' outputs: stores them, and their changes.

        ``layer``: of heads; None for other senders.
        """

        def hook(x: Tensor, hook: Any) -> None:
            self.current[name] = x
            if self.changes is not None and self.cut[:, columns].any():
                self.changes[columns] = self._change(name, layer).flatten(1)
                self.sum = self.sum + self.changes[columns].sum(0)

        return hook

    def _change(self, name: str, layer: int | None) -> Float[Tensor, "senders batch position d_model"]:
        """The changes of the senders at one hook.

        ``layer``: of heads; None for other senders.
        """
        change = self.ablated[name] - self.current[name]
        return change[None] if layer is None else self.wiring.contributions(layer, change)

    # ------------------------------------------------------------ inputs of receivers

    def _final_stream(self, x: Tensor) -> Float[Tensor, "batch position d_model"]:
        """The residual stream that the logits read."""
        last = self.graph.n_layers - 1
        return self._add_changes(x, self.graph.rows(last, "resid_post"), last, self.sum)[0]

    def _project(self, layer: int, component: str) -> Any:
        """The hook that computes q, k or v of a layer from its receivers' streams."""
        rows, first = self.graph.rows(layer, component), self.graph.rows(layer, "q").start
        qkv_rows = slice(first, self.graph.rows(layer, "v").stop)

        def hook(x: Tensor, hook: Any) -> Tensor | None:
            if not self.cut[rows].any():
                return None
            if self.streams is None:
                stream = self.current[f"blocks.{layer}.hook_resid_pre"]
                self.streams = self._add_changes(stream, qkv_rows, layer - 1, self.sum_before)
            return self.wiring.project(layer, component, self.streams[rows.start - first : rows.stop - first])

        return hook

    def _mlp(self, layer: int) -> Any:
        """The hook that computes an MLP's input from its stream."""
        rows = self.graph.rows(layer, "mlp_out")

        def hook(x: Tensor, hook: Any) -> Tensor | None:
            if not self.cut[rows].any():
                return None
            stream = self.current[f"blocks.{layer}.hook_resid_pre"]
            if not self.graph.parallel:
                stream = stream + self.current[f"blocks.{layer}.hook_attn_out"]
            total = self.sum_before if self.graph.parallel else self.sum
            return self.wiring.norm(layer, "mlp")(self._add_changes(stream, rows, layer, total)[0])

        return hook

    def _add_changes(
        self, x: Tensor, rows: slice, last_layer: int, total: Tensor
    ) -> Float[Tensor, "rows batch position d_model"]:
        """x plus the changes along the cut edges into ``rows``.

        Changes are those of senders in layers ≤ ``last_layer``. ``total``: the sum of all changes that ``rows`` can
        read. If few edges are uncut, theirs are subtracted from it.
        """
        if self.changes is None:
            return self._add_recomputed(x, rows, last_layer)
        out = x.expand(rows.stop - rows.start, *x.shape)
        # Senders of this layer that are not computed yet have no edge into these rows, so none of theirs is cut.
        stop = 1 if last_layer < 0 else self.graph.columns(last_layer, "mlp_out" if self.graph.mlps else "z").stop
        uncut = self.uncut[rows, :stop].transpose(0, 1).flatten(1).any(1).nonzero()[:, 0]
        if len(uncut) > stop // 2:
            return out + self._sum(self.cut[rows, :stop], self.changes[:stop]).view(out.shape)
        if len(uncut) == 0:
            return out + total.view(x.shape)
        uncut_sum = self._sum(self.uncut[rows][:, uncut], self.changes[uncut.to(x.device)])
        return (x + total.view(x.shape)) - uncut_sum.view(out.shape)

    def _add_recomputed(self, x: Tensor, rows: slice, last_layer: int) -> Float[Tensor, "rows batch position d_model"]:
        """`_add_changes` with changes that are computed again.

        It is used if the changes are too large to hold.
        """
        out = x.expand(rows.stop - rows.start, *x.shape).clone()
        self._add_from(out, self.cut[rows, :1], "blocks.0.hook_resid_pre", None)
        for layer in range(last_layer + 1):
            self._add_from(out, self.cut[rows, self.graph.columns(layer, "z")], f"blocks.{layer}.attn.hook_z", layer)
            if self.graph.mlps:
                columns = self.graph.columns(layer, "mlp_out")
                self._add_from(out, self.cut[rows, columns], f"blocks.{layer}.hook_mlp_out", None)
        return out

    def _add_from(self, out: Tensor, cut: Bool[Tensor, "rows senders"], name: str, layer: int | None) -> None:
        """Add the changes of senders at one hook to ``out``, along edges in ``cut``."""
        if cut.any():
            out += self._sum(cut, self._change(name, layer)).view(out.shape)

    def _sum(
        self, cut: Bool[Tensor, "rows senders"], change: Float[Tensor, "senders ..."]
    ) -> Float[Tensor, "rows numbers"]:
        """For each row, the sum of the changes of senders with an edge in ``cut``."""
        return cut.to(change) @ change.flatten(1)
