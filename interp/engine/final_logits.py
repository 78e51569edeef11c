"""The final norm and the unembedding, for residual rows of many prompts at once."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.engine.matmul import redirect_products
from interp.model.model import Model


def compute_final_logits(
    model: Model, rows: Float[Tensor, "rows d_model"], columns: Int[Tensor, "rows k"] | None = None
) -> Float[Tensor, "rows vocab"]:
    """Apply the final norm and the unembedding to residual rows.

    It also applies the scalings that some architectures add. ``columns``: for each row, the token ids of the only
    logits that are needed; the result is then [rows, k].
    """
    bridge, config = model.bridge, getattr(model.bridge.original_model, "config", None)
    if config is not None and model.pictures is not None:
        config = config.get_text_config()
    unembed = getattr(bridge.unembed, "original_component", None)
    with redirect_products(rows.dtype, rows.device):
        normed = bridge.ln_final(rows[None])
        if columns is not None and type(unembed) is torch.nn.Linear:
            logits = torch.einsum("rd,rkd->rk", normed[0], unembed.weight[columns])
            logits = logits if unembed.bias is None else logits + unembed.bias[columns]
        else:
            logits = bridge.unembed(normed)[0]
            logits = logits if columns is None else logits.gather(1, columns)
    divide = getattr(config, "logits_scaling", None)  # Granite
    multiply = getattr(config, "logit_scale", None)  # Cohere
    cap = getattr(config, "final_logit_softcapping", None) or getattr(bridge.cfg, "output_logits_soft_cap", None)
    if isinstance(divide, int | float):
        logits = logits / divide
    if isinstance(multiply, int | float):
        logits = logits * multiply
    if isinstance(cap, int | float) and cap > 0:
        logits = cap * torch.tanh(logits / cap)
    return logits
