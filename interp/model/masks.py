"""Attention masks without the n×n matrix.

They are represented by padding, causality and window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp.errors import ModelError
from interp.model.attention_call import UNALIGNED, UNKNOWN


@dataclass(frozen=True)
class MaskNote:
    """The meaning of a Hugging Face mask.

    It is attached to the 2D padding tensor that `compact_mask` returns.
    """

    causal: bool
    window: int | None
    first_key: int = 0  # position of the first key that is still held: not 0 where a cache slides


def compact_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Any = None, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True,
    local_size: int | None = None, device: Any = "cpu", **kwargs: Any,
) -> Tensor:  # fmt: skip
    """Mask function for transformers that avoids n×n masks.

    Returns 2D padding plus a note for plain masks, a dense 4D mask for all others.
    """
    from transformers import masking_utils as mu

    kind = _mask_kind(mask_function, mu)
    is_full = kind is not None and not kind.causal and kind.window is None  # cross-attention: positions do not matter
    is_aligned = is_full or q_offset + q_length == kv_offset + kv_length
    padding_fits = attention_mask is None or attention_mask.shape[1] >= kv_length
    if kind is None or not is_aligned or not padding_fits or kwargs.get("use_vmap"):
        mask = mu.eager_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device, **kwargs
        )
        if isinstance(mask, Tensor):
            mask.interp_first_key = int(kv_offset) if is_aligned else UNALIGNED  # type: ignore[attr-defined]
        return mask
    if attention_mask is None:
        padding = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        padding = attention_mask[:, -kv_length:].bool()
    padding = padding.clone()  # the note must not end up on the caller's tensor
    if kv_offset and attention_mask is not None and not bool(attention_mask[:, :kv_offset].all()):
        first_key = UNKNOWN  # some of the keys that are gone were padding
    else:
        first_key = int(kv_offset)
    padding.interp_note = replace(kind, first_key=first_key)  # type: ignore[attr-defined]
    return padding


def _mask_kind(function: Any, mu: Any) -> MaskNote | None:
    """Recognise transformers' plain causal, sliding-window and bidirectional masks.

    Returns None for any other mask.
    """
    if function is mu.causal_mask_function:
        return MaskNote(causal=True, window=None)
    if function is mu.bidirectional_mask_function:
        return MaskNote(causal=False, window=None)
    parts = _closure_of(function, "and_mask").get("mask_functions", ())
    if len(parts) == 2 and parts[1] is mu.causal_mask_function:
        window = _closure_of(parts[0], "inner_mask").get("sliding_window")
        if isinstance(window, int) and parts[0].__qualname__.startswith("sliding_window_overlay"):
            return MaskNote(causal=True, window=window)
    if len(parts) == 2 and parts[1] is mu.bidirectional_mask_function:
        window = _closure_of(parts[0], "inner_mask").get("sliding_window")
        if isinstance(window, int) and parts[0].__qualname__.startswith("sliding_window_bidirectional_overlay"):
            return MaskNote(causal=False, window=window + 1)  # transformers does not count the query itself
    return None


def _closure_of(function: Any, name: str) -> dict[str, Any]:
    """The closure variables of a function called ``name``; empty for any other."""
    if getattr(function, "__name__", "") != name or not function.__closure__:
        return {}
    return dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__), strict=True))


def read_mask(mask: Tensor | None) -> dict[str, Any]:
    """Convert the mask of an attention module into fields of an AttentionCall."""
    if mask is None:  # no mask function ran: transformers' eager attention then shows every key
        return {"causal": False}
    note: MaskNote | None = getattr(mask, "interp_note", None)
    if note is not None:
        fields = {"causal": note.causal, "window": note.window, "first_key": note.first_key}
        return {**fields, "key_padding": None if bool(mask.all()) else mask}
    if mask.ndim == 4:  # a dense mask of the model or the user: taken as it is
        first_key = getattr(mask, "interp_first_key", 0)
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
        else:
            mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, float("-inf"))
        return {"causal": False, "bias": mask, "first_key": first_key}
    raise ModelError(
        f"this model reshapes its attention mask (got {tuple(mask.shape)}) before attention, "
        "which interp does not support; please report the architecture"
    )
