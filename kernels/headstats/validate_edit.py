"""Checks of an Edit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headstats.edit import Edit
from headstats.validate_keys import four_dimensions, same_device, segment_table


def edit_fields(edit: Edit, shape: tuple[int, int, int, int], q: Tensor, k_segments: Any) -> dict[str, Any]:
    """The fields of `Call` that an edit sets. shape: B, H, M, Dv."""
    for name in ("renormalise", "report_mass"):
        if not isinstance(getattr(edit, name), bool):
            raise TypeError(f"Edit.{name}={getattr(edit, name)!r}: True or False expected")
    if not edit.renormalise and edit.knockout is None:
        raise ValueError("Edit.renormalise=False says how to knock out, but Edit.knockout is None")
    if edit.report_mass and k_segments is None:
        raise ValueError("Edit.report_mass=True reports the mass on key segments and needs k_segments=, which is None")
    gate = _rows("gate", edit.gate, shape[:3], q)
    if gate is None and edit.replacement is not None:
        gate = torch.zeros(1, 1, 1, device=q.device)
    temperature = _rows("temperature", edit.temperature, shape[:3], q)
    if temperature is not None and not bool(((temperature > 0) & temperature.isfinite()).all()):
        raise ValueError(f"Edit.temperature goes down to {float(temperature.min())}: finite numbers > 0 expected")
    return {
        "gate": gate,
        "replacement": _replacement(edit.replacement, shape, q),
        "temperature": temperature,
        "edit_bias": _log_gain(edit.bias, shape[:2], q),
        "knockout": segment_table("Edit.knockout", edit.knockout, shape[:2], q, neutral=False),
        "renormalise": edit.renormalise,
    }


def _log_gain(t: Any, heads: tuple[int, int], q: Tensor) -> Tensor | None:
    if t is None:
        return None
    same_device("Edit.bias", t, q)
    if not bool(t.isfinite().all()):
        raise ValueError("Edit.bias holds numbers that are not finite: use Edit.knockout to cut a pair of segments")
    return torch.nn.functional.pad(four_dimensions("Edit.bias", t, heads), (0, 1, 0, 1))


def _rows(name: str, t: Any, shape: tuple[int, ...], q: Tensor) -> Tensor | None:
    """A number for each head, or for each head and query, as [#B, #H, #M]."""
    if t is None:
        return None
    same_device(f"Edit.{name}", t, q)
    whole = t if t.dim() == 3 else t[..., None]
    if not _broadcasts(whole, shape):
        raise ValueError(
            f"Edit.{name} has shape {list(t.shape)}: broadcastable to [B, H] = {list(shape[:2])} or, with three "
            f"dimensions, to [B, H, M] = {list(shape)} expected"
        )
    return whole.reshape((1,) * (3 - whole.dim()) + tuple(whole.shape))


def _replacement(t: Any, shape: tuple[int, int, int, int], q: Tensor) -> Tensor | None:
    """A vector for each head, or for each head and query, as [#B, #H, #M, #Dv]."""
    if t is None:
        return None
    same_device("Edit.replacement", t, q)
    b, h, m, dv = shape
    whole = t if t.dim() == 4 else t[..., None, :] if t.dim() else t.reshape(1, 1)
    if not _broadcasts(whole, shape):
        raise ValueError(
            f"Edit.replacement has shape {list(t.shape)}: broadcastable to [B, H, Dv] = {[b, h, dv]} or, with four "
            f"dimensions, to [B, H, M, Dv] = {[b, h, m, dv]} expected"
        )
    return whole.reshape((1,) * (4 - whole.dim()) + tuple(whole.shape))


def _broadcasts(t: Tensor, shape: tuple[int, ...]) -> bool:
    short = shape[len(shape) - t.dim() :]
    return t.dim() <= len(shape) and all(s in (1, w) for s, w in zip(t.shape, short, strict=True))
