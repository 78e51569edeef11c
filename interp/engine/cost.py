"""FLOPs and bytes of a model's blocks, by calculation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from interp.model.model import Model

EFFICIENCY = 0.8  # of the matrix products' own rate; norms, activations and attention take the rest


@dataclass(frozen=True)
class BlockCost:
    """What one block costs: FLOPs of a row's matrix products (``qkv``: those before attention, ``kv``: of these without
    queries), and of one cell of its attention pattern, over all heads; and bytes that a packed row needs at its widest.
    """  # fmt: skip

    row: float
    qkv: float
    kv: float
    pattern: float
    bytes: float

    @classmethod
    def of(cls, model: Model) -> BlockCost:
        """Of the model's first block; of experts only the active ones count."""
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
        # the residual and its copies, and everything that the block's products put out
        return cls(2 * weights, 2 * qkv, 2 * kv, 4 * heads, size * (6 * model.d_model + widest))
