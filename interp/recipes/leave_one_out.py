"""Leave-one-out: remove each named span of a prompt, or replace it by other words, and read the metric.

Leave-one-out over the segments of a prompt, as in CausalArmor (arXiv 2602.07918): Δ_S = log P(Y | C) − log P(Y | C
without S), which is minus ``raw`` of metric logprob here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from interp.errors import PromptError
from interp.metrics import Metric, MetricFn, logprob
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.model_input import ModelInput
from interp.prompts.pairs import Fact, PromptPair
from interp.recipes.read_out import LAST, At, ReadOut, RunsReadout, rows_of_all
from interp.recipes.scoring import Value
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.results.effects import Effects
from interp.sites import Site
from interp.utils.progress import Advance


@dataclass(frozen=True)
class ShortenedPrompt:
    """A prompt without one span: the span's name, and the token ids with others in its place, or none.

    ``start``, ``stop``: where the span was; ``moves_by``: how far the tokens behind it move up (below 0) or down.
    ``outs``: what is read of it, for each read-out of the prompt; None for those of which a token is missing.
    """

    name: str
    ids: tuple[int, ...]
    start: int
    stop: int
    moves_by: int
    outs: tuple[ReadOut | None, ...] = ()

    def position(self, position: int) -> int | None:
        """Return where a token of the whole prompt stands; None if it is left out."""
        if position < self.start:
            return position
        return position + self.moves_by if position >= self.stop else None

    def read_out(self, out: ReadOut, metric: Metric) -> ReadOut | None:
        """Return a read-out of the whole prompt at the places of its tokens; None if one of them is missing.

        A token that is predicted (``metric.predicts``) needs another one before it.
        """
        if out.label is None and not metric.predicts:
            return replace(out, rows=(len(self.ids) - 1,))
        places = [self.position(row + metric.predicts) for row in out.rows]
        rows = tuple(-1 if place is None else place - metric.predicts for place in places)
        return None if min(rows) < 0 else replace(out, rows=rows)


@in_session
def leave_out(
    model: Model,
    prompts: PromptPair | Fact | Iterable[PromptPair | Fact],
    spans: Iterable[str] | str | None = None,
    *,
    instead: Mapping[str, str] | None = None,
    metric: Metric | MetricFn | str = logprob,
    show_progress: bool | None = None,
    memory: int | str | None = None,
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Measure the clean prompt with each named span's tokens left out, or replaced, one span at a time.

        pair = interp.PromptPair(clean, corrupt, " Mary", " John").span("place", " at the store")
        interp.leave_out(model, pair).summary()
        interp.leave_out(model, pair, "place", instead={"place": " at home"})

    ``spans``: names; default all spans of each prompt.  ``instead``: words that take a span's place (by its name),
    tokenised as a continuation; other spans are left out. Later tokens move up: positions change with the length, so
    each cell is a full forward. One row per (prompt, span), with the span's name as ``role``: ``raw`` is patched −
    clean in the metric's units, ``effect`` its share of corrupt − clean (NaN for a Fact). ``subset``: for
    `interp.sweep`.

    ``at``: where the metric is read, as in `interp.patch`: positions and spans of the whole prompt, whose tokens are
    read at the places to which they move up. A position that is left out or replaced has no row, and neither has a
    mean, or a metric over several positions, of which it is one. ``"last"`` is the last token that remains.

    Raises PromptError for a span that a prompt does not have, or that is the whole prompt, and if nothing that ``at``
    names remains; InterpError for a ``memory`` (bytes besides the weights, or ``"4GiB"``) that does not hold one
    prompt.
    """
    loop = SweepLoop(
        model, prompts, metric, "naive", memory, subset, show_progress, takes_facts=True, at=at, takes_strings=False
    )
    loop.runner.reason = "tokens move, so that nothing can be reused"
    if instead is not None and not (
        isinstance(instead, Mapping) and all(isinstance(text, str) for text in instead.values())
    ):
        raise PromptError(f"instead={instead!r:.60}: words by the names of spans expected, {{'subject': 'Mary'}}")
    replacements = {name: model.coder.continuation(text) for name, text in (instead or {}).items()}
    if spans is None:
        names = None
    else:
        names = [spans] if isinstance(spans, str) else list(spans)
    shortened = _shortened(loop.prompts, names, replacements, model.n_ctx)
    if loop.outs is not None:
        shortened = _readable(shortened, loop.outs, loop.metric, at)
    cells = _LeaveOutCells(shortened, bool(replacements))
    return loop.run(cells, cells.title, "noise", instead=dict(instead or {}))


class _LeaveOutCells(CellSource):
    """One cell per prompt and span; a cell is a whole prompt, so that rows have none of the engine's cells."""

    def __init__(self, shortened: list[list[ShortenedPrompt]], is_replacing: bool):
        self.shortened = shortened
        self.title = "leave out or replace" if is_replacing else "leave out"
        self.size = sum(map(len, shortened))

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Clean runs, then corrupt runs if there are any."""
        return loop.record_clean_first(numbers)

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every span of every prompt, in one group."""
        yield [
            CellRow(n, Site("embed", position=shortened.name), None)
            for n, i in enumerate(batch.numbers)
            for shortened in self.shortened[i]
        ]

    def evaluate(self, loop: SweepLoop, batch: Batch, rows: Sequence[CellRow], advance: Advance) -> list[Value]:
        """Return the metric of every shortened prompt."""
        shortened = [one for i in batch.numbers for one in self.shortened[i]]
        ids, read = [one.ids for one in shortened], batch.read
        if isinstance(read, RunsReadout):
            return _read_anywhere(loop, read, batch, rows, shortened, advance)

        def score(logits: Tensor, indices: Sequence[int]) -> Tensor:
            return loop.metric(logits, read.rows(torch.tensor([rows[i].index for i in indices])))

        return loop.runner.score_prompts(batch.clean_runs, ids, score, advance).tolist()


def _read_anywhere(
    loop: SweepLoop, read: RunsReadout, batch: Batch, rows: Sequence[CellRow], shortened: Sequence[ShortenedPrompt],
    advance: Advance,
) -> list[Any]:  # fmt: skip
    """Return the metric of every shortened prompt at each of its read-outs; None for those that it does not have."""
    needed = [rows_of_all([out for out in one.outs if out is not None]) for one in shortened]

    def score(logits: Tensor, indices: Sequence[int]) -> Tensor:
        values, places, first = torch.full((len(indices), read.width), torch.nan, dtype=torch.float64), [], 0
        of_read_outs: list[RunsReadout] = []
        wanted: list[int] = []  # rows of logits
        for cell, i in enumerate(indices):
            row_of = {row: first + k for k, row in enumerate(needed[i])}
            for k, out in enumerate(shortened[i].outs):
                if out is not None:
                    places.append((cell, k))
                    of_read_outs.append(read.moved(rows[i].index, k, out))
                    wanted += [row_of[row] for row in out.rows]
            first += len(needed[i])
        single = RunsReadout.joined(of_read_outs)
        at = tuple(torch.tensor(x) for x in zip(*places, strict=True))
        return values.index_put(at, single.values(loop.metric, logits[wanted], range(len(places)))[:, 0])

    ids = [one.ids for one in shortened]
    values: list[list[Any]] = loop.runner.score_prompts(
        batch.clean_runs, ids, score, advance, needed, read.width
    ).tolist()
    return [
        [None if k < len(one.outs) and one.outs[k] is None else v for k, v in enumerate(of_cell)]
        for one, of_cell in zip(shortened, values, strict=True)
    ]


def _readable(
    shortened: list[list[ShortenedPrompt]], outs: Sequence[Sequence[ReadOut]], metric: Metric, at: At
) -> list[list[ShortenedPrompt]]:
    """Return those shortened prompts of which something is read. Raises PromptError if there are none."""
    readable = []
    for of_prompt, of_whole in zip(shortened, outs, strict=True):
        moved = [replace(one, outs=tuple(one.read_out(out, metric) for out in of_whole)) for one in of_prompt]
        readable.append([one for one in moved if any(out is not None for out in one.outs)])
    if not any(readable):
        raise PromptError(f"at={at!r}: every number that it asks for needs a token that is left out: name others")
    return readable


def _shortened(
    prompts: Sequence[Encoded], names: Sequence[str] | None, replacements: Mapping[str, Sequence[int]], most: int
) -> list[list[ShortenedPrompt]]:
    """Return for each prompt the names of its spans, with the ids that remain without each: at most ``most`` ids."""
    shortened = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt.clean, ModelInput):
            raise PromptError(f"prompt {i} has an image: what follows a left-out span would no longer be where it was")
        of_prompt = []
        for name in prompt.spans if names is None else names:
            if name not in prompt.spans:
                spans = ", ".join(map(repr, prompt.spans)) or "none"
                raise PromptError(f"prompt {i} has no span {name!r}; its spans: {spans}")
            start, stop = prompt.spans[name]
            remaining = (*prompt.clean[:start], *replacements.get(name, ()), *prompt.clean[stop:])
            if not remaining:
                raise PromptError(f"prompt {i}: span {name!r} is the whole prompt, and nothing would be left")
            if len(remaining) > most:
                raise PromptError(
                    f"prompt {i} has {len(remaining)} tokens with the words for {name!r}: more than {most}"
                )
            moves_by = len(remaining) - len(prompt.clean)
            of_prompt.append(ShortenedPrompt(name, remaining, start, stop, moves_by))
        shortened.append(of_prompt)
    unused = set(replacements) - {one.name for of_prompt in shortened for one in of_prompt}
    if unused and any(shortened):
        raise PromptError(f"instead= names spans that are not left out: {', '.join(sorted(map(repr, unused)))}")
    if not any(shortened):
        raise PromptError("no prompt has a named span: PromptPair(…).span('subject', 'words') names one")
    return shortened
