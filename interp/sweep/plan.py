"""Estimate what a sweep costs before it runs.

The estimate has cells, FLOPs, time, disk and memory of every combination.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

from interp.errors import InterpError
from interp.jobs.frozen import FilesInMemory
from interp.jobs.status import duration
from interp.sweep.config import Config, SweepPart
from interp.sweep.effects_job import EffectsJob, call_of, input_name, prompts_of_call

ROW_BYTES = 16.0  # of a packed row in a large part
PART_BYTES = 11_000.0  # of a part without its rows: headers of columns, provenance, receipt


@dataclass(frozen=True)
class CombinationPlan:
    """Cost of one model × task × recipe × sites, over all seeds and examples."""

    model: str
    task: str
    recipe: str
    sites: str
    parts: int
    cells: int
    flops: float
    seconds: float
    memory: float
    trouble: str | None = None


@dataclass(frozen=True)
class SweepPlan:
    """Cost of a sweep.

    ``seconds``: of one worker of one thread. ``weights``: bytes of the largest model.
    """

    name: str
    rows: list[CombinationPlan] = field(repr=False)
    weights: float
    workers: int

    @property
    def cells(self) -> int:
        """Number of all cells."""
        return sum(r.cells for r in self.rows)

    @property
    def seconds(self) -> float:
        """Seconds of one worker."""
        return sum(r.seconds for r in self.rows)

    @property
    def disk(self) -> float:
        """Approximate bytes of the run directory."""
        return self.cells * ROW_BYTES + sum(r.parts for r in self.rows) * PART_BYTES

    @property
    def memory(self) -> float:
        """Approximate bytes of one worker: weights, base runs and batches."""
        return self.weights + max((r.memory for r in self.rows), default=0)

    def __str__(self) -> str:
        labels = ("model", "task", "recipe", "sites", "parts", "cells", "FLOP", "time, 1 worker")
        head = (*labels, "memory besides weights")
        table: list[tuple[str, ...]] = [head]
        for r in self.rows:
            numbers = (f"{r.parts:,}", f"{r.cells:,}", _unit(r.flops), duration(r.seconds), f"{_unit(r.memory)}B")
            table.append((r.model, r.task, r.recipe, r.sites or "–", *numbers))
        widths = [max(len(row[i]) for row in table) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table]
        for r in self.rows:
            if r.trouble:
                lines.append(f"{r.model} × {r.task} × {r.recipe}: these parts will be marked as failed: {r.trouble}")
        lines.append(
            f"{self.name}: {self.cells:,} cells in {sum(r.parts for r in self.rows):,} parts; about "
            f"{duration(self.seconds)} with one worker, {duration(self.seconds / self.workers)} with {self.workers}; "
            f"disk about {_unit(self.disk)}B; memory about {_unit(self.memory)}B a worker"
        )
        return "\n".join(lines)


def _inputs(config: Config) -> dict[str, bytes]:
    """Return the custom prompts of a config as a run would freeze them."""
    tasks = [t for t in config.tasks if t.pairs is not None]
    return {f"inputs/{input_name(t)}": config.file_of(t).read_bytes() for t in tasks}


def plan(config: Config, workers: int = 1, models: dict[str, Any] | None = None) -> SweepPlan:
    """Estimate the cost of a sweep.

    Loads each model once, makes the prompts, and runs the base runs of one part of every combination, but no cell.
    """
    import torch

    rows, weights = [], 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        job = EffectsJob(config.document, FilesInMemory(_inputs(config)), models)
        grouped: dict[tuple[str, ...], list[SweepPart]] = {}
        for part in config.parts:
            grouped.setdefault(part.combination[:4], []).append(part)
        for parts in grouped.values():
            rows.append(_plan_combination(job, config, parts))
            model = job.model(parts[0].model)
            tensors = {id(t): t for t in [*model.bridge.parameters(), *model.bridge.buffers()]}
            weights = max(weights, sum(t.numel() * t.element_size() for t in tensors.values()))
            gc.collect()
    finally:
        torch.set_num_threads(before)
    return SweepPlan(config.name, rows, weights, workers)


def _plan_combination(job: EffectsJob, config: Config, parts: list[SweepPart]) -> CombinationPlan:
    """Estimate the cost of a combination from one of its parts."""
    first, names = parts[0], parts[0].combination[:4]
    examples = sum(len(p.examples) for p in parts)
    model = job.model(first.model)
    prompts = job.prompts(first, model)
    usable = [i for i in prompts.usable if i in first.examples]
    if prompts.error is not None or not usable:
        why = prompts.error or next(iter(prompts.failed.values()))
        return CombinationPlan(*names, len(parts), examples, 0.0, 0.0, 0.0, why)
    _, task_prompts, subset = prompts_of_call(first, prompts, usable, job.lengths_differ(first, prompts, model))
    recipe, options = call_of(config, first, model)
    share = examples / len(usable)
    from interp.engine import explain

    try:
        one_part = explain(recipe, model, task_prompts, **options, subset=subset)
    except InterpError as error:  # a run goes on, and marks the cells of these parts as failed
        return CombinationPlan(*names, len(parts), examples, 0.0, 0.0, 0.0, str(error))
    times = 2 if first.recipe.recipe == "mediate" else 1  # of four rows, two are patched; the plan holds both sweeps
    cells = one_part.n_cells // (options.get("samples", 10) if _has_noise(first) else 1) * times
    memory = one_part.runs_bytes + one_part.batch_bytes
    flops, seconds = one_part.flops * share, one_part.seconds * share
    return CombinationPlan(*names, len(parts), round(cells * share), flops, seconds, memory)


def _has_noise(part: SweepPart) -> bool:
    """Return whether the part repeats its cells over noise samples."""
    return part.recipe.recipe == "trace" and part.task.facts


def _unit(x: float) -> str:
    """Format a number with three digits and an SI prefix."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if x < 1000:
            return f"{x:.3g} {prefix}"
        x /= 1000
    return f"{x:.3g} E"
