"""The oracle: one full forward per cell, through TransformerLens hooks. Slow, obvious, and what tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine.cells import Cell, Write, write_into
from interp.engine.runs import Run, hooks
from interp.model import Model


def run_cell(model: Model, run: Run, writes: Sequence[Write]) -> Float[Tensor, " vocab"]:
    """Last-position logits of ``run`` with ``writes`` applied, by one forward over the whole prompt."""
    pairs: list[tuple[str, Any]] = []
    if run.noise is not None:
        noise = run.noise
        pairs.append(("hook_embed", lambda x, hook: x + noise.to(x)))
    for write in writes:
        pairs += _hooks_for(write)
    tokens = torch.tensor([list(run.ids)], device=model.device)
    with hooks(model, *pairs):
        return model.last_logits(tokens)[0]


def _hooks_for(write: Write) -> list[tuple[str, Any]]:
    site, rows = write.site, slice(write.start, write.stop)
    if site.component != "resid_mid":
        return [(site.hook_name, lambda x, hook: write_into(x, site, rows, write.value))]
    # TransformerLens' bridge fires hook_resid_mid on the MLP branch only: an edit there would miss the skip
    # connection. Writing attn_out = value − resid_pre sets the residual stream itself.
    seen: list[Tensor] = []
    prefix = f"blocks.{site.layer}."

    def through_attn_out(x: Tensor, hook: Any) -> Tensor:
        return write_into(x, site, rows, write.value - seen[-1][0, rows])

    return [
        (prefix + "hook_resid_pre", lambda x, hook: seen.append(x)),
        (prefix + "hook_attn_out", through_attn_out),
    ]


def run_cells(model: Model, runs: Sequence[Run], cells: Sequence[Cell]) -> list[Float[Tensor, " vocab"]]:
    """`run_cell` for every cell."""
    return [run_cell(model, runs[c.run], c.writes) for c in cells]
