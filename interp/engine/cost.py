"""FLOPs and bytes of a model's blocks, by calculation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from interp.model.model import Model

EFFICIENCY = 0.8  # of the rate of matrix products alone; norms, activations and attention take the rest of the time
LAYER_SECONDS = 1e-4  # of a layer in one forward besides its FLOPs: some twenty operations are started


@dataclass(frozen=True)
class BlockCost:
    """FLOPs and bytes of one block.

    ``row``: FLOPs of a row's matrix products. ``qkv``: of those before attention. ``kv``: of those for keys and values
    alone. ``pattern``: FLOPs of one cell of the attention pattern, over all heads. ``bytes``: what a packed row needs
    at its widest.
    """

    row: float
    qkv: float
    kv: float
    pattern: float
    bytes: float

    @classmethod
    def of(cls, model: Model) -> BlockCost:
        """Cost of the model's first block; only the active experts count."""
        block = model.bridge.blocks[0]
        config = getattr(model.bridge.original_model, "config", None)
        total = int(getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1)
        active = int(getattr(config, "num_experts_per_tok", None) or total)
        weights = attention = widest = 0
        for name, weight in block.original_component.named_parameters():
            if weight.ndim < 2:
                continue
            numel = weight.numel() * (active / total if "experts" in name else 1)
            weights += numel
            widest += numel / model.d_model
            attention += numel if "attn" in name or "attention" in name else 0
        d_head = int(model.bridge.cfg.d_head)
        heads, kv = model.n_heads * d_head, model.n_kv_heads * d_head
        qkv, kv = (min(attention, model.d_model * width) for width in (heads + 2 * kv, 2 * kv))
        size = torch.finfo(model.dtype).bits // 8
        # the residual stream and its copies, and the outputs of all the block's products
        return cls(2 * weights, 2 * qkv, 2 * kv, 4 * heads, size * (6 * model.d_model + widest))
