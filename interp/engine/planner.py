"""Planner: records the cells that an engine is to score, instead of running them."""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import replace

from interp.engine.cells import Cell
from interp.engine.runs import Run


class Planner:
    """Collects the cells that an engine would score, without running any."""

    def __init__(self) -> None:
        self.engine: object = None  # the one that was used last
        self.lengths: list[int] = []
        self.read: list[tuple[int, ...]] = []  # rows of each run that are read
        self.cells: list[Cell] = []
        self.unasked = 0  # cells that the recipe answers from base runs by itself
        self.runs_bytes = 0.0
        self.columns: int | None = None
        self.whole: list[int] = []  # tokens of prompts that are cells of their own
        self.more_read = 0  # rows of these whose logits are read, besides one of each

    def add(self, engine: object, runs: Sequence[Run], cells: Sequence[Cell], columns: int | None) -> None:
        """Add cells on some runs.

        ``columns``: how many logits of each cell are read; None: all.
        """
        self.columns = columns
        first, self.engine = len(self.lengths), engine
        self.lengths += [len(r) for r in runs]
        self.read += [r.read_rows for r in runs]
        for cell in cells:
            writes = tuple(replace(w, value=None) for w in cell.writes)
            self.cells.append(replace(cell, run=cell.run + first, writes=writes))
        n_bytes = sum(x.numel() * x.element_size() for r in runs for x in r.tensors())
        self.runs_bytes = max(self.runs_bytes, n_bytes)


PLANNING: ContextVar[Planner | None] = ContextVar("planning", default=None)
