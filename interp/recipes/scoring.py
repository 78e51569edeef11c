"""Read a metric from runs: of base runs as they are, and of cells that change them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from interp.engine import Cell, Engine, Run
from interp.engine.runs import join_logits
from interp.errors import InterpError, ModelError
from interp.metrics import Metric, Readout, rounding
from interp.prompts.coder import Encoded
from interp.recipes.read_out import RunsReadout
from interp.utils.progress import Advance

log = logging.getLogger("interp")

Value = float | list[float]  # the metric of a run or a cell: one number, or one of each read-out


def readout(prompts: Sequence[Encoded], clean_logits: Sequence[torch.Tensor]) -> Readout:
    """Return a metric's readout, one row per prompt.

    Raises ModelError if the model's output has no logit for an answer or foil.
    """
    device = clean_logits[0].device
    foils = [p.foil for p in prompts]
    largest, size = max(x for p in prompts for x in (*p.answer_ids, *p.foil_ids)), clean_logits[0].shape[-1]
    if largest >= size:
        raise ModelError(
            f"the model gives {size} numbers for a prompt, and an answer or foil is token {largest}: it has no head "
            "over its vocabulary, or the tokenizer belongs to another model"
        )
    return Readout(
        answer=torch.tensor([p.answer for p in prompts], device=device),
        foil=None if any(f is None for f in foils) else torch.tensor(foils, device=device),
        clean_logits=torch.stack(list(clean_logits)),
    )


def score_runs(
    metric: Metric, runs: Sequence[Run], read: Readout | RunsReadout, keep_nan: bool = False
) -> torch.Tensor:
    """Return the metric of base runs, float64 on the CPU: [runs], or [runs, read-outs].

    Raises InterpError, before any cell is run, if it is NaN or infinite, unless ``keep_nan``.
    """
    if isinstance(read, RunsReadout):
        scores = read.values(metric, join_logits([r.logits for r in runs]), range(len(runs)))
    else:
        scores = metric(torch.stack([r.logits for r in runs]), read).cpu().double()
    if (broken := int((~scores.isfinite()).sum())) and not keep_nan:
        raise InterpError(
            f"metric {metric.name!r} returned NaN or infinity for {broken} of {len(scores)} prompts as they are, "
            "before anything was changed: no effect could be read from it"
        )
    return scores


def rounding_of(metric: Metric, runs: Sequence[Run], read: Readout | RunsReadout, dtype: torch.dtype) -> torch.Tensor:
    """Return how far rounding can move the metric of each run, float64 on the CPU: [runs], or [runs, read-outs]."""
    if isinstance(read, RunsReadout):

        def bound(logits: torch.Tensor, one: Readout) -> torch.Tensor:
            return rounding(metric, logits, one, dtype)

        return read.values(metric, join_logits([r.logits for r in runs]), range(len(runs)), bound)
    return rounding(metric, torch.stack([r.logits for r in runs]), read, dtype).cpu()


def warn_if_no_gap(metric: Metric, no_gap: Sequence[bool], each_position: bool = False) -> None:
    """Warn about pairs whose recovery is undefined because clean and corrupt score the same.

    ``each_position``: there is one value for every position that is read of a pair.
    """
    if any(no_gap):
        where = "at %d of %d positions that are read" if each_position else "of %d of %d pairs"
        log.warning(
            f"metric %r is the same on the clean and the corrupt prompt {where}, within rounding: they have "
            "no recovery (effect is NaN), only raw changes", metric.name, sum(no_gap), len(no_gap),
        )  # fmt: skip


def evaluate(
    runner: Engine, metric: Metric, runs: Sequence[Run], cells: Sequence[Cell], read: Readout | RunsReadout,
    advance: Advance,
) -> torch.Tensor:  # fmt: skip
    """Return the metric of every cell: [cells], or [cells, read-outs]; row i of ``read`` belongs to run i."""
    if isinstance(read, RunsReadout):
        foil = read.foil if metric.reads_pair else None

        def score_read_outs(logits: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
            return read.values(metric, logits, [cells[i].run for i in indices], is_pair=foil is not None)

        columns = None if foil is None else torch.stack([read.answer, foil], dim=1)
        return runner.score(runs, cells, score_read_outs, advance, columns, read.width)
    if metric.reads_pair and read.foil is not None:
        # only two columns of logits are computed: the answer's and the foil's
        def score_columns(logits: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
            answer_column = read.answer.new_zeros(len(indices))
            return metric(logits, Readout(answer_column, answer_column + 1))

        return runner.score(runs, cells, score_columns, advance, torch.stack([read.answer, read.foil], dim=1))

    def score(logits: torch.Tensor, indices: Sequence[int]) -> torch.Tensor:
        return metric(logits, read.rows(torch.tensor([cells[i].run for i in indices])))

    return runner.score(runs, cells, score, advance)


def evaluate_or_keep(
    runner: Engine,
    metric: Metric,
    runs: Sequence[Run],
    cells: Sequence[Cell | None],
    unchanged: Sequence[Value],
    read: Readout | RunsReadout,
    advance: Advance,
) -> list[Value]:
    """Return the metric of every cell, and the ``unchanged`` value for a cell that is None and changes nothing."""
    changing = [c for c in cells if c is not None]
    advance(runner.count_answered(len(cells) - len(changing)))
    values = iter(evaluate(runner, metric, runs, changing, read, advance).tolist())
    return [value if cell is None else next(values) for cell, value in zip(cells, unchanged, strict=True)]
