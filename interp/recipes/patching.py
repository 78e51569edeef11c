"""Activation patching: carry an activation from one prompt's run into the other's, and see what follows.

Denoising (clean → corrupt run) asks what is sufficient to restore the answer; noising (corrupt → clean run)
what is necessary for it. Heimersheim & Nanda 2024, "How to use and interpret activation patching".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch

from interp.engine import Cell, Engine, Run, Write
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.engine.runs import differs
from interp.errors import InterpError, PromptError
from interp.metrics import Metric, MetricFn, as_metric, logit_diff
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PromptPair, encode_pairs, first_difference
from interp.recipes.sweep_loop import (
    Rows,
    asked_of,
    check_metric,
    chunks,
    evaluate_or_keep,
    provenance_of,
    readout,
    score_runs,
    tell_of_equal,
)
from interp.recipes.targets import Groups, Target, all_sites, components_of, spelled, targets_of
from interp.results.effects import Effects
from interp.sites import Site
from interp.utils.progress import Advance, progress
from interp.utils.provenance import prompt_hash

Mode = Literal["denoise", "noise"]
STREAM = ("resid_pre", "resid_mid", "resid_post")  # all that a position passes on from there


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
    sources: PromptPair | Iterable[PromptPair] | None = None,
    memory: int | str | None = None,
) -> Effects:
    """Patch every site of every pair, one at a time.

    ``mode="denoise"`` writes the clean activation into the corrupt run; ``"noise"`` the corrupt one into the
    clean run. ``metric`` reads the next-token logits at the prompt's last position. Returns one row per
    (pair, site): the metric on the clean, corrupt and patched runs, and ``effect``, 0 for a patch that does
    nothing and 1 for one that carries the whole difference over (NaN where clean and corrupt score the same).

    ``window``: layers patched together around each site's layer, as in `interp.trace`.  ``groups``: sites patched
    together, by name, ``{"movers": ["z.L9H6", "z.L10H0"]}``, or a list of lists; a group's row has its name as
    component, and the layer, head and position that its sites share.  ``sources``: for each pair another one of the
    same length, from whose clean (denoising) or corrupt (noising) run the activations come; metric, answer and scale
    stay the pair's own (an interchange intervention: Geiger et al. 2021, "Causal abstractions of neural networks").

    ``engine="naive"`` runs one full forward per cell; ``"auto"`` re-runs only what a patch can change, where
    that is exact. ``memory``: bytes beside the model's weights, or ``"4GiB"``; batches are cut to fit. Raises
    PromptError, SiteError or InterpError for bad input, before any sweep begins.
    """
    if mode not in ("denoise", "noise"):
        raise InterpError(f"unknown mode {mode!r}: 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)")
    listed = asked_of(model, pairs)
    metric, targets = as_metric(metric), targets_of(sites, groups, window, model.n_layers)
    prompts = encode_pairs(listed, model.coder)
    check_metric(metric, prompts, model)
    runner = Engine(model, engine, memory)
    runner.check_sites(all_sites(targets))
    given = None if sources is None else [sources] if isinstance(sources, PromptPair) else list(sources)
    sweep = _Sweep(runner, metric, prompts, targets, _donors(prompts, given, model, mode), mode, own=given is None)
    rows = Rows("patch" if window == 1 else f"patch, window of {window} layers", mode, metric)
    with progress(f"patch {'+'.join(sweep.components)} ({mode})", sweep.size, show_progress) as advance:
        for chunk in chunks(prompts, runner, sweep.components, runs_per_example=3 if given else 2):
            sweep.run(chunk, rows, advance)
    recipe = {"window": window, "groups": _members(targets), **provenance_of(pairs)}
    if given:
        recipe["sources"] = prompt_hash(given)
    return rows.effects(model, listed, engine=runner.describe(), **recipe)


class _Sweep:
    """The cells of every pair. ``donors``: ids of the runs that activations come from; ``own``: the pairs' other runs.

    Raises PromptError for a position that a pair does not have.
    """

    def __init__(
        self, runner: Engine, metric: Metric, prompts: Sequence[Encoded], targets: Sequence[Target],
        donors: Sequence[tuple[int, ...]], mode: Mode, own: bool,
    ):  # fmt: skip
        self.runner, self.metric, self.prompts, self.donors = runner, metric, prompts, donors
        self.mode, self.own = mode, own
        self.components = components_of(targets)
        self.plan = [list(spelled(targets, p)) for p in prompts]

    @property
    def size(self) -> int:
        """Number of cells."""
        return sum(map(len, self.plan))

    def run(self, chunk: range, rows: Rows, advance: Advance) -> None:
        """Adds the rows of some pairs."""
        here = [self.prompts[i] for i in chunk]
        # equal prompts share a run, so that with a pair's own runs as sources nothing is run twice
        ids = [row for i in chunk for row in (self.prompts[i].clean, self.prompts[i].corrupt, self.donors[i])]
        runs = self.runner.record(ids, self.components)
        clean, corrupt, source = runs[::3], runs[1::3], runs[2::3]
        read = readout(here, [r.logits for r in clean])
        scores = [score_runs(self.metric, base, read).tolist() for base in (clean, corrupt, source)]
        tell_of_equal(self.metric, *scores[:2])
        into, unchanged = (corrupt, scores[1]) if self.mode == "denoise" else (clean, scores[0])
        asked = [(n, target) for n, i in enumerate(chunk) for target in self.plan[i]]
        cells: list[Cell | None] = []
        known: list[float] = []
        for n, target in asked:
            first = self._first(here[n], source[n], into[n])
            cell = self._cell(n, target, here[n], source[n], into[n], first)
            kept = unchanged
            if cell is not None and (lead := self._takes_over(cell, first, source[n])):
                cell, kept = _mirrored(lead, source[n], into[n], n + len(here)), scores[2]
            cells.append(cell)
            known.append(kept[n])
        both = read.rows(torch.arange(len(here)).repeat(2))
        values = evaluate_or_keep(self.runner, self.metric, [*into, *source], cells, known, both, advance)
        for (n, target), value in zip(asked, values, strict=True):
            rows.add(chunk[n], target.address, here[n], scores[0][n], scores[1][n], value)

    def _first(self, prompt: Encoded, source: Run, into: Run) -> int:
        """The first row in which the runs can differ.

        Under causal attention an activation depends on tokens up to its own position only.
        """
        if not self.runner.fast:
            return 0
        return prompt.first_difference if self.own else _first_difference(source, into)

    def _cell(self, number: int, target: Target, prompt: Encoded, source: Run, into: Run, first: int) -> Cell | None:
        """The cell that writes ``source``'s activations into run ``into``; None if they are the same there."""
        writes = []
        for site in target.sites:
            start, stop = rows_of(site, prompt)
            start = max(start, first)
            if start < stop:
                writes.append(Write(site, start, stop, source.value(site, start, stop)))
        changing = any(differs(w, into) for w in writes) if self.runner.fast else writes
        return Cell(number, tuple(writes)) if changing else None

    def _takes_over(self, cell: Cell, first: int, run: Run) -> Write | None:
        """The write by which all rows up to some position become those of the run that values come from, if one does.

        It sets their residual stream from ``first`` on, before which the runs are the same; further writes, all of
        these rows later on, then find what they would set.
        """
        if not self.runner.fast or self.runner.cannot_reach_logits([run], replace(cell, run=0)):
            return None
        lead = min(cell.writes, key=lambda w: (w.site.layer or 0, _depth(w)))
        taken = all(_depth(w) >= 0 and w.start <= first and w.stop <= lead.stop for w in cell.writes)
        return lead if taken else None


def _depth(write: Write) -> int:
    """Where in a block a write sets the residual stream; -1 if it does not."""
    return STREAM.index(write.site.component) if write.site.component in STREAM else -1


def _mirrored(write: Write, source: Run, into: Run, number: int) -> Cell | None:
    """The cell of a write that takes over, seen from run ``source``, whose number is given; None if it is that run.

    What the rows before ``write.stop`` do from there on, they do in ``source``; changed in it are the rows after them,
    to those of ``into``: fewer to run.
    """
    start, stop = write.stop, len(source)
    if start == stop:
        return None
    other = Write(write.site, start, stop, into.value(write.site, start, stop))
    return Cell(number, (other,)) if differs(other, source) else None


def _donors(
    prompts: Sequence[Encoded], sources: Sequence[PromptPair] | None, model: Model, mode: Mode
) -> list[tuple[int, ...]]:
    """Token ids of the runs that activations are taken from, one per pair."""
    if sources is None:
        encoded = list(prompts)
    else:
        encoded = encode_pairs(sources, model.coder)
        if len(encoded) != len(prompts):
            raise PromptError(f"sources has {len(encoded)} pairs for {len(prompts)}: one for each expected")
    donors = [e.clean if mode == "denoise" else e.corrupt for e in encoded]
    for i, (prompt, donor) in enumerate(zip(prompts, donors, strict=True)):
        if len(prompt) != len(donor):
            raise PromptError(
                f"pair {i} has {len(prompt)} tokens and its source {len(donor)}, so positions do not correspond: "
                "choose sources of the same length"
            )
    return donors


def _first_difference(source: Run, into: Run) -> int:
    """The first row in which two runs can differ: before it their prompts are the same."""
    alike = getattr(source.ids, "digest", None) == getattr(into.ids, "digest", None)  # what is read beside the tokens
    return first_difference(source.ids, into.ids) if alike else 0


def _members(targets: Sequence[Target]) -> dict[str, list[str]]:
    return {str(t.address): [str(s) for s in t.sites] for t in targets if not isinstance(t.address, Site)}
