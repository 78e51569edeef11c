"""The loop that every recipe shares: record → read out → score → cells → evaluate → rows.

A recipe is a `CellSource`: which base runs it records, and which cells it enumerates in them. `SweepLoop` checks what
every recipe takes, cuts the examples into batches that fit into memory, and makes Effects of the metric of every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from interp.engine import Cell, Engine, Run
from interp.engine.core import EngineKind
from interp.errors import InterpError, Interrupted
from interp.metrics import Metric, MetricFn, Readout, as_metric
from interp.model.model import Model
from interp.prompts.coder import Encoded
from interp.prompts.pairs import Align, encode_any, encode_pairs
from interp.recipes.example_batches import WHOLE_SET, Subset, batches
from interp.recipes.forcing import (
    Scored,
    Side,
    combine,
    is_string,
    sides_of,
    string_metric,
    string_outs,
    string_words,
    with_answers,
)
from interp.recipes.inputs import as_prompts, check_metric, check_readable, provenance_of
from interp.recipes.read_out import LAST, At, ReadOut, RunsReadout, check_at, read_outs, rows_of_all
from interp.recipes.rows import EffectRows
from interp.recipes.scoring import Value, evaluate_or_keep, readout, rounding_of, score_runs, warn_if_no_gap
from interp.recipes.targets import Address
from interp.results.effects import Effects
from interp.sites import Site
from interp.utils.progress import Advance, progress


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
    example (NaN where there is no corrupt run).  ``no_gap``: whether the two are the same within rounding, which can
    move them by ``rounding``.  Where other positions than the last are read, each of these is a list, of the read-outs.
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
    rounding: list[Value]


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


_ScoredRow = tuple[CellRow, str | None, Scored]  # with the name of the read-out


@dataclass
class SweepLoop:
    """The inputs of one call of a recipe, checked and encoded; `run` does the work.

    ``takes_facts``: prompts may be Facts, which have no corrupt prompt.  ``at``: the positions at which the metric is
    read (`interp.recipes.read_out`).  Raises InterpError or PromptError for a model, prompts, a metric, positions or a
    ``memory`` that cannot be used, before any forward.
    ``align``: whether positions or named spans of a pair's prompts correspond (`encode_pairs`).
    ``takes_strings``: answers may be several tokens.  ``strings``: the examples of which the metric reads several; they
    are run in ``sides``, loops over the prompts with the answer's tokens, or the foil's, behind them.
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
    takes_strings: bool = True
    items: list[Any] = field(init=False)
    metric: Metric = field(init=False)
    prompts: list[Encoded] = field(init=False)
    has_pairs: bool = field(init=False, default=True)
    runner: Engine = field(init=False)
    outs: list[list[ReadOut]] | None = field(init=False, default=None)
    strings: frozenset[int] = field(init=False, default=frozenset())
    sides: list[SweepLoop] = field(init=False, default_factory=list)
    is_side: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.items = as_prompts(self.model, self.given_prompts)
        self.metric = as_metric(self.metric_like)
        if self.takes_facts:
            self.prompts, self.has_pairs = encode_any(self.items, self.model.coder, strings=self.takes_strings)
        else:
            self.prompts = encode_pairs(self.items, self.model.coder, self.align, self.takes_strings)
        check_metric(self.metric, self.prompts, self.model, any_position=True)
        places = check_at(self.at)
        if places != (LAST,) or self.metric.over == "positions" or self.metric.reads_run:
            if self.align == "span":
                raise InterpError('align="span" compares prompts whose positions do not correspond: leave at="last"')
            check_readable(self.model, self.at, self.metric)
            self.outs = read_outs(places, self.metric, self.prompts, self.subset.lengths_differ)
        self.strings = frozenset(i for i, p in enumerate(self.prompts) if is_string(p, self.metric))
        of_string = string_metric(self.metric, self.model, places == (LAST,)) if self.strings else None
        self.runner = Engine(self.model, self.engine, self.memory)
        if of_string is not None:
            self.sides = [self._side(side, of_string) for side in sides_of(self.metric)]

    def _side(self, side: Side, metric: Metric) -> SweepLoop:
        """Return the loop that reads all tokens of the answers, or of the foils."""
        loop = copy(self)
        loop.metric, loop.is_side, loop.outs = metric, True, string_outs(self.prompts, side)
        strings = [p.answer_ids if side == "answer" else p.foil_ids for p in self.prompts]
        loop.prompts = with_answers(self.model, self.prompts, [ids[:-1] for ids in strings])
        return loop

    @property
    def selected(self) -> range:
        """Numbers of the examples to run."""
        return self.subset.selected(len(self.prompts))

    def read_rows(self, numbers: Sequence[int], ids: Sequence[Sequence[int]]) -> list[tuple[int, ...]] | None:
        """Return the rows that are read of runs with these ids, equally many for each example; None: the last ones.

        In prompts of other lengths than the clean one, they are equally far from the end.
        """
        if self.outs is None:
            return None
        of_runs = []
        for k, row in enumerate(ids):
            i = numbers[k * len(numbers) // len(ids)]
            further = len(row) - len(self.prompts[i])
            of_runs.append(tuple(r + further for r in rows_of_all(self.outs[i])))
        return of_runs

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
        runs = self.runner.record(ids, components, read=self.read_rows(numbers, ids))
        return self.scored(numbers, prompts, runs[::2], runs[1::2], into)

    def record_clean_first(self, numbers: range, components: Sequence[str] = ()) -> Batch:
        """Record the clean runs of some prompts, then the corrupt ones if they are pairs; cells go into the clean runs.

        ``components``: what the clean runs keep.
        """
        prompts = [self.prompts[i] for i in numbers]
        ids = [p.clean for p in prompts]
        clean = self.runner.record(ids, components, read=self.read_rows(numbers, ids))
        read = self.readout(numbers, prompts, clean, clean)
        scores = self.score(clean, read)
        ids = [p.corrupt for p in prompts] if self.has_pairs else []
        corrupt = self.runner.record(ids, read=self.read_rows(numbers, ids)) if ids else []
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
        corrupt_scores, rounding = torch.full_like(scores, torch.nan), torch.zeros_like(scores)
        no_gap = torch.zeros_like(scores, dtype=torch.bool).tolist()
        if corrupt:
            corrupt_scores = self.score(corrupt, read)
            rounding = self.rounding([(clean, read), (corrupt, read)])
            no_gap = ((scores - corrupt_scores).abs() <= rounding).tolist()
            if self.outs is None:
                no_gap = [same or p.clean == p.corrupt for same, p in zip(no_gap, prompts, strict=True)]
            if not self.subset.keep_nan and not self.is_side:
                warn_if_no_gap(self.metric, self._flat(no_gap, numbers), self.outs is not None)
        return Batch(
            numbers, prompts, clean, corrupt, clean, read, scores.tolist(), corrupt_scores.tolist(), no_gap,
            rounding.tolist(),
        )  # fmt: skip

    def _flat(self, of_examples: Sequence[Any], numbers: range) -> list[Any]:
        """Return the values of every read-out of some examples."""
        if self.outs is None:
            return list(of_examples)
        outs = self.outs
        return [v for i, values in zip(numbers, of_examples, strict=True) for v in values[: len(outs[i])]]

    def rounding(self, runs: Sequence[tuple[Sequence[Run], Readout | RunsReadout]]) -> torch.Tensor:
        """Return for each example (and read-out) how far rounding can move its scores.

        ``runs``: the runs that were scored, one list for each score.
        """
        return torch.stack([rounding_of(self.metric, scored, read, self.model.dtype) for scored, read in runs]).amax(0)

    def score(self, runs: Sequence[Run], read: Readout | RunsReadout) -> torch.Tensor:
        """Return the metric of base runs, float64 [runs] or [runs, read-outs].

        Raises InterpError if it is NaN, unless the subset keeps NaN.
        """
        return score_runs(self.metric, runs, read, self.subset.keep_nan)

    def run(
        self, make: CellSource | Callable[[SweepLoop], CellSource], intervention: str, mode: str, **recipe: Any
    ) -> Effects:
        """Run every cell of a recipe and return its Effects.

        ``make``: the recipe's cells, or a function that returns those in the prompts of this loop, or of one of its
        ``sides``; without a function, answers of several tokens are refused.
        ``recipe``: what the provenance says besides model, prompts, metric and engine. Raises Interrupted with the rows
        of the examples that are finished when Ctrl-C is pressed.
        """
        table, finished = EffectRows(intervention, mode, self.metric), 0
        if self.outs is not None:
            recipe["read"] = self._read_words()
        if self.strings:
            recipe |= string_words(self.model, self.prompts, self.metric)
        if isinstance(make, CellSource):
            if self.strings:
                raise InterpError("this recipe reads one token of each answer, and an answer or foil has several")
            cells = make
            make = lambda _: cells  # noqa: E731
        single = [(self, make(self))] if len(self.strings) < len(self.prompts) else []
        several = [(side, make(side)) for side in self.sides]
        source, share = (single or several)[0][1], len(self.strings) / len(self.prompts)
        size = sum((1 - share) * s.size for _, s in single) + sum(share * s.size for _, s in several)
        try:
            with progress(source.title, round(size), self.show_progress) as advance:
                for numbers in self._batches(source):
                    self._add_batch(table, several if numbers.start in self.strings else single, numbers, advance)
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

    def _add_batch(
        self, table: EffectRows, sources: Sequence[tuple[SweepLoop, CellSource]], numbers: range, advance: Advance
    ) -> None:
        """Run the cells of some examples, and add their rows.

        ``sources``: the recipe's cells, of the answers and of the foils if these are run one after the other.
        """
        sides = [loop._scored_rows(source, numbers, advance) for loop, source in sources]
        no_gap: dict[int, bool] = {}
        for row, label, scored in sides[0] if len(sides) == 1 else _combined(sides):
            number, s = numbers[row.index], scored
            no_gap[row.index] = s.no_gap
            table.add(
                number, row.address, self.prompts[number], s.clean, s.corrupt, s.patched, row.sender, s.no_gap, label
            )  # fmt: skip
        if sources[0][0].is_side and self.has_pairs and not self.subset.keep_nan:
            warn_if_no_gap(self.metric, list(no_gap.values()))

    def _scored_rows(self, source: CellSource, numbers: range, advance: Advance) -> Iterator[_ScoredRow]:
        """Run the cells of some examples; yield their rows, once for each read-out, with its name."""
        batch = source.batch(self, numbers)
        for rows in source.rows(batch):
            values = source.evaluate(self, batch, rows, advance)
            for row, value in _averaged(rows, values, source.samples):
                n = row.index
                numbers_of: list[Any] = [batch.clean[n], batch.corrupt[n], value, batch.rounding[n], batch.no_gap[n]]
                if self.outs is None:
                    yield row, None, Scored(*numbers_of)
                    continue
                for k, out in enumerate(self.outs[batch.numbers[n]]):
                    numbers_at = [x[k] for x in numbers_of]
                    if numbers_at[2] is not None:  # the cell has such a position
                        yield row, out.label, Scored(*numbers_at)

    def _read_words(self) -> str:
        """Say at which positions the metric is read."""
        how = {"position": "at each position", "positions": "over all positions together"}[self.metric.over]
        return f"at {self.at!r}, {how}"

    def _batches(self, source: CellSource) -> Iterator[range]:
        of_example = zip(self.prompts, *(side.prompts for side in self.sides), strict=True)
        prompts = [max(several, key=lambda p: p.longest) for several in of_example]
        if not source.one_at_a_time:
            components, runs, most = source.components, source.runs_per_example, self.subset.together
            yield from batches(prompts, self.selected, self.runner, components, runs, most, self.strings)
            return
        for i in self.selected:
            for _ in batches([prompts[i]], range(1), self.runner, source.components, source.runs_per_example):
                yield range(i, i + 1)


def _combined(sides: Sequence[Iterable[_ScoredRow]]) -> Iterator[_ScoredRow]:
    """Yield the rows of equal lists, with the numbers of the answer minus those of the foil."""
    rows: list[CellRow] = []
    scores: list[list[Scored]] = []
    for side in sides:
        rows, of_side = [], []
        for row, _, scored in side:
            rows.append(replace(row, cell=None))  # the values that it would write are no longer needed
            of_side.append(scored)
        scores.append(of_side)
    yield from ((row, None, scored) for row, scored in zip(rows, combine(scores), strict=True))


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
