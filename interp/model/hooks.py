"""Temporary TransformerLens hooks on a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from interp.model.loaded_model import LoadedModel


@contextmanager
def hooks(model: LoadedModel, *pairs: tuple[str, Any]) -> Iterator[None]:
    """Add TransformerLens forward hooks inside the block, in the model's session.

    ``pairs``: (hook name, fn(tensor, hook) -> tensor or None). Raises SiteError for a hook whose heads are not the
    model's (`interp.model.head_checks`).
    """
    for name, _ in pairs:
        model.check_axes(name.rpartition(".hook_")[2] if ".attn.hook_" in name else "")
    points = model.bridge.hook_dict if pairs else {}  # a property that searches the whole model
    with model.session, hooks_at(*((points[name], function) for name, function in pairs)):
        yield


@contextmanager
def hooks_at(*pairs: tuple[Any, Any]) -> Iterator[None]:
    """Add forward hooks to hook points inside the block: (hook point, fn(tensor, hook) -> tensor or None)."""
    handles = []
    try:
        for point, function in pairs:
            heads_first = getattr(point, "pos_dim", 1) == 2
            handles.append((point, point.add_hook(_positions_first(function) if heads_first else function)))
        yield
    finally:
        for point, handle in handles:
            handle.hook.remove()
            point.fwd_hooks.remove(handle)


def _positions_first(function: Any) -> Any:
    """Wrap a hook so that it sees positions before heads.

    This is needed for hooks on [batch, heads, position, d] (latent attention).
    """

    def transposed(x: Tensor, hook: Any) -> Tensor | None:
        out = function(x.transpose(1, 2), hook)
        return None if out is None else out.transpose(1, 2)

    return transposed
