"""Run a model as a circuit: every edge outside it carries an ablated activation, exactly.

What a receiver reads is the residual stream of this very run plus, for each sender whose edge into it is left out,
(ablated − current) of what that sender adds. Every sender's current output is itself computed by the circuit. One full
forward per batch, through hooks. What senders change, d_model numbers each, is held where it is small (`HELD_BYTES`);
beyond that, for long prompts, it is computed again for every receiver, one layer's at a time.

This is the slow, obvious way, which any model with edges can go; `interp.circuits.evaluation.packed_forward` is the
engine's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.circuits.wiring import Wiring
from interp.engine.matmul import redirected
from interp.model.hooks import hooks

HELD_BYTES = 256 * 2**20  # of what senders change, d_model numbers per sender and token


@torch.no_grad()
def run_circuit(
    wiring: Wiring,
    ids: Sequence[Sequence[int]],
    kept: Bool[Tensor, "receivers senders"],
    ablated: dict[str, Tensor],
) -> Float[Tensor, "batch vocab"]:
    """Logits of prompts of one length, run with the edges ``kept`` alone.

    ``ablated``: by `sender_hooks`, what senders send along the other edges; broadcast to the activations' shapes.
    """
    return Forward(wiring, kept, ablated)(ids)


class Forward:
    """One forward of prompts of one length with some edges cut: ``forward(ids)`` is its logits."""

    def __init__(self, wiring: Wiring, kept: Bool[Tensor, "receivers senders"], ablated: dict[str, Tensor]):
        self.wiring, self.graph, self.ablated = wiring, wiring.graph, ablated
        allowed = torch.from_numpy(self.graph.allowed)
        self.cut, self.kept = allowed & ~kept, allowed & kept
        self.now: dict[str, Tensor] = {}
        self.held: Float[Tensor, "senders batch*position*d_model"] | None = None
        # Sums over senders of what is held: of all so far, and when the layer was entered.
        self.sum, self.sum_before = torch.zeros(()), torch.zeros(())
        self.reads: Float[Tensor, "receivers batch position d_model"] | None = None  # of one layer's q, k and v

    def __call__(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab"]:
        """Logits of the last position."""
        model, last = self.wiring.model, self.graph.n_layers - 1
        final = f"blocks.{last}.hook_resid_post", lambda x, hook: self._logits_read(x)
        with hooks(model, *self._hooks(range(last + 1)), final), redirected(model.dtype, model.device):
            return model.last_logits(torch.tensor([list(p) for p in ids], device=model.device))

    def _hooks(self, layers: range) -> list[tuple[str, Any]]:
        """What happens inside the blocks."""
        pairs: list[tuple[str, Any]] = []
        for layer in layers:
            at = f"blocks.{layer}."
            pairs.append((at + "hook_resid_pre", self._enter(layer)))
            pairs += [(f"{at}attn.hook_{c}", self._project(layer, c)) for c in "qkv"]
            pairs.append((at + "attn.hook_z", self._keep(at + "attn.hook_z", self.graph.columns(layer, "z"), layer)))
            pairs.append((at + "hook_attn_out", lambda x, hook, at=at: self.now.__setitem__(at + "hook_attn_out", x)))
            if self.graph.mlps:
                columns = self.graph.columns(layer, "mlp_out")
                pairs.append((at + "mlp.hook_in", self._mlp(layer)))
                pairs.append((at + "hook_mlp_out", self._keep(at + "hook_mlp_out", columns, None)))
        return pairs

    # ------------------------------------------------------------ what senders send

    def _enter(self, layer: int) -> Any:
        keep = self._keep("blocks.0.hook_resid_pre", slice(0, 1), None)

        def hook(x: Tensor, hook: Any) -> None:
            if layer == 0:
                size = len(self.graph.senders) * x.numel()
                if size * x.element_size() <= HELD_BYTES:
                    self.held = x.new_zeros(len(self.graph.senders), x.numel())
                    self.sum = x.new_zeros(x.numel())
                keep(x, hook)
            self.now[f"blocks.{layer}.hook_resid_pre"], self.reads, self.sum_before = x, None, self.sum

        return hook

    def _keep(self, name: str, columns: slice, layer: int | None) -> Any:
        def hook(x: Tensor, hook: Any) -> None:
            self.now[name] = x
            if self.held is not None and self.cut[:, columns].any():
                self.held[columns] = self._change(name, layer).flatten(1)
                self.sum = self.sum + self.held[columns].sum(0)

        return hook

    def _change(self, name: str, layer: int | None) -> Float[Tensor, "senders batch position d_model"]:
        """Ablated − current of what some senders add. ``layer``: of heads."""
        change = self.ablated[name] - self.now[name]
        return change[None] if layer is None else self.wiring.contributions(layer, change)

    # ------------------------------------------------------------ what receivers read

    def _logits_read(self, x: Tensor) -> Float[Tensor, "batch position d_model"]:
        last = self.graph.n_layers - 1
        return self._add(x, self.graph.rows(last, "resid_post"), last, self.sum)[0]

    def _project(self, layer: int, component: str) -> Any:
        rows, first = self.graph.rows(layer, component), self.graph.rows(layer, "q").start
        every = slice(first, self.graph.rows(layer, "v").stop)

        def hook(x: Tensor, hook: Any) -> Tensor | None:
            if not self.cut[rows].any():
                return None
            if self.reads is None:
                stream = self.now[f"blocks.{layer}.hook_resid_pre"]
                self.reads = self._add(stream, every, layer - 1, self.sum_before)
            return self.wiring.project(layer, component, self.reads[rows.start - first : rows.stop - first])

        return hook

    def _mlp(self, layer: int) -> Any:
        rows = self.graph.rows(layer, "mlp_out")

        def hook(x: Tensor, hook: Any) -> Tensor | None:
            if not self.cut[rows].any():
                return None
            stream = self.now[f"blocks.{layer}.hook_resid_pre"]
            if not self.graph.parallel:
                stream = stream + self.now[f"blocks.{layer}.hook_attn_out"]
            total = self.sum_before if self.graph.parallel else self.sum
            return self.wiring.norm(layer, "mlp")(self._add(stream, rows, layer, total)[0])

        return hook

    def _add(self, x: Tensor, rows: slice, upto: int, total: Tensor) -> Float[Tensor, "rows batch position d_model"]:
        """x plus ablated − current of the cut edges into ``rows``, of senders in layers ≤ ``upto``.

        ``total``: the sum over all that ``rows`` can read; where few edges are kept, those are taken off it.
        """
        out = x.expand(rows.stop - rows.start, *x.shape)
        if self.held is not None:
            # of this layer's senders that are not computed yet, no edge into these rows exists, so that none is cut
            stop = 1 if upto < 0 else self.graph.columns(upto, "mlp_out" if self.graph.mlps else "z").stop
            some = self.kept[rows, :stop].transpose(0, 1).flatten(1).any(1).nonzero()[:, 0]
            if len(some) > stop // 2:
                return out + self._sum(self.cut[rows, :stop], self.held[:stop]).view(out.shape)
            if len(some) == 0:
                return out + total.view(x.shape)
            taken = self._sum(self.kept[rows][:, some], self.held[some.to(x.device)])
            return (x + total.view(x.shape)) - taken.view(out.shape)
        out = out.clone()
        self._send(out, self.cut[rows, :1], "blocks.0.hook_resid_pre", None)
        for layer in range(upto + 1):
            self._send(out, self.cut[rows, self.graph.columns(layer, "z")], f"blocks.{layer}.attn.hook_z", layer)
            if self.graph.mlps:
                columns = self.graph.columns(layer, "mlp_out")
                self._send(out, self.cut[rows, columns], f"blocks.{layer}.hook_mlp_out", None)
        return out

    def _send(self, out: Tensor, cut: Bool[Tensor, "rows senders"], name: str, layer: int | None) -> None:
        if cut.any():
            out += self._sum(cut, self._change(name, layer)).view(out.shape)

    def _sum(
        self, cut: Bool[Tensor, "rows senders"], change: Float[Tensor, "senders ..."]
    ) -> Float[Tensor, "rows numbers"]:
        """For each row, the sum of what some senders change."""
        return cut.to(change) @ change.flatten(1)
