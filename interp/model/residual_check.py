"""Check at load that resid_mid is the sum of resid_pre and attn_out, through which recipes set it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from interp.model.hooks import hooks_at
from interp.model.protocols import Bridge

PARTS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid")
TOLERANCE, HALF = 1e-4, 2e-2  # of the largest value; HALF for 16 bits


@contextmanager
def recorded_sum(bridge: Bridge) -> Iterator[dict[str, Tensor]]:
    """Record resid_pre, attn_out and resid_mid of the first block that has all three, in the forward inside."""
    values: dict[str, Tensor] = {}
    points = bridge.hook_dict

    def keep(name: str) -> Any:
        def hook(x: Tensor, hook: Any) -> None:
            values[name] = x.detach().clone()

        return hook

    layers = range(len(getattr(bridge, "blocks", ())))
    first = next((i for i in layers if all(f"blocks.{i}.{part}" in points for part in PARTS)), None)
    pairs = [] if first is None else [(points[f"blocks.{first}.{part}"], keep(part)) for part in PARTS]
    with hooks_at(*pairs):
        yield values


def sum_fault(values: dict[str, Tensor]) -> str | None:
    """Why resid_mid cannot be set through attn_out; None if it can, or if there is none."""
    if len(values) < len(PARTS):
        return None
    before, added, middle = (values[part].float() for part in PARTS)
    tolerance = TOLERANCE if values[PARTS[0]].element_size() > 2 else HALF
    if before.shape == middle.shape and (middle - before - added).abs().max() <= tolerance * middle.abs().max():
        return None
    return (
        "it is set through attn_out, and is not the sum of resid_pre and attn_out here: the block adds more than "
        "attention before its MLP, or a norm stands behind the sum. Use 'resid_pre', 'resid_post' or 'attn_out'"
    )
