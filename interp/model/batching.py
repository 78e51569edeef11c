"""Prompts that can go through a model together, and the tensors of such a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.prompts.model_input import ModelInput

TOKENS_PER_FORWARD = 2048  # batches of full forwards are cut so that logits stay small


def equal_length_batches(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of prompts grouped by length and cut to `TOKENS_PER_FORWARD`: batches without padding.

    Prompts with images also need images of the same size.
    """
    alike: dict[Any, list[int]] = {}
    for i, row in enumerate(ids):
        alike.setdefault((len(row), row.shapes if isinstance(row, ModelInput) else ()), []).append(i)
    batches = []
    for (length, _), members in alike.items():
        step = max(1, TOKENS_PER_FORWARD // length)
        batches += [members[i : i + step] for i in range(0, len(members), step)]
    return batches


def collate(prompts: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch of one of `equal_length_batches` as the inputs of a Hugging Face forward; pixels in the model's dtype."""
    first = prompts[0]
    inputs: dict[str, Tensor] = {}
    if not isinstance(first, ModelInput) or first.has_token_ids:
        inputs["input_ids"] = torch.tensor([list(p) for p in prompts], device=device)
    for name in first.extra_inputs if isinstance(first, ModelInput) else ():
        joined = torch.cat([p.extra_inputs[name] for p in prompts if isinstance(p, ModelInput)]).to(device)
        inputs[name] = joined.to(dtype) if joined.is_floating_point() else joined
    return inputs
