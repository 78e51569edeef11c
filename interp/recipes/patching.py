"""Activation patching: copy an activation from one prompt's run into the other's, and read the metric.

Denoising (clean activation into the corrupt run) asks what is sufficient to restore the answer; noising (corrupt
activation into the clean run) asks what is necessary for it. Heimersheim & Nanda 2024, "How to use and interpret
activation patching".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from interp.engine import Cell, CellWrite, Engine, Run
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.engine.runs import is_change
from interp.errors import InterpError, PromptError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.model import Model
from interp.model.prompt_provenance import hash_of_prompts
from interp.model.session import in_session
from interp.prompts.coder import Encoded, first_difference
from interp.prompts.pairs import Align, PromptPair, encode_pairs, listed_prompts
from interp.prompts.positions import row_range
from interp.recipes.choices import ALIGNMENTS
from interp.recipes.forcing import with_answers
from interp.recipes.read_out import LAST, At
from interp.recipes.scoring import Value
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.recipes.targets import Groups, Target, all_sites, components_of, expand_each, targets_of
from interp.results.effects import Effects
from interp.sites import EACH, Site

Mode = Literal["denoise", "noise"]
STREAM = ("resid_pre", "resid_mid", "resid_post")  # components that hold everything a position passes on


@in_session
def patch(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    sites: Iterable[Site | str] | Site | str | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Mode = "denoise",
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
    *,
    groups: Groups | None = None,
    window: int = 1,
    align: Align = "position",
    sources: PromptPair | Iterable[PromptPair] | None = None,
    memory: int | str | None = None,
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Patch every site of every pair, one site at a time.

    ``mode="denoise"`` writes the clean activation into the corrupt run; ``"noise"`` writes the corrupt one into the
    clean run. ``metric`` reads the next-token logits at the positions of ``at`` (default: the last one). Returns one
    row per (pair, site, position read): the metric on the clean, corrupt and patched runs, and ``effect``, which is 0
    for a patch that does nothing and 1 for one that carries the whole difference over (NaN where both score the same).

        effects = interp.patch(model, pairs, model.sites("z"))      # every head
        effects = interp.patch(model, pairs, model.sites("resid_pre"), mode="noise")
        effects.summary().head()

    ``window``: layers patched together around each site's layer, as in `interp.trace`.  ``groups``: sites patched
    together, by name, ``{"movers": ["z.L9H6", "z.L10H0"]}``, or a list of lists; a group's row has its name as
    component, and the layer, head and position that its sites share.  ``sources``: for each pair another pair of the
    same length, from whose clean (denoising) or corrupt (noising) run the activations come; metric, answer and scale
    remain those of the pair itself (an interchange intervention: Geiger et al. 2021, "Causal abstractions of neural
    networks").

    ``align="span"`` patches role for role, between prompts that may differ in length: sites are at named spans of both
    prompts (`PromptPair.span` with ``corrupt=``). At ``"subject"`` every token of the target's span gets the mean over
    the source's span; ``"subject:last"`` and ``"subject:first"`` copy one token's activation to one token.

    ``at``: where the metric is read: ``"last"``, a position, a span (``"subject"``: a row for each of its tokens;
    ``"subject:mean"``: their mean; ``"subject:last"``), ``"each"`` position, or a list of these.

    ``engine="naive"`` runs one full forward per cell; ``"auto"`` re-runs only what a patch can change, where that is
    exact. ``memory``: bytes besides the model's weights, or ``"4GiB"``; batches are cut to fit. ``subset``: for
    `interp.sweep`. Raises PromptError, SiteError or InterpError for bad input, before any sweep begins.
    """
    if mode not in ("denoise", "noise"):
        raise InterpError(f"unknown mode {mode!r}: 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)")
    check_align(align)
    loop = SweepLoop(model, pairs, metric, engine, memory, subset, show_progress, at=at, align=align)
    targets = targets_of(sites, groups, window, model)
    loop.runner.check_sites(all_sites(targets))
    if sources is None:
        source_pairs = None
    else:
        source_pairs = listed_prompts(sources, "sources=: PromptPairs")
    donors = _donors(loop.prompts, source_pairs, model, align)
    kind = _SpanCells if align == "span" else _PatchCells

    def cells(part: SweepLoop) -> CellSource:
        longer = with_answers(model, donors, [p.appended for p in part.prompts])
        return kind(part.runner, part.prompts, targets, longer, mode, uses_own_runs=source_pairs is None)

    recipe: dict[str, Any] = {"window": window, "groups": _group_members(targets)}
    if align == "span":
        recipe["align"] = "span: the mean over the source's span; name:first and name:last token to token"
    if source_pairs:
        recipe["sources"] = hash_of_prompts(source_pairs, encode_pairs(source_pairs, model.coder, align, strings=True))
    return loop.run(cells, "patch" if window == 1 else f"patch, window of {window} layers", mode, **recipe)


@dataclass
class _PatchBatch(Batch):
    """``donors``: the runs that activations come from; ``donor_scores``: their metric."""

    donors: list[Run]
    donor_scores: list[Value]
    unchanged: list[Value]


class _PatchCells(CellSource):
    """The cells of every pair.

    ``sources``: the pairs from whose runs activations come.  ``uses_own_runs``: they are the pairs' other runs.
    Raises PromptError for a position that a pair does not have.
    """

    def __init__(
        self, runner: Engine, prompts: Sequence[Encoded], targets: Sequence[Target], sources: Sequence[Encoded],
        mode: Mode, uses_own_runs: bool,
    ):  # fmt: skip
        self.runner, self.sources, self.uses_own_runs = runner, sources, uses_own_runs
        self.mode: Mode = mode
        self.donors = [e.clean if mode == "denoise" else e.corrupt for e in sources]
        self.components = components_of(targets)
        self.targets = self._targets(targets, prompts)
        self.size = sum(map(len, self.targets))
        self.runs_per_example = 2 if uses_own_runs else 3
        self.title = f"patch {'+'.join(self.components)} ({mode})"

    def _targets(self, targets: Sequence[Target], prompts: Sequence[Encoded]) -> list[list[Target]]:
        """Return the targets of each pair."""
        return [list(expand_each(targets, p)) for p in prompts]

    def batch(self, loop: SweepLoop, numbers: range) -> _PatchBatch:
        """Record clean, corrupt and donor runs; cells go into the runs of the mode, or into donor runs."""
        prompts = [loop.prompts[i] for i in numbers]
        # equal prompts share a run, so that with a pair's own runs as donors nothing is run twice
        ids = [row for i, p in zip(numbers, prompts, strict=True) for row in (p.clean, p.corrupt, self.donors[i])]
        runs = loop.runner.record(ids, self.components, read=loop.read_rows(numbers, ids))
        base = loop.scored(numbers, prompts, runs[::3], runs[1::3], "corrupt" if self.mode == "denoise" else "clean")
        donors = runs[2::3]
        donor_scores = loop.score(donors, base.read).tolist()
        if self.mode == "denoise":
            into, unchanged = base.corrupt_runs, base.corrupt
        else:
            into, unchanged = base.clean_runs, base.clean
        base.runs, base.read = [*into, *donors], base.read.rows(torch.arange(len(prompts)).repeat(2))
        return _PatchBatch(**vars(base), donors=donors, donor_scores=donor_scores, unchanged=unchanged)

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every target of every pair, in one group."""
        assert isinstance(batch, _PatchBatch)
        yield [self._row(batch, n, target) for n, i in enumerate(batch.numbers) for target in self.targets[i]]

    def _row(self, batch: _PatchBatch, n: int, target: Target) -> CellRow:
        prompt, donor, into = batch.prompts[n], batch.donors[n], batch.runs[n]
        first = self._first_changed_row(prompt, donor, into)
        cell = self._cell(n, target, prompt, donor, into, first)
        if cell is not None and (lead := self._leading_write(cell, first, donor)):
            mirrored = _mirrored(lead, donor, into, n + len(batch.prompts))
            return CellRow(n, target.address, mirrored, batch.donor_scores[n])
        return CellRow(n, target.address, cell, batch.unchanged[n])

    def _first_changed_row(self, prompt: Encoded, donor: Run, into: Run) -> int:
        """Return the first row in which the two runs can differ.

        Under causal attention an activation depends only on the tokens up to its own position.
        """
        if not self.runner.fast:
            return 0
        return prompt.first_difference if self.uses_own_runs else _first_difference(donor, into)

    def _cell(self, number: int, target: Target, prompt: Encoded, donor: Run, into: Run, first: int) -> Cell | None:
        """Return the cell that writes ``donor``'s activations into run ``into``; None if they are equal there."""
        writes = []
        for site in target.sites:
            start, stop = rows_of(site, prompt)
            start = max(start, first)
            if start < stop:
                writes.append(CellWrite(site, start, stop, donor.value(site, start, stop)))
        is_changing = any(is_change(w, into) for w in writes) if self.runner.fast else bool(writes)
        return Cell(number, tuple(writes)) if is_changing else None

    def _leading_write(self, cell: Cell, first: int, donor: Run) -> CellWrite | None:
        """Return the write after which all rows up to its last equal the donor run's; None if there is none.

        It sets the residual stream from row ``first`` on, before which the two runs are equal. Further writes to these
        rows in later layers then find the values that they would set.
        """
        if (
            not self.runner.fast
            or donor.read is not None
            or self.runner.cannot_reach_logits([donor], replace(cell, run=0))
        ):
            return None
        lead = min(cell.writes, key=lambda w: (w.site.layer or 0, _depth(w)))
        is_covered = all(_depth(w) >= 0 and w.start <= first and w.stop <= lead.stop for w in cell.writes)
        return lead if is_covered else None


class _SpanCells(_PatchCells):
    """The cells of pairs that are compared span by span: the two runs may differ in length."""

    def _targets(self, targets: Sequence[Target], prompts: Sequence[Encoded]) -> list[list[Target]]:
        for prompt, source in zip(prompts, self.sources, strict=True):
            for site in (s for t in targets for s in t.sites):
                span_rows(site, prompt, source, self.mode)
        return [list(targets) for _ in prompts]

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every target of every pair, in one group."""
        assert isinstance(batch, _PatchBatch)
        yield [
            CellRow(n, target.address, self._span_cell(batch, n, i, target), batch.unchanged[n])
            for n, i in enumerate(batch.numbers)
            for target in self.targets[i]
        ]

    def _span_cell(self, batch: _PatchBatch, n: int, number: int, target: Target) -> Cell | None:
        donor, into, writes = batch.donors[n], batch.runs[n], []
        for site in target.sites:
            (start, stop), source = span_rows(site, batch.prompts[n], self.sources[number], self.mode)
            value = donor.value(site, *source).mean(0, keepdim=True)
            writes.append(CellWrite(site, start, stop, value.expand(stop - start, *value.shape[1:])))
        is_changing = any(is_change(w, into) for w in writes) if self.runner.fast else True
        return Cell(n, tuple(writes)) if is_changing else None


def check_align(align: str) -> None:
    """Raise InterpError unless ``align`` is a way in which two prompts can correspond."""
    if align not in ALIGNMENTS:
        raise InterpError(f"align={align!r}: one of {', '.join(map(repr, ALIGNMENTS))} expected")


def span_rows(site: Site, prompt: Encoded, source: Encoded, mode: Mode) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rows that a site's span has in the run that is changed, and in the run that values come from.

    Raises PromptError for a site that is not at a named span, and for a span that one of the prompts does not have.
    """
    if not isinstance(site.position, str) or site.position == EACH:
        raise PromptError(
            f'site {site}: align="span" compares named spans of two prompts, and their positions do not correspond: '
            'give positions="subject" (the mean over the span), "subject:first" or "subject:last"'
        )
    sides = (prompt.corrupt_side, source) if mode == "denoise" else (prompt, source.corrupt_side)
    rows = []
    for side, name in zip(sides, ("corrupt", "clean") if mode == "denoise" else ("clean", "corrupt"), strict=True):
        assert side is not None
        try:
            rows.append(row_range(site.position, side, f"site {site}"))
        except PromptError as error:
            how = "" if name == "clean" else " (name it with PromptPair.span(name, words, corrupt=words))"
            raise PromptError(f"the {name} prompt: {error}{how}") from None
    return rows[0], rows[1]


def _depth(write: CellWrite) -> int:
    """Return where in a block a write sets the residual stream; -1 if it does not."""
    return STREAM.index(write.site.component) if write.site.component in STREAM else -1


def _mirrored(write: CellWrite, donor: Run, into: Run, number: int) -> Cell | None:
    """Return the same intervention as a cell of the ``donor`` run (run ``number``); None if it equals that run.

    From the write on, the rows before ``write.stop`` compute what they compute in ``donor``. So it is enough to change
    the rows after it to those of ``into``: fewer rows to run.
    """
    start, stop = write.stop, len(donor)
    if start == stop:
        return None
    other = CellWrite(write.site, start, stop, into.value(write.site, start, stop))
    return Cell(number, (other,)) if is_change(other, donor) else None


def _donors(
    prompts: Sequence[Encoded], sources: Sequence[PromptPair] | None, model: Model, align: Align
) -> list[Encoded]:
    """Return the pairs from whose runs activations are taken, one per pair."""
    if sources is None:
        return list(prompts)
    encoded = encode_pairs(sources, model.coder, align, strings=True)
    if len(encoded) != len(prompts):
        raise PromptError(f"sources has {len(encoded)} pairs for {len(prompts)}: one for each expected")
    for i, (prompt, donor) in enumerate(zip(prompts, encoded, strict=True)):
        if len(prompt) != len(donor) and align == "position":
            raise PromptError(
                f"pair {i} has {len(prompt)} tokens and its source {len(donor)}, so positions do not correspond: "
                "choose sources of the same length"
            )
    return encoded


def _first_difference(donor: Run, into: Run) -> int:
    """Return the first row in which two runs can differ: before it their prompts are the same."""
    # images and other inputs besides the tokens have a digest
    is_same_input = getattr(donor.ids, "digest", None) == getattr(into.ids, "digest", None)
    return first_difference(donor.ids, into.ids) if is_same_input else 0


def _group_members(targets: Sequence[Target]) -> dict[str, list[str]]:
    return {str(t.address): [str(s) for s in t.sites] for t in targets if not isinstance(t.address, Site)}
