"""The oracle: one full forward per cell, through TransformerLens hooks.

It is slow and simple, and the reference in tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interp.engine.cells import Cell, CellWrite, write_into
from interp.engine.runs import Run, read_logits
from interp.model.attention_call import AttentionCall
from interp.model.hooks import hooks
from interp.model.model import Model


def run_cell(model: Model, run: Run, cell: Cell) -> Float[Tensor, "*read vocab"]:
    """Compute the logits of the rows of ``run`` that are read, with the cell's changes.

    This takes one forward over the whole prompt.
    """
    pairs: list[tuple[str, Any]] = []
    if run.noise is not None:
        noise = run.noise
        pairs.append(("hook_embed", lambda x, hook: x + noise.to(x)))
    # a write to resid_mid replaces earlier ones, and a mean is taken after them
    for write in sorted(cell.writes, key=lambda w: (w.site.component == "resid_mid", w.how == "mean")):
        pairs += _write_hooks(write)
    with hooks(model, *pairs), model.instrument.editing(_edit(cell), dense=True):
        return read_logits(model, [run.ids], [run.read])[0]


def _edit(cell: Cell) -> Callable[[AttentionCall], AttentionCall]:
    """Return a function that adds the cell's edits to a call of attention."""

    def add(call: AttentionCall) -> AttentionCall:
        edits = tuple(e for e in cell.edits if e.layer == call.layer)
        return replace(call, edits=tuple((*own, *edits) for own in call.edits_by_row())) if edits else call

    return add


def _write_hooks(write: CellWrite) -> list[tuple[str, Any]]:
    site = write.site
    if site.component != "resid_mid":
        return [(site.hook_name, lambda x, hook: write_into(x, write))]
    # TransformerLens' bridge fires hook_resid_mid on the MLP branch only: an edit there would miss the skip
    # connection. Writing attn_out = value − resid_pre sets the residual stream itself.
    resid_pre: list[Tensor] = []
    prefix = f"blocks.{site.layer}."

    def through_attn_out(x: Tensor, hook: Any) -> Tensor:
        assert write.value is not None
        if write.how == "add":
            return write_into(x, write)
        return write_into(x, write, write.value - resid_pre[-1][0, write.start : write.stop])

    def keep(x: Tensor, hook: Any) -> None:
        resid_pre.append(x)

    return [
        (prefix + "hook_resid_pre", keep),
        (prefix + "hook_attn_out", through_attn_out),
    ]


def run_cells(model: Model, runs: Sequence[Run], cells: Sequence[Cell]) -> list[Float[Tensor, "*read vocab"]]:
    """Run `run_cell` for every cell."""
    return [run_cell(model, runs[c.run], c) for c in cells]
