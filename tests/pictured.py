"""What the tests of models that read images share: eager models with attention cut or inputs replaced by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def blocks_of(hf: Any, model: Any) -> Any:
    """The blocks of a plain Hugging Face model that the blocks of its bridge stand for."""
    return hf.get_submodule(model.bridge.adapter.component_mapping["blocks"].name)


@contextmanager
def cut(block: Any, queries: slice, keys: slice) -> Iterator[None]:
    """Hide keys from queries in one eager block, by the mask that it is handed."""

    def hide(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        n, dtype = args[0].shape[1], args[0].dtype
        mask = kwargs.pop("attention_mask", None)
        if mask is None and len(args) > 1:
            mask = args[1]
        mask = torch.zeros(1, 1, n, n, dtype=dtype) if mask is None else mask.clone()
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        mask[..., queries, keys] = torch.finfo(dtype).min
        return args[:1], {**kwargs, "attention_mask": mask}

    handle = block.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def replaced_input(block: Any, rows: slice, value: Tensor) -> Iterator[None]:
    """Set rows of what enters one block."""

    def swap(_block: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0].clone()
        hidden[:, rows] = value[:, rows]
        return (hidden, *args[1:])

    handle = block.register_forward_pre_hook(swap)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def entering(block: Any, found: list[Tensor]) -> Iterator[None]:
    """Keep what enters one block."""
    handle = block.register_forward_pre_hook(lambda _block, args: found.append(args[0]))
    try:
        yield
    finally:
        handle.remove()
