"""Ablation: take a component's activation away from the clean run, by a stated recipe.

What "away" means changes the answer (published circuit scores swing by their whole range with it), so the
recipe is part of every row and of the provenance.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from interp.engine import Cell, Engine, Run, Write
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError, PromptError
from interp.metrics import Metric, MetricFn, as_metric, logit_diff
from interp.model.model import Model
from interp.prompts.pairs import Encoded, Prompt, PromptPair, encode_pairs
from interp.recipes.mean_activations import KEYS, Ids, Means, check_support, listed_reference, means_of, reference_ids
from interp.recipes.sweep_loop import (
    Rows,
    asked_of,
    check_metric,
    check_seed,
    chosen,
    chunks,
    evaluate,
    provenance_of,
    readout,
    score_runs,
    tell_of_equal,
)
from interp.recipes.targets import Groups, Target, all_sites, components_of, spelled, targets_of
from interp.results.effects import Effects
from interp.sites import Site, Sites
from interp.utils.progress import Advance, progress
from interp.utils.provenance import prompt_hash

Using = Literal["zero", "mean", "position_mean", "cama", "resample"]
RECIPES: dict[Using, str] = {
    "zero": "activation set to 0",
    "mean": "activation set to its mean over all tokens of all clean prompts of the set",
    "position_mean": "activation set to its mean over tokens at the same place in clean prompts of the same length",
    "cama": "activation set to its mean over the same token at the same place in clean prompts of the same length",
    "resample": "activation taken, position by position from the last token back, from another example's clean prompt",
}
Schedule = Literal["each", "cumulative", "all but one"]
SCHEDULES = ("each", "cumulative", "all but one")
MOST_WRITES = 5_000_000  # that the cells of one call may hold: each takes a few microseconds to make


def ablate(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    sites: Iterable[Site | str] | Site | str | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    using: Using = "mean",
    engine: EngineKind = "auto",
    seed: int = 0,
    show_progress: bool | None = None,
    *,
    groups: Groups | None = None,
    window: int = 1,
    schedule: Schedule = "each",
    reference: Iterable[str | Prompt | PromptPair] | None = None,
    memory: int | str | None = None,
) -> Effects:
    """Ablate every site in the clean run of every pair, one at a time.

    ``using``: ``"zero"``; ``"mean"``, over all tokens; ``"position_mean"``, over what stands at the same place (prompts
    of one template); ``"cama"``, context-aware: over the same token at the same place, which leaves what the token
    itself says and takes away what its context added (arXiv 2509.09650, "All for One"); ``"resample"``, the clean
    prompt of another example, drawn by ``seed`` among those of the same token length if there are any, else of the
    nearest length, aligned at the last token. ``reference``: the prompts (of a pair: the clean one) that means are
    taken over and examples drawn from; default the clean prompts given.

    ``schedule``: ``"each"`` site alone; ``"cumulative"``: each with all before it, in the order given; ``"all but
    one"``: everything but the site whose row it is. ``window`` and ``groups``: sites ablated together, as in
    `interp.patch`.

    ``effect`` is on the noising scale, (patched − clean)/(corrupt − clean): 1 means that losing this site costs as much
    as corrupting the prompt. ``raw`` is patched − clean in the metric's units. Raises InterpError for a recipe that the
    set cannot support (resampling needs two examples; means by place or token need two prompts for each), before any
    sweep.
    """
    _check(using, schedule, seed)
    listed = asked_of(model, pairs)
    metric, targets = as_metric(metric), targets_of(sites, groups, window, model.n_layers)
    prompts = encode_pairs(listed, model.coder)
    check_metric(metric, prompts, model)
    runner = Engine(model, engine, memory)
    every = all_sites(targets)
    runner.check_sites(every)
    plan = {i: _scheduled(list(spelled(targets, prompts[i])), schedule) for i in chosen(len(prompts))}
    _check_writes(plan.values())
    given = listed_reference(reference)
    taken = _Taken(runner, prompts, every, using, reference_ids(given, prompts, model.coder), given is None, seed)
    sweep = _Sweep(runner, metric, prompts, plan, taken)
    rows = Rows(f"ablate {using}" + _suffix(schedule, window), "noise", metric)
    title = f"ablate {'+'.join(components_of(targets))} ({using})"
    with progress(title, sum(map(len, plan.values())), show_progress) as advance:
        for chunk in chunks(prompts, runner, taken.kept, runs_per_example=3):
            sweep.run(chunk, rows, advance)
    recipe = {"ablation": RECIPES[using], "ablation_seed": seed, "schedule": schedule, "window": window}
    if given is not None:
        recipe |= {"reference": prompt_hash(given), "n_reference": len(given)}
    if schedule == "cumulative":
        recipe["order"] = [str(t.address) for t in targets]
    return rows.effects(model, listed, engine=runner.describe(), **recipe, **provenance_of(pairs))


class _Taken:
    """Where the activations come from that stand in place of the ablated ones.

    ``known``: ids of the prompts that means are over and that others are resampled from; ``own``: they are the examples
    themselves. Raises PromptError or InterpError for a recipe that they cannot support.
    """

    def __init__(
        self, runner: Engine, prompts: Sequence[Encoded], sites: Sites, using: Using, known: Sequence[Ids],
        own: bool, seed: int,
    ):  # fmt: skip
        self.runner = runner
        self.using: Using = using
        self.kept = sorted({s.component for s in sites}) if using == "resample" else []
        self.donors = _donors(prompts, known, own, seed) if using == "resample" else []
        self.means = None
        if using in KEYS:
            check_support(using, prompts, known, sites)
            self.means = means_of(runner, known, sites, using)

    def writer(self, chunk: range, here: Sequence[Encoded], clean: Sequence[Run]) -> _Writer:
        """Makes the writes of some examples."""
        donors = self.runner.record([self.donors[i] for i in chunk], self.kept) if self.kept else clean
        return _Writer(here, donors, self.means, self.using)


def _check(using: str, schedule: str, seed: int) -> None:
    if using not in RECIPES:
        raise InterpError(f"unknown ablation {using!r}: choose one of {', '.join(map(repr, RECIPES))}")
    if schedule not in SCHEDULES:
        raise InterpError(f"unknown schedule {schedule!r}: choose one of {', '.join(map(repr, SCHEDULES))}")
    check_seed(seed)


@dataclass(frozen=True)
class _Sweep:
    """The cells of every example."""

    runner: Engine
    metric: Metric
    prompts: Sequence[Encoded]
    plan: Mapping[int, Sequence[Target]]
    taken: _Taken

    def run(self, chunk: range, rows: Rows, advance: Advance) -> None:
        """Adds the rows of some examples."""
        here = [self.prompts[i] for i in chunk]
        both = self.runner.record([ids for p in here for ids in (p.clean, p.corrupt)])
        clean, corrupt = both[::2], both[1::2]
        read = readout(here, [r.logits for r in clean])
        scores = [score_runs(self.metric, runs, read).tolist() for runs in (clean, corrupt)]
        tell_of_equal(self.metric, *scores)
        writer = self.taken.writer(chunk, here, clean)
        asked = [(n, target) for n, i in enumerate(chunk) for target in self.plan[i]]
        cells = [Cell(n, tuple(writer(n, site) for site in target.sites)) for n, target in asked]
        values = evaluate(self.runner, self.metric, clean, cells, read, advance).tolist()
        for (n, target), value in zip(asked, values, strict=True):
            rows.add(chunk[n], target.address, here[n], scores[0][n], scores[1][n], value)


def _suffix(schedule: Schedule, window: int) -> str:
    words = {"each": "", "cumulative": ", cumulative", "all but one": ", all but this"}[schedule]
    return words + ("" if window == 1 else f", window of {window} layers")


def _scheduled(targets: list[Target], schedule: Schedule) -> list[Target]:
    """What each cell ablates, filed under the address of the site that is added or spared."""
    if schedule == "each":
        return targets
    if schedule == "cumulative":
        upto = accumulate((t.sites for t in targets), lambda before, sites: (*before, *sites))
        return [replace(t, sites=sites) for t, sites in zip(targets, upto, strict=True)]
    if len(targets) < 2:
        raise InterpError("schedule='all but one' spares one site in turn, and there is only one: give several")
    spared = [tuple(s for j, t in enumerate(targets) if j != i for s in t.sites) for i in range(len(targets))]
    return [replace(t, sites=sites) for t, sites in zip(targets, spared, strict=True)]


def _check_writes(plan: Iterable[Sequence[Target]]) -> None:
    writes = sum(len(t.sites) for targets in plan for t in targets)
    if writes > MOST_WRITES:
        raise InterpError(
            f"these cells change {writes:,} sites in all, more than {MOST_WRITES:,}: ablate in groups= (a layer at a "
            "time, say), at fewer positions, or for fewer pairs in a call"
        )


class _Writer:
    """The write that ablates a site in an example's clean run, made once for all cells that share it."""

    def __init__(self, prompts: Sequence[Encoded], donors: Sequence[Run], means: Means | None, using: Using):
        self.prompts, self.donors, self.means, self.using = prompts, donors, means, using
        self.made: dict[tuple[int, Site], Write] = {}

    def __call__(self, n: int, site: Site) -> Write:
        if (n, site) not in self.made:
            start, stop = rows_of(site, self.prompts[n])
            self.made[n, site] = Write(site, start, stop, self._value(n, site, start, stop))
        return self.made[n, site]

    def _value(self, n: int, site: Site, start: int, stop: int) -> Tensor:
        if self.means is not None:
            return self.means.value(site, self.prompts[n].clean, start, stop)
        if self.using == "resample":
            return _aligned(self.donors[n], site, start, stop, len(self.prompts[n]))
        return self.donors[n].resid.new_zeros(1, 1)


def _donors(prompts: Sequence[Encoded], known: Sequence[Ids], own: bool, seed: int) -> list[Ids]:
    """For each example the prompt that it is resampled from.

    ``own``: ``known`` are the examples themselves, and each takes another one, in a random cyclic order within each
    token length. Of the same length, or else of the nearest.
    """
    if own and len(prompts) < 2:
        raise PromptError(
            "resample ablation draws from another example, and there is only one: add some, give reference= prompts, "
            "or use 'mean'"
        )
    rng = np.random.default_rng(seed)
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(known):
        by_length.setdefault(len(ids), []).append(i)
    if not own:
        nearest = [min(by_length, key=lambda n, p=p: abs(n - len(p))) for p in prompts]
        return [known[int(rng.choice(by_length[n]))] for n in nearest]
    donors = [0] * len(prompts)
    for length, members in by_length.items():
        if len(members) == 1:
            nearest = min((n for n in by_length if n != length), key=lambda n: abs(n - length))
            donors[members[0]] = int(rng.choice(by_length[nearest]))
            continue
        order = rng.permutation(members).tolist()
        for taker, giver in zip(order, order[1:] + order[:1], strict=True):
            donors[taker] = giver
    return [known[i] for i in donors]


def _aligned(donor: Run, site: Site, start: int, stop: int, length: int) -> Tensor:
    """The donor's activation for rows [start, stop) of a prompt of ``length`` tokens, aligned at the last token.

    Same length: the same rows. A shorter donor repeats its first row, a longer one leaves its first rows out.
    """
    rows = torch.arange(start, stop, device=donor.resid.device) + len(donor) - length
    return donor.value(site, 0, len(donor))[rows.clamp(min=0)]
