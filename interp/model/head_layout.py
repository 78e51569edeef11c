"""Corrections of hooks of q and z that TransformerLens splits into other pieces than the model's heads."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


class SplitHeads:
    """The conversion of a hook on [batch, position, heads · width]: it shows one axis for heads.

    It replaces TransformerLens' conversion where that one divides by another width (DeepSeek: the output projection's
    input has heads of ``v_head_dim``, not of ``head_dim``).
    """

    splits_attention_heads = True  # as TransformerLens marks its own conversions to this layout

    def __init__(self, n_heads: int):
        self.n_heads = n_heads

    def convert(
        self, x: Float[Tensor, "batch position heads*width"], *context: Any
    ) -> Float[Tensor, "batch position heads width"]:
        """Show the heads."""
        return x.unflatten(-1, (self.n_heads, -1)) if x.ndim == 3 else x

    def revert(
        self, x: Float[Tensor, "batch position heads width"], *context: Any
    ) -> Float[Tensor, "batch position heads*width"]:
        """Join the heads that a hook returned."""
        return x.flatten(2) if x.ndim == 4 else x


class SplitGatedQueries:
    """The conversion of a hook on a projection that gives each head's query, then the gate of its output.

    It shows the queries alone [batch, position, heads, width] (Qwen 3 Next, Qwen 3.5). The gates have a hook of their
    own, ``hook_q_gate``.
    """

    splits_attention_heads = True

    def __init__(self, n_heads: int):
        self.n_heads = n_heads
        self.gates: list[Tensor] = []  # of the value that is shown; TransformerLens reverts what a hook returned

    def convert(
        self, x: Float[Tensor, "batch position heads*2*width"], *context: Any
    ) -> Float[Tensor, "batch position heads width"]:
        """Show the queries, and keep the gates."""
        if x.ndim != 3:
            return x
        queries, gates = x.unflatten(-1, (self.n_heads, -1)).chunk(2, dim=-1)
        self.gates = [gates]
        return queries

    def revert(
        self, x: Float[Tensor, "batch position heads width"], *context: Any
    ) -> Float[Tensor, "batch position heads*2*width"]:
        """Join the queries that a hook returned with their gates."""
        return torch.cat([x, self.gates[-1]], dim=-1).flatten(2) if x.ndim == 4 else x


def correct_heads(bridge: Any) -> None:
    """Correct the hooks of a bridge's attention layers whose heads TransformerLens splits wrongly."""
    for block in getattr(bridge, "blocks", ()):
        attn = getattr(block, "attn", None)
        if attn is None:
            continue
        n_heads = int(attn.config.n_heads)
        if hasattr(attn, "hook_q_latent"):  # latent attention: heads of keys and values differ in width
            attn.o.hook_in.hook_conversion = SplitHeads(n_heads)
        elif hasattr(attn, "hook_q_gate"):
            attn.q.hook_out.hook_conversion = SplitGatedQueries(n_heads)
