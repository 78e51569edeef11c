"""What a sweep will cost, and what was saved, before anything runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from interp.engine.cells import Cell
from interp.engine.core import Engine
from interp.engine.cost import EFFICIENCY, BlockCost
from interp.engine.matmul import products_for
from interp.engine.planner import PLANNING, Planner
from interp.errors import InterpError


@dataclass(frozen=True)
class Plan:
    """A sweep before it runs: `explain` says what it will cost. `interp.explain` makes it.

    ``lengths``: tokens of each base run.  ``cells``: without their values.  ``unasked``: cells that the recipe answers
    from base runs by itself.  ``runs_bytes``: of the base runs that are held at one time.  ``columns``: how many logits
    of a cell are computed, if not all.  ``whole``: tokens of prompts that are cells of their own, a full forward each.
    """

    engine: Engine
    lengths: Sequence[int]
    cells: Sequence[Cell]
    unasked: int = 0
    runs_bytes: float = 0
    columns: int | None = None
    whole: Sequence[int] = ()

    @cached_property
    def cost(self) -> BlockCost:
        """Of one block."""
        return BlockCost.of(self.engine.model)

    @cached_property
    def batches(self) -> list[list[int]]:
        """Cells that will go through the model together; a full forward each on the naive path."""
        runs = [range(n) for n in self.lengths]
        cut = self.engine.batches(runs, self.cells, self.columns)
        return [b for b in cut if not self.engine.cannot_reach_logits(runs, self.cells[b[0]])]

    @property
    def n_cells(self) -> int:
        """All cells, answered ones included."""
        return len(self.cells) + self.unasked + len(self.whole)

    @property
    def n_answered(self) -> int:
        """Cells that provably change nothing: their answer is the base run's."""
        return self.n_cells - sum(map(len, self.batches)) - len(self.whole)

    @cached_property
    def steps(self) -> dict[str, float]:
        """FLOPs of the sweep, first as one full forward per cell, then with each saving on top of those before."""
        model = self.engine.model
        n_layers, unembed = model.n_layers, 2 * model.d_model * int(model.bridge.cfg.d_vocab)
        full = self.n_cells * unembed + sum(self._rows(c, c_rows=(0, 0, None, False)) for c in self.cells)
        full += self.unasked * self._mean_full() + sum(map(self._whole, self.whole))
        steps = {"one full forward per cell": full}
        if not self.engine.fast:
            return steps
        asked = [self.cells[i] for b in self.batches for i in b]
        head = len(asked) * unembed
        few = len(asked) * 2 * model.d_model * self.columns if self.columns else head
        kept = {
            "without cells that can change nothing": lambda c, n: (0, 0, None, False),
            "without blocks before the change": lambda c, n: (c.first_layer, 0, None, False),
            "without positions before the change": lambda c, n: (c.first_layer, c.first_row, None, False),
            "without positions that the first block leaves": lambda c, n: (
                c.first_layer, c.first_row, c.entry_stop(n), False,
            ),
            "without positions that the answer does not read": lambda c, n: (
                c.first_layer, c.first_row, c.entry_stop(n), True,
            ),
        }  # fmt: skip
        for name, rows in kept.items():
            steps[name] = head + sum(self._rows(c, rows(c, self.lengths[c.run])) for c in asked)
        if self.columns:
            steps["without logits that the metric does not read"] = list(steps.values())[-1] - head + few
        assert n_layers > 0
        return steps

    def _mean_full(self) -> float:
        """FLOPs of a full forward, averaged over base runs."""
        return sum(self._whole(n) for n in self.lengths) / max(1, len(self.lengths))

    def _whole(self, n: int) -> float:
        return self.engine.model.n_layers * (n * self.cost.row + self.cost.pattern * n * (n + 1) / 2)

    def _rows(self, cell: Cell, c_rows: tuple[int, int, int | None, bool]) -> float:
        """FLOPs of a cell's blocks: from a layer and a row on, with a shorter first block and a last one of one row."""
        layer, row, stop, last_only = c_rows
        n, cost, blocks = self.lengths[cell.run], self.cost, self.engine.model.n_layers - layer
        if blocks <= 0:
            return 0
        rows = n - row
        seen = (n * (n + 1) - row * (row + 1)) / 2  # cells of the pattern below the diagonal, in these rows
        block = rows * cost.row + cost.pattern * seen
        total = blocks * block
        if stop is not None and stop < n:
            total -= (n - stop) * cost.row + cost.pattern * (n * (n + 1) - stop * (stop + 1)) / 2
        if last_only:
            # of the other rows keys and values alone; the model's own blocks put out queries with them, and go twice
            left = rows * cost.row - (rows * cost.qkv + cost.row)
            left = left if self.engine.plain_blocks is None else (rows - 1) * (cost.row - cost.kv)
            total -= left + cost.pattern * (seen - n)
        return total

    @property
    def flops(self) -> float:
        """Of the sweep as it will run, without its base runs."""
        return list(self.steps.values())[-1]

    @cached_property
    def rate(self) -> float:
        """FLOP/s to expect, by a matrix product like the model's, timed now."""
        model = self.engine.model
        x = torch.randn(512, model.d_model, device=model.device, dtype=model.dtype)
        w = torch.randn(4 * model.d_model, model.d_model, device=model.device, dtype=model.dtype)
        times = []
        with torch.no_grad():
            product = products_for(model.dtype, model.device)
        for _ in range(5):
            start = time.perf_counter()
            product.linear(x, w)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return EFFICIENCY * 2 * x.shape[0] * w.numel() / sorted(times)[2]

    @property
    def seconds(self) -> float:
        """Predicted, base runs included."""
        return (self.flops + sum(map(self._whole, self.lengths))) / self.rate

    @property
    def batch_bytes(self) -> float:
        """The largest batch's activations at their widest."""
        rows = (sum(self.lengths[self.cells[i].run] - self.cells[i].first_row for i in b) for b in self.batches)
        most = max(rows, default=0) if self.engine.fast else max(self.lengths, default=0)
        together = max((len(b) * self.whole[b[0]] for b in self.engine.prompt_batches(self.whole)), default=0)
        return max(most, together) * self.cost.bytes

    def explain(self) -> str:
        """The plan in words: cells, forwards, FLOPs and what saved them, time, memory."""
        engine, full = self.engine, next(iter(self.steps.values()))
        lines = [f"{self.n_cells} cells on {len(self.lengths)} base run(s), engine: {engine.describe()}"]
        if self.n_answered:
            lines.append(f"  {self.n_answered} change nothing that the answer reads: taken from the base run")
        forwards = len(self.batches) + len(list(self.engine.prompt_batches(self.whole)))
        lines.append(f"  {self.n_cells - self.n_answered} in {forwards} forward(s)")
        for name, flops in self.steps.items():
            lines.append(f"  {_unit(flops, 'FLOP'):>12}  {flops / full:6.1%}  {name}")
        lines.append(
            f"about {self.seconds:.3g} s at {_unit(self.rate, 'FLOP/s')}; memory beside the model about "
            f"{_unit(self.runs_bytes + self.batch_bytes, 'B')}"
        )
        return "\n".join(lines)

    __str__ = explain


def explain(recipe: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """What ``recipe(*args, **kwargs)`` would cost: ``print(interp.explain(interp.patch, model, pairs, sites))``.

    Runs the recipe's base runs, which hold what its cells are made of, and none of its cells. Raises what the recipe
    raises for bad input, and InterpError for a function that sweeps nothing.
    """
    planner = Planner()
    token = PLANNING.set(planner)
    try:
        recipe(*args, **{"show_progress": False, **kwargs})
    finally:
        PLANNING.reset(token)
    if not isinstance(planner.engine, Engine):
        raise InterpError(f"{getattr(recipe, '__name__', recipe)} asked the engine for nothing: there is no sweep")
    return Plan(
        planner.engine, planner.lengths, planner.cells, planner.unasked, planner.runs_bytes, planner.columns,
        planner.whole,
    )  # fmt: skip


def _unit(x: float, name: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if x < 1000:
            return f"{x:.3g} {prefix}{name}"
        x /= 1000
    return f"{x:.3g} E{name}"
