"""The oracle: one full forward per cell, through TransformerLens hooks. Slow, obvious, and what tests compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine.cells import Cell, Write, cut_mask, write_into
from interp.engine.runs import Run
from interp.model.hooks import hooks
from interp.model.model import Model


def run_cell(model: Model, run: Run, cell: Cell) -> Float[Tensor, " vocab"]:
    """Last-position logits of ``run`` with the cell's changes, by one forward over the whole prompt."""
    pairs: list[tuple[str, Any]] = []
    if run.noise is not None:
        noise = run.noise
        pairs.append(("hook_embed", lambda x, hook: x + noise.to(x)))
    for write in sorted(cell.writes, key=lambda w: w.site.component == "resid_mid"):  # it replaces what came before it
        pairs += _hooks_for(write)
    for layer in {c.layer for c in cell.cuts}:
        mask = cut_mask([c for c in cell.cuts if c.layer == layer], model.n_heads, len(run)).to(model.device)
        pairs += _hide(layer, mask)
    with hooks(model, *pairs):
        return model.last_logits([run.ids])[0]


def _hide(layer: int, mask: Tensor) -> list[tuple[str, Any]]:
    """Takes the layer off the kernel: dense scores are lowered where attention is cut.

    A row with nothing left reads nothing: its pattern, which softmax made uniform, is cleared where it was cut and
    where the model's own mask (causal or not) lowered the score.
    """
    unseen: list[Tensor] = []

    def lower(scores: Tensor, hook: Any) -> Tensor:
        least = torch.finfo(scores.dtype).min
        unseen.append(mask | (scores <= least))
        return scores.masked_fill(mask, least)

    return [
        (f"blocks.{layer}.attn.hook_attn_scores", lower),
        (f"blocks.{layer}.attn.hook_pattern", lambda x, hook: x.masked_fill(unseen[-1], 0)),
    ]


def _hooks_for(write: Write) -> list[tuple[str, Any]]:
    site = write.site
    if site.component != "resid_mid":
        return [(site.hook_name, lambda x, hook: write_into(x, write))]
    # TransformerLens' bridge fires hook_resid_mid on the MLP branch only: an edit there would miss the skip
    # connection. Writing attn_out = value − resid_pre sets the residual stream itself.
    seen: list[Tensor] = []
    prefix = f"blocks.{site.layer}."

    def through_attn_out(x: Tensor, hook: Any) -> Tensor:
        assert write.value is not None
        if write.how == "add":
            return write_into(x, write)
        return write_into(x, write, write.value - seen[-1][0, write.start : write.stop])

    return [
        (prefix + "hook_resid_pre", lambda x, hook: seen.append(x)),
        (prefix + "hook_attn_out", through_attn_out),
    ]


def run_cells(model: Model, runs: Sequence[Run], cells: Sequence[Cell]) -> list[Float[Tensor, " vocab"]]:
    """`run_cell` for every cell."""
    return [run_cell(model, runs[c.run], c) for c in cells]
