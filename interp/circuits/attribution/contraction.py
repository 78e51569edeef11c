"""Scores of all edges: senders' outputs times gradients, summed over tokens.

Gradients are those at the receivers' inputs. Both factors have d_model numbers per node and token. They never exist for
all nodes and tokens at the same time: the product is computed for a chunk of tokens (`CHUNK_BYTES`), all senders, and
the receivers of a few layers at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.attribution.gradients import LayerGradients, through_norm
from interp.circuits.wiring import Wiring

WAITING_BYTES = 384 * 2**20  # of gradients, per head and layer, that wait to be contracted
CHUNK_BYTES = 96 * 2**20  # of nodes × tokens × d_model in one chunk
LAYERS = 8  # whose receivers are contracted together: products are large enough, and little of them is discarded


class Contraction:
    """The scores of all edges, accumulated over layers.

    ``total`` [receivers, senders], float64, is sender's output · gradient at the receiver, summed over all tokens.
    ``sent`` holds activations by sender hook: z [batch, position, heads, d_head], the others [batch, position,
    d_model].
    """

    def __init__(self, wiring: Wiring, sent: dict[str, Tensor]):
        self.wiring, self.graph = wiring, wiring.graph
        self.sent = {name: x.flatten(0, 1) for name, x in sent.items()}
        self.tokens = len(self.sent["blocks.0.hook_resid_pre"])
        self.total = torch.zeros(self.graph.allowed.shape, dtype=torch.float64)
        self.waiting: list[LayerGradients] = []

    def receive(self, received: LayerGradients) -> None:
        """Accept one layer's gradients.

        Contract all waiting gradients once they exceed `WAITING_BYTES`.
        """
        self.waiting.append(received)
        if sum(r.bytes for r in self.waiting) > WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Contract all waiting gradients."""
        if not self.waiting:
            return
        layers = sorted(self.waiting, key=lambda r: r.layer)
        self.waiting = []
        groups = [layers[i : i + LAYERS] for i in range(0, len(layers), LAYERS)]
        d_model = self.sent["blocks.0.hook_resid_pre"].shape[-1]
        nodes = len(self.graph.senders) + LAYERS * -(-len(self.graph.receivers) // self.graph.n_layers)
        step = max(1, CHUNK_BYTES // (4 * nodes * d_model))
        for start in range(0, self.tokens, step):
            rows = slice(start, start + step)
            sent = self._sending(rows, layers[-1].layer).flatten(1)
            for group in groups:
                receivers, gradients = self._receiving(rows, group)
                n_senders = self._senders_until(group[-1].layer)
                self.total[receivers, :n_senders] += (gradients.flatten(1) @ sent[:n_senders].T).double().cpu()

    def _senders_until(self, layer: int) -> int:
        """Number of senders up to and including a layer."""
        if layer >= self.graph.n_layers:
            return len(self.graph.senders)
        return self.graph.columns(layer, "mlp_out" if self.graph.mlps else "z").stop

    def _sending(self, tokens: slice, last_layer: int) -> Float[Tensor, "senders tokens d_model"]:
        """Contributions of the senders up to a layer to the residual stream."""
        parts = [self.sent["blocks.0.hook_resid_pre"][tokens][None]]
        for layer in range(min(last_layer + 1, self.graph.n_layers)):
            parts.append(self.wiring.contributions(layer, self.sent[f"blocks.{layer}.attn.hook_z"][tokens]))
            if self.graph.mlps:
                parts.append(self.sent[f"blocks.{layer}.hook_mlp_out"][tokens][None])
        return torch.cat(parts)

    def _receiving(
        self, tokens: slice, group: Sequence[LayerGradients]
    ) -> tuple[slice, Float[Tensor, "receivers tokens d_model"]]:
        """Rows of the receivers of some layers, and gradients at the streams they read.

        The streams are those before the norms.
        """
        parts: list[Tensor] = []
        for received in group:
            grads = {name: g.flatten(0, 1)[tokens] for name, g in received.grads.items()}
            streams = {name: x.flatten(0, 1)[tokens] for name, x in received.streams.items()}
            if "logits" in grads:
                parts.append(grads["logits"][None])
                continue
            layer = received.layer
            normed = [torch.einsum("phe,hed->hpd", grads[c], self.wiring.reads(layer, c)) for c in "qkv"]
            parts.append(through_norm(self.wiring.norm(layer, "attn"), streams["attn"], torch.cat(normed)))
            if self.graph.mlps:
                parts.append(through_norm(self.wiring.norm(layer, "mlp"), streams["mlp"], grads["mlp"][None]))
        first, stop = group[0].layer, len(self.graph.receivers)
        start = stop - 1 if first == self.graph.n_layers else self.graph.rows(first, "q").start
        return slice(start, start + sum(len(p) for p in parts)), torch.cat(parts)
