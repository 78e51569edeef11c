"""The state of a model that its parameters do not show: buffers, such as rotary frequencies."""

from __future__ import annotations

from typing import Any

from interp.utils.provenance import weights_hash

PROMPT_DEPENDENT = ("dynamic", "longrope")  # rotary embeddings that change their own frequencies with a prompt's length


def buffer_state(hf: Any) -> str:
    """Return a short hash over a Hugging Face model's buffers and the scales of its rotary embeddings.

    Frequencies that the model itself changes from prompt to prompt are left out.
    """
    buffers, scales = [], []
    for path, module in hf.named_modules():
        if getattr(module, "rope_type", None) in PROMPT_DEPENDENT:
            continue
        buffers += [(f"{path}.{name}", x) for name, x in module.named_buffers(recurse=False)]
        if isinstance(scale := module.__dict__.get("attention_scaling"), int | float):
            scales.append(f"{path} {scale}")
    return f"{weights_hash(buffers)} {' '.join(scales)}"
