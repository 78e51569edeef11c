"""Probe: what single blocks of a base run would compute on other inputs.

Path patching uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine.cells import Cell, CellWrite
from interp.engine.packed_forward import PackedForward, StopForward
from interp.engine.packing import Changes, Group, Piece, lay_out
from interp.engine.runs import Frame, Run
from interp.errors import InterpError
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.sites import COMPONENTS, Site


class Probe:
    """Runs single blocks of one base run on changed rows from ``start`` on.

    The run holds attn_out, and mlp_out if the model has MLPs.
    """

    def __init__(self, model: Model, frame: Frame, run: Run, start: int):
        self.model, self.frame, self.run, self.start = model, frame, run, start

    def check_sums(self) -> None:
        """Raise InterpError unless the residual stream is the sum of the layers' outputs."""
        total, acts = self.run.resid, self.run.acts
        layers = range(self.model.n_layers)
        parts = [acts[c] for c in ("attn_out", "mlp_out") if c in acts]
        if any(layer not in part for part in parts for layer in layers):
            raise InterpError(f"not every layer of {self.model.name} has the same outputs: paths are not defined")
        added = sum(torch.stack([part[layer] for layer in layers]) for part in parts)
        gap, scale = (total[1:] - total[:-1] - added).abs().max().item(), total.abs().max().item()
        if not gap <= 1e-4 * max(scale, 1.0):
            raise InterpError(
                f"in {self.model.name} the residual stream is not the sum of hook_attn_out and hook_mlp_out (they are "
                f"normed or scaled before they are added; largest gap {gap:.1e}), so that a path has no direct part"
            )

    def block(
        self,
        layer: int,
        delta: Float[Tensor, "cells rows d_model"],
        attention: Float[Tensor, "cells rows d_model"],
        components: set[str],
    ) -> dict[str, Float[Tensor, "cells rows ..."]]:
        """Compute those of q, k, v and mlp_out of one block that are in ``components``.

        ``delta``: added to the block's input.  ``attention``: added to the base run's attention output, which is
        otherwise frozen.
        """
        frozen = self.run.acts["attn_out"][layer][self.start :] + attention
        site, n = Site("attn_out", layer), len(self.run)
        cells = [Cell(0, (CellWrite(site, self.start, n, x),)) for x in frozen]
        return self._run(layer, cells, self.run.resid[layer][self.start :] + delta, components)

    def attention(self, layer: int, cells: Sequence[Cell]) -> Float[Tensor, "cells rows d_model"]:
        """Compute one block's attention output with each cell's writes to z.

        The block's input is the base run's.
        """
        hidden = self.run.resid[layer][self.start :].expand(len(cells), -1, -1)
        return self._run(layer, cells, hidden, {"attn_out"})["attn_out"]

    def _run(self, layer: int, cells: Sequence[Cell], hidden: Tensor, components: set[str]) -> dict[str, Tensor]:
        forward = PackedForward(self.model, [self.run], (), self.frame)
        forward.changes = Changes(cells)
        piece = Piece(Group(self.run, self.start), list(range(len(cells))), self.start, len(self.run), [hidden])
        outputs: dict[str, Tensor] = {}

        def keep(component: str):
            def hook(x: Tensor, hook: object) -> None:
                outputs[component] = x[0].unflatten(0, (len(cells), piece.rows))
                if components <= set(outputs):
                    raise StopForward

            return COMPONENTS[component].hook.format(layer=layer), hook

        with suppress(StopForward), hooks(self.model, *map(keep, sorted(components))):
            forward.run_block(layer, [piece], lay_out([piece]), lambda call: forward.attend(call, [piece]))
        return outputs
