"""Plan: what a sweep will cost, and what each saving contributes.

It is made before anything runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import Any

import torch

from interp.engine.cells import Cell
from interp.engine.core import Engine
from interp.engine.cost import EFFICIENCY, LAYER_SECONDS, BlockCost
from interp.engine.matmul import choose_products
from interp.engine.planner import PLANNING, Planner
from interp.errors import InterpError

SAVINGS = (
    "without cells that can change nothing",
    "without blocks before the change",
    "without positions before the change",
    "without positions that the first block leaves unchanged",
    "without positions that the answer does not read",
)


@dataclass(frozen=True)
class Extent:
    """What runs for a cell: blocks from ``layer`` on, rows from ``row`` on.

    ``stop``: the first block runs only rows before this one. ``end``: the row after the last one that any block runs.
    ``read_from``: the last block runs only rows from this one on, except for keys and values.
    """

    layer: int = 0
    row: int = 0
    stop: int | None = None
    end: int | None = None
    read_from: int | None = None


def _extents(cell: Cell, length: int, read: Sequence[int]) -> tuple[Extent, ...]:
    """What runs for a cell after each of the `SAVINGS`. ``read``: the rows that are read."""
    end = read[-1] + 1
    layer, row, stop = cell.first_layer, cell.first_row, cell.entry_stop(length)
    first = next((r for r in read if r >= row), read[-1])
    last = Extent(layer, min(row, end - 1), min(stop, end), end, first)
    return Extent(), Extent(layer), Extent(layer, row), Extent(layer, row, stop), last


@dataclass(frozen=True)
class _PlannedRun:
    """What batches need to know of a base run."""

    length: int
    read_rows: tuple[int, ...]

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class Plan:
    """A sweep before it runs, as `interp.explain` returns it.

    ``print(plan)`` describes its cost. ``lengths``: tokens of each base run.  ``cells``: without their values.
    ``unasked``: number of cells that the recipe answers from base runs by itself.  ``runs_bytes``: bytes of the base
    runs that are held at one time. ``columns``: how many logits of a cell are computed, if not all.  ``whole``: tokens
    of each prompt that is a cell by itself, which takes a full forward.  ``read``: the rows of each base run whose
    logits are read. ``more_read``: rows that are read of the whole prompts besides one of each.
    """

    engine: Engine
    lengths: Sequence[int]
    cells: Sequence[Cell]
    unasked: int = 0
    runs_bytes: float = 0
    columns: int | None = None
    whole: Sequence[int] = ()
    read: Sequence[tuple[int, ...]] = ()
    more_read: int = 0

    @cached_property
    def cost(self) -> BlockCost:
        """Cost of one block."""
        return BlockCost.of(self.engine.model)

    @cached_property
    def batches(self) -> list[list[int]]:
        """Cells that will go through the model together.

        On the naive path each takes a full forward.
        """
        runs = [_PlannedRun(n, read) for n, read in zip(self.lengths, self.read, strict=True)]
        cut = self.engine.batches(runs, self.cells, self.columns)
        return [b for b in cut if not self.engine.cannot_reach_logits(runs, self.cells[b[0]])]

    @property
    def n_cells(self) -> int:
        """Number of all cells, including those that need no forward."""
        return len(self.cells) + self.unasked + len(self.whole)

    @property
    def n_answered(self) -> int:
        """Number of cells that change nothing, so that the base run answers them."""
        return self.n_cells - sum(map(len, self.batches)) - len(self.whole)

    @cached_property
    def steps(self) -> dict[str, float]:
        """FLOPs of the sweep with one full forward per cell, then after each saving."""
        model = self.engine.model
        unembed = 2 * model.d_model * int(model.bridge.cfg.d_vocab)
        full = (self.n_cells - len(self.cells) + self.more_read) * unembed + self._n_read(self.cells) * unembed
        full += sum(self._rows(c, Extent()) for c in self.cells)
        full += self.unasked * self._mean_full() + sum(map(self._whole, self.whole))
        steps = {"one full forward per cell": full}
        if not self.engine.fast:
            return steps
        run_cells = [self.cells[i] for b in self.batches for i in b]
        head = self._n_read(run_cells) * unembed
        reduced_head = self._n_read(run_cells) * 2 * model.d_model * self.columns if self.columns else head
        extents = [_extents(c, self.lengths[c.run], self.read[c.run]) for c in run_cells]
        for i_saving, name in enumerate(SAVINGS):
            steps[name] = head + sum(self._rows(c, e[i_saving]) for c, e in zip(run_cells, extents, strict=True))
        if self.columns:
            steps["without logits that the metric does not read"] = list(steps.values())[-1] - head + reduced_head
        return steps

    def _n_read(self, cells: Sequence[Cell]) -> int:
        """Number of rows whose logits are computed."""
        return sum(len(self.read[c.run]) for c in cells)

    def _mean_full(self) -> float:
        """FLOPs of a full forward, averaged over base runs."""
        return sum(self._whole(n) for n in self.lengths) / max(1, len(self.lengths))

    def _whole(self, n: int) -> float:
        return self.engine.model.n_layers * (n * self.cost.row + self.cost.pattern * n * (n + 1) / 2)

    def _rows(self, cell: Cell, extent: Extent) -> float:
        """FLOPs of the blocks that run for a cell."""
        row, stop = extent.row, extent.stop
        n = self.lengths[cell.run] if extent.end is None else extent.end
        cost, blocks = self.cost, self.engine.model.n_layers - extent.layer
        if blocks <= 0:
            return 0
        rows = n - row
        n_visible = (n * (n + 1) - row * (row + 1)) / 2  # cells of the pattern below the diagonal, in these rows
        block = rows * cost.row + cost.pattern * n_visible
        total = blocks * block
        if stop is not None and stop < n:
            total -= (n - stop) * cost.row + cost.pattern * (n * (n + 1) - stop * (stop + 1)) / 2
        if extent.read_from is not None:
            # Other rows need keys and values alone. The model's own blocks also compute their queries, and run twice.
            read = n - extent.read_from
            saved = rows * cost.row - (rows * cost.qkv + read * cost.row)
            saved = saved if self.engine.plain_blocks is None else (rows - read) * (cost.row - cost.kv)
            total -= saved + cost.pattern * (n_visible - (n * (n + 1) - (n - read) * (n - read + 1)) / 2)
        return total

    @property
    def flops(self) -> float:
        """FLOPs of the sweep as it will run, without its base runs."""
        return list(self.steps.values())[-1]

    @cached_property
    def rate(self) -> float:
        """Expected FLOP/s, from timing a matrix product of the model's size now."""
        model = self.engine.model
        x = torch.randn(512, model.d_model, device=model.device, dtype=model.dtype)
        w = torch.randn(4 * model.d_model, model.d_model, device=model.device, dtype=model.dtype)
        times = []
        with torch.no_grad():
            product = choose_products(model.dtype, model.device)
        for _ in range(5):
            start = time.perf_counter()
            product.linear(x, w)
            if x.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return EFFICIENCY * 2 * x.shape[0] * w.numel() / sorted(times)[2]

    @property
    def seconds(self) -> float:
        """Predicted time, including base runs.

        A layer of a forward takes `LAYER_SECONDS` besides its FLOPs, which decides where models are tiny.
        """
        busy = (self.flops + sum(map(self._whole, self.lengths))) / self.rate
        return busy + (self.n_forwards + len(self.lengths)) * self.engine.model.n_layers * LAYER_SECONDS

    @property
    def n_forwards(self) -> int:
        """Number of the forwards that cells take."""
        return len(self.batches) + len(list(self.engine.prompt_batches(self.whole)))

    @property
    def batch_bytes(self) -> float:
        """Bytes of the largest batch's activations at their widest."""
        rows = (sum(self.read[(c := self.cells[i]).run][-1] + 1 - c.first_row for i in b) for b in self.batches)
        most_rows = max(rows, default=0) if self.engine.fast else max(self.lengths, default=0)
        prompt_rows = max((len(b) * self.whole[b[0]] for b in self.engine.prompt_batches(self.whole)), default=0)
        return max(most_rows, prompt_rows) * self.cost.bytes

    def explain(self) -> str:
        """The plan as text: cells, forwards, FLOPs after each saving, time, memory."""
        engine, full = self.engine, next(iter(self.steps.values()))
        lines = [f"{self.n_cells} cells on {len(self.lengths)} base run(s), engine: {engine.describe()}"]
        if self.n_answered:
            lines.append(f"  {self.n_answered} change nothing that the answer reads: taken from the base run")
        several = "" if (most := max(map(len, self.read), default=1)) == 1 else f", up to {most} positions read of each"
        lines.append(f"  {self.n_cells - self.n_answered} in {self.n_forwards} forward(s){several}")
        for name, flops in self.steps.items():
            lines.append(f"  {_unit(flops, 'FLOP'):>12}  {flops / full:6.1%}  {name}")
        lines.append(
            f"about {self.seconds:.3g} s at {_unit(self.rate, 'FLOP/s')}; memory besides the model about "
            f"{_unit(self.runs_bytes + self.batch_bytes, 'B')}"
        )
        return "\n".join(lines)

    __str__ = explain

    def __repr__(self) -> str:
        return (
            f"Plan({self.n_cells} cells on {len(self.lengths)} base run(s), {self.engine.describe()}; "
            "print(plan) shows what they cost)"
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.explain())}</pre>"


def explain(recipe: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """Predict what ``recipe(*args, **kwargs)`` would cost, without running its cells.

        plan = interp.explain(interp.patch, model, pairs, model.sites("z"))
        print(plan)                   # cells, forwards, FLOPs after each saving, time, memory
        plan.seconds, plan.n_cells

    Only the recipe's base runs are run, since they hold the values that its cells are made of. Raises what the recipe
    raises for bad input, and InterpError for a function that runs no sweep.
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
        planner.whole, planner.read, planner.more_read,
    )  # fmt: skip


def _unit(x: float, name: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if x < 1000:
            return f"{x:.3g} {prefix}{name}"
        x /= 1000
    return f"{x:.3g} E{name}"
