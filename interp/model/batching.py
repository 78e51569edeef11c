"""Batches of prompts that can go through a model together, and their tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.errors import PromptError
from interp.prompts.model_input import ModelInput

TOKENS_PER_FORWARD = 2048  # batches of full forwards are cut so that logits stay small


def equal_length_batches(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Group prompts of equal length into batches without padding.

    Returns their indices; a batch has at most `TOKENS_PER_FORWARD` tokens. Prompts with images must also have images of
    the same size. Raises PromptError for a prompt without tokens.
    """
    if not all(map(len, ids)):
        raise PromptError("a prompt without tokens has nothing to read, and there is one")
    by_shape: dict[Any, list[int]] = {}
    for i, row in enumerate(ids):
        by_shape.setdefault((len(row), row.shapes if isinstance(row, ModelInput) else ()), []).append(i)
    batches = []
    for (length, _), members in by_shape.items():
        step = max(1, TOKENS_PER_FORWARD // length)
        batches += [members[i : i + step] for i in range(0, len(members), step)]
    return batches


def collate(prompts: Sequence[Sequence[int]], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Join one of `equal_length_batches` into the inputs of a Hugging Face forward.

    Pixels in the model's dtype.
    """
    first = prompts[0]
    inputs: dict[str, Tensor] = {}
    if not isinstance(first, ModelInput) or first.has_token_ids:
        inputs["input_ids"] = torch.tensor([list(p) for p in prompts], device=device)
    for name in first.extra_inputs if isinstance(first, ModelInput) else ():
        joined = torch.cat([p.extra_inputs[name] for p in prompts if isinstance(p, ModelInput)]).to(device)
        inputs[name] = joined.to(dtype) if joined.is_floating_point() else joined
    return inputs
