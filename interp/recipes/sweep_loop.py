"""The loop that every recipe shares: record → read out → score → cells → evaluate → rows.

A recipe is a `CellSource`: which base runs it records, and which cells it enumerates in them. `SweepLoop` checks what
every recipe takes, cuts the examples into batches that fit into memory, and makes Effects of the metric of every cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from interp.engine import Cell, Engine, Run
from interp.engine.core import EngineKind
from interp.errors import InterpError, Interrupted
from interp.metrics import Metric, MetricFn, Readout, as_metric
from interp.model.model import Model
from interp.prompts.coder import Encoded
from interp.prompts.pairs import Align, encode_any, encode_pairs
from interp.recipes.inputs import as_prompts, check_metric, check_readable, provenance_of
from interp.recipes.read_out import LAST, At, ReadOut, RunsReadout, check_at, read_outs, rows_of_all
from interp.recipes.rows import EffectRows
from interp.recipes.scoring import Value, evaluate_or_keep, readout, rounding_of, score_runs, warn_if_no_gap
from interp.recipes.targets import Address
from interp.results.effects import Effects
from interp.sites import Site
from interp.utils.progress import Advance, progress

RUN_BYTES = 600 * 2**20  # activations of base runs held at one time


@dataclass(frozen=True)
class Subset:
    """How `interp.sweep` runs a part of a set of examples. The numbers of an example do not depend on it.

    ``examples``: which to run, of a set whose means, donors and noise depend on all of it (None: all).
    ``keep_nan``: return rows whose metric is NaN, where a recipe would raise InterpError.  ``means``: mean activations
    computed for earlier parts, to be used again.  ``together``: most examples whose cells run together, so that an
    interruption loses no more than these (None: as many as fit into memory).  ``lengths_differ``: whether prompts of
    the whole set differ in length, where a recipe is given a part of it (None: it is given all).
    """

    examples: range | None = None
    keep_nan: bool = False
    means: dict[Any, Any] | None = None
    together: int | None = None
    lengths_differ: bool | None = None

    def selected(self, n: int) -> range:
        """Return the numbers of the examples to run, of ``n``."""
        return range(n) if self.examples is None else self.examples


WHOLE_SET = Subset()


@dataclass(frozen=True)
class CellRow:
    """One row of the result: the address it is filed under, and the cell whose metric it reports.

    ``index``: of the example in its batch.  ``cell``: None if nothing would change; the row then reports ``unchanged``.
    """

    index: int
    address: Site | Address
    cell: Cell | None
    unchanged: Value = float("nan")
    sender: Site | None = None


@dataclass
class Batch:
    """Base runs of some examples, and their scores.

    ``runs``: the runs that cells change; row i of ``read`` belongs to run i.  ``clean`` and ``corrupt``: the metric by
    example (NaN where there is no corrupt run).  ``no_gap``: whether the two are the same within rounding.  Where other
    positions than the last are read, each of these is a list, of the read-outs.
    """

    numbers: range
    prompts: list[Encoded]
    clean_runs: list[Run]
    corrupt_runs: list[Run]
    runs: list[Run]
    read: Readout | RunsReadout
    clean: list[Value]
    corrupt: list[Value]
    no_gap: list[Any]


class CellSource:
    """What a recipe adds to the loop. ``size``: number of cells, for the progress bar."""

    title: str
    size: int
    components: Sequence[str] = ()  # whose activations base runs keep
    runs_per_example: int = 2
    one_at_a_time: bool = False  # a batch holds one example
    samples: int = 1  # cells of an example come in so many equal lists, whose values are averaged

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Record and score the base runs of some examples."""
        raise NotImplementedError

    def rows(self, batch: Batch) -> Iterable[list[CellRow]]:
        """Yield the rows of a batch, in groups that are evaluated together."""
        raise NotImplementedError

    def evaluate(self, loop: SweepLoop, batch: Batch, rows: Sequence[CellRow], advance: Advance) -> list[Value]:
        """Return the metric of every row's cell."""
        cells, unchanged = [row.cell for row in rows], [row.unchanged for row in rows]
        return evaluate_or_keep(loop.runner, loop.metric, batch.runs, cells, unchanged, batch.read, advance)


@dataclass
class SweepLoop:
    """The inputs of one call of a recipe, checked and encoded; `run` does the work.

    ``takes_facts``: prompts may be Facts, which have no corrupt prompt.  ``at``: the positions at which the metric is
    read (`interp.recipes.read_out`).  Raises InterpError or PromptError for a model, prompts, a metric, positions or a
    ``memory`` that cannot be used, before any forward.
    ``align``: whether positions or named spans of a pair's prompts correspond (`encode_pairs`).
    """

    model: Model
    given_prompts: Any
    metric_like: Metric | MetricFn | str
    engine: EngineKind = "auto"
    memory: int | str | None = None
    subset: Subset = WHOLE_SET
    show_progress: bool | None = None
    takes_facts: bool = False
    at: At = LAST
    align: Align = "position"
    items: list[Any] = field(init=False)
    metric: Metric = field(init=False)
    prompts: list[Encoded] = field(init=False)
    has_pairs: bool = field(init=False, default=True)
    runner: Engine = field(init=False)
    outs: list[list[ReadOut]] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.items = as_prompts(self.model, self.given_prompts)
        self.metric = as_metric(self.metric_like)
        if self.takes_facts:
            self.prompts, self.has_pairs = encode_any(self.items, self.model.coder)
        else:
            self.prompts = encode_pairs(self.items, self.model.coder, self.align)
        check_metric(self.metric, self.prompts, self.model, any_position=True)
        places = check_at(self.at)
        if places != (LAST,) or self.metric.over == "positions" or self.metric.reads_run:
            if self.align == "span":
                raise InterpError('align="span" compares prompts whose positions do not correspond: leave at="last"')
            check_readable(self.model, self.at, self.metric)
            self.outs = read_outs(places, self.metric, self.prompts, self.subset.lengths_differ)
        self.runner = Engine(self.model, self.engine, self.memory)

    @property
    def selected(self) -> range:
        """Numbers of the examples to run."""
        return self.subset.selected(len(self.prompts))

    def read_rows(self, numbers: Sequence[int], runs: int = 1) -> list[tuple[int, ...]] | None:
        """Return the rows that are read of the prompts of some examples, each ``runs`` times; None: the last ones."""
        if self.outs is None:
            return None
        return [rows for i in numbers for rows in [rows_of_all(self.outs[i])] * runs]

    def readout(
        self, numbers: Sequence[int], prompts: Sequence[Encoded], clean: Sequence[Run], changed: Sequence[Run]
    ) -> Readout | RunsReadout:
        """Return the readout of some examples, of which ``changed`` are the runs that cells go into."""
        if self.outs is None:
            return readout(prompts, [r.logits for r in clean])
        last = readout(prompts, [r.logits[-1] for r in clean])
        outs = [self.outs[i] for i in numbers]
        return RunsReadout(outs, last.answer, last.foil, [r.logits for r in clean], [r.logits for r in changed])

    def record_pairs(self, numbers: range, components: Sequence[str] = (), into: str = "clean") -> Batch:
        """Record clean and corrupt runs of some pairs in one go. ``into``: the runs that cells change."""
        prompts = [self.prompts[i] for i in numbers]
        ids = [ids for p in prompts for ids in (p.clean, p.corrupt)]
        runs = self.runner.record(ids, components, read=self.read_rows(numbers, 2))
        return self.scored(numbers, prompts, runs[::2], runs[1::2], into)

    def record_clean_first(self, numbers: range, components: Sequence[str] = ()) -> Batch:
        """Record the clean runs of some prompts, then the corrupt ones if they are pairs; cells go into the clean runs.

        ``components``: what the clean runs keep.
        """
        prompts = [self.prompts[i] for i in numbers]
        rows = self.read_rows(numbers)
        clean = self.runner.record([p.clean for p in prompts], components, read=rows)
        read = self.readout(numbers, prompts, clean, clean)
        scores = self.score(clean, read)
        corrupt = self.runner.record([p.corrupt for p in prompts], read=rows) if self.has_pairs else []
        return self._batch(numbers, prompts, clean, corrupt, read, scores)

    def scored(
        self, numbers: range, prompts: list[Encoded], clean: list[Run], corrupt: list[Run], into: str = "clean"
    ) -> Batch:
        """Score recorded runs; warn about pairs whose two runs score the same. Cells go into ``into``."""
        runs = clean if into == "clean" else corrupt
        read = self.readout(numbers, prompts, clean, runs)
        batch = self._batch(numbers, prompts, clean, corrupt, read, self.score(clean, read))
        batch.runs = runs
        return batch

    def _batch(
        self, numbers: range, prompts: list[Encoded], clean: list[Run], corrupt: list[Run],
        read: Readout | RunsReadout, scores: torch.Tensor,
    ) -> Batch:  # fmt: skip
        corrupt_scores, no_gap = torch.full_like(scores, torch.nan), torch.zeros_like(scores, dtype=torch.bool).tolist()
        if corrupt:
            corrupt_scores = self.score(corrupt, read)
            no_gap = self.have_no_gap(scores, corrupt_scores, [(clean, read), (corrupt, read)])
            if self.outs is None:
                no_gap = [same or p.clean == p.corrupt for same, p in zip(no_gap, prompts, strict=True)]
            if not self.subset.keep_nan:
                warn_if_no_gap(self.metric, self._flat(no_gap, numbers))
        return Batch(numbers, prompts, clean, corrupt, clean, read, scores.tolist(), corrupt_scores.tolist(), no_gap)

    def _flat(self, of_examples: Sequence[Any], numbers: range) -> list[Any]:
        """Return the values of every read-out of some examples."""
        if self.outs is None:
            return list(of_examples)
        outs = self.outs
        return [v for i, values in zip(numbers, of_examples, strict=True) for v in values[: len(outs[i])]]

    def have_no_gap(
        self, clean: torch.Tensor, corrupt: torch.Tensor, runs: Sequence[tuple[Sequence[Run], Readout | RunsReadout]]
    ) -> list[Any]:
        """Return for each example (and read-out) whether its clean and corrupt scores are the same within rounding.

        ``runs``: the runs that were scored, one list for each score, whose logits say how far rounding can go.
        """
        bounds = torch.stack(
            [rounding_of(self.metric, scored_runs, read, self.model.dtype) for scored_runs, read in runs]
        )
        return ((clean - corrupt).abs() <= bounds.amax(0)).tolist()

    def score(self, runs: Sequence[Run], read: Readout | RunsReadout) -> torch.Tensor:
        """Return the metric of base runs, float64 [runs] or [runs, read-outs].

        Raises InterpError if it is NaN, unless the subset keeps NaN.
        """
        return score_runs(self.metric, runs, read, self.subset.keep_nan)

    def run(self, source: CellSource, intervention: str, mode: str, **recipe: Any) -> Effects:
        """Run every cell of a recipe and return its Effects.

        ``recipe``: what the provenance says besides model, prompts, metric and engine. Raises Interrupted with the rows
        of the examples that are finished when Ctrl-C is pressed.
        """
        table, finished = EffectRows(intervention, mode, self.metric), 0
        if self.outs is not None:
            recipe["read"] = self._read_words()
        try:
            with progress(source.title, source.size, self.show_progress) as advance:
                for numbers in self._batches(source):
                    self._add_batch(table, source, numbers, advance)
                    finished = numbers.stop - self.selected.start
        except KeyboardInterrupt:
            if not finished:
                raise
            table.keep_examples(self.selected.start + finished)
            recipe["interrupted"] = f"{finished} of {len(self.selected)} examples were finished"
            raise Interrupted(self._effects(table, recipe)) from None
        return self._effects(table, recipe)

    def _effects(self, table: EffectRows, recipe: dict[str, Any]) -> Effects:
        """Return the rows with their provenance."""
        return table.effects(
            self.model, self.items, self.prompts, keep_nan=self.subset.keep_nan, **self.runner.provenance(), **recipe,
            **provenance_of(self.given_prompts),
        )  # fmt: skip

    def _add_batch(self, table: EffectRows, source: CellSource, numbers: range, advance: Advance) -> None:
        """Run the cells of some examples, and add their rows."""
        batch = source.batch(self, numbers)
        for rows in source.rows(batch):
            values = source.evaluate(self, batch, rows, advance)
            for row, value in _averaged(rows, values, source.samples):
                self._add_row(table, batch, row, value)

    def _add_row(self, table: EffectRows, batch: Batch, row: CellRow, value: Any) -> None:
        """Add a row, or one for each read-out."""
        number, prompt = batch.numbers[row.index], batch.prompts[row.index]
        scores: list[Any] = [batch.clean[row.index], batch.corrupt[row.index], value]
        sender = row.sender
        no_gap = batch.no_gap[row.index]
        if self.outs is None:
            table.add(number, row.address, prompt, scores[0], scores[1], scores[2], sender, no_gap)
            return
        for k, out in enumerate(self.outs[number]):
            clean, corrupt, patched = (x[k] for x in scores)
            if patched is None:  # the cell has no such position
                continue
            table.add(number, row.address, prompt, clean, corrupt, patched, sender, no_gap[k], out.label)

    def _read_words(self) -> str:
        """Say at which positions the metric is read."""
        how = {"position": "at each position", "positions": "over all positions together"}[self.metric.over]
        return f"at {self.at!r}, {how}"

    def _batches(self, source: CellSource) -> Iterator[range]:
        if not source.one_at_a_time:
            components, runs, most = source.components, source.runs_per_example, self.subset.together
            yield from batches(self.prompts, self.selected, self.runner, components, runs, most)
            return
        for i in self.selected:
            for _ in batches([self.prompts[i]], range(1), self.runner, source.components, source.runs_per_example):
                yield range(i, i + 1)


def batches(
    prompts: Sequence[Encoded], selected: range, runner: Engine, components: Sequence[str], runs_per_example: int,
    most: int | None = None,
) -> Iterator[range]:  # fmt: skip
    """Yield ranges of examples whose base runs fit into `RUN_BYTES` together, or into half of the engine's budget.

    ``most``: examples of a range.

    Cuts the engine's batches of cells to what is left of the budget. Raises InterpError, before anything is run, if not
    one cell fits next to the base runs of one example.
    """
    budget = runner.budget
    held = [runs_per_example * budget.run(p.longest, components) for p in prompts]
    # while it is recorded, a run needs a forward's rows too
    sizes = [h + runs_per_example * budget.row * p.longest for h, p in zip(held, prompts, strict=True)]
    limit = RUN_BYTES if budget.limit is None else min(RUN_BYTES, budget.limit / 2)
    for size, run_bytes, prompt in zip(sizes, held, prompts, strict=True):
        budget.check(prompt.longest, max(run_bytes, size - budget.cell(prompt.longest)))
    ranges, start, used = [], selected.start, 0.0
    for i in selected:
        if i > start and (used + sizes[i] > limit or i - start == most):
            ranges.append(range(start, i))
            start, used = i, 0
        used += sizes[i]
    for numbers in [*ranges, range(start, selected.stop)]:
        runner.fit_batches_to_memory(max(prompts[i].longest for i in numbers), sum(held[i] for i in numbers))
        yield numbers


def _averaged(rows: Sequence[CellRow], values: Sequence[Value], samples: int) -> Iterator[tuple[CellRow, Value]]:
    """Yield each row with its value: with several samples, the mean over an example's equal lists of rows."""
    if samples == 1:
        yield from zip(rows, values, strict=True)
        return
    start = 0
    while start < len(rows):
        stop = start
        while stop < len(rows) and rows[stop].index == rows[start].index:
            stop += 1
        by_sample = torch.tensor(values[start:stop], dtype=torch.float64).unflatten(0, (samples, -1))
        yield from zip(rows[start : start + by_sample.shape[1]], by_sample.mean(0).tolist(), strict=True)
        start = stop
