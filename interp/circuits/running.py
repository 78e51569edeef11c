"""Run a model as a circuit: every edge outside it carries an ablated activation, exactly.

What a receiver reads is the residual stream of this very run plus, for each sender whose edge into it is left out,
(ablated − current) of what that sender adds. Every sender's current output is itself computed by the circuit. One full
forward per batch, through hooks; of senders' outputs in d_model numbers one layer's exist at a time, of receivers'
inputs one component's of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.circuits.wiring import Wiring
from interp.engine.runs import hooks


def sender_hooks(wiring: Wiring) -> list[str]:
    """The hooks that carry what senders send: what enters block 0, z of every layer, the output of every MLP."""
    layers = range(wiring.graph.n_layers)
    names = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.attn.hook_z" for i in layers)]
    return names + [f"blocks.{i}.hook_mlp_out" for i in layers] * wiring.graph.mlps


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
    return _Forward(wiring, kept, ablated)(ids)


class _Forward:
    def __init__(self, wiring: Wiring, kept: Bool[Tensor, "receivers senders"], ablated: dict[str, Tensor]):
        self.wiring, self.graph, self.ablated = wiring, wiring.graph, ablated
        self.cut = torch.from_numpy(self.graph.allowed) & ~kept
        self.now: dict[str, Tensor] = {}

    def __call__(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab"]:
        model, last = self.wiring.model, self.graph.n_layers - 1
        pairs: list[tuple[str, Any]] = []
        for layer in range(self.graph.n_layers):
            at = f"blocks.{layer}."
            pairs += [(at + name, self._keep(at + name)) for name in ("hook_resid_pre", "attn.hook_z", "hook_attn_out")]
            pairs += [(f"{at}attn.hook_{c}", self._project(layer, c)) for c in "qkv"]
            if self.graph.mlps:
                pairs.append((at + "mlp.hook_in", self._mlp(layer)))
                pairs.append((at + "hook_mlp_out", self._keep(at + "hook_mlp_out")))
        final = self.graph.rows(last, "resid_post")
        pairs.append((f"blocks.{last}.hook_resid_post", lambda x, hook: self._add(x, final, last, heads=False)))
        with hooks(model, *pairs):
            return model.last_logits(torch.tensor([list(p) for p in ids], device=model.device))

    def _keep(self, name: str) -> Any:
        return lambda x, hook: self.now.__setitem__(name, x)

    def _project(self, layer: int, component: str) -> Any:
        rows = self.graph.rows(layer, component)

        def hook(x: Tensor, hook: Any) -> Tensor | None:
            if not self.cut[rows].any():
                return None
            read = self._add(self.now[f"blocks.{layer}.hook_resid_pre"], rows, layer - 1, heads=True)
            return self.wiring.project(layer, component, read)

        return hook

    def _mlp(self, layer: int) -> Any:
        rows = self.graph.rows(layer, "mlp_out")

        def hook(x: Tensor, hook: Any) -> Tensor | None:
            if not self.cut[rows].any():
                return None
            stream = self.now[f"blocks.{layer}.hook_resid_pre"]
            if not self.graph.parallel:
                stream = stream + self.now[f"blocks.{layer}.hook_attn_out"]
            return self.wiring.norm(layer, "mlp")(self._add(stream, rows, layer, heads=False))

        return hook

    def _add(self, x: Tensor, rows: slice, upto: int, heads: bool) -> Tensor:
        """x plus ablated − current of the cut edges into ``rows``; of layers ≤ upto.  [rows, batch, position, d_model],
        or without the first axis for a receiver alone (``heads=False``)."""
        out = x.expand(rows.stop - rows.start, *x.shape).clone()
        self._send(out, rows, slice(0, 1), "blocks.0.hook_resid_pre", None)
        for layer in range(upto + 1):
            self._send(out, rows, self.graph.columns(layer, "z"), f"blocks.{layer}.attn.hook_z", layer)
            if self.graph.mlps:
                columns = self.graph.columns(layer, "mlp_out")
                self._send(out, rows, columns, f"blocks.{layer}.hook_mlp_out", None)
        return out if heads else out[0]

    def _send(self, out: Tensor, rows: slice, columns: slice, name: str, layer: int | None) -> None:
        cut = self.cut[rows, columns]
        if not cut.any():
            return
        change = self.ablated[name] - self.now[name]
        sent = change[None] if layer is None else self.wiring.contributions(layer, change)
        out += torch.einsum("rs,s...->r...", cut.to(out), sent)
