"""Ablation: replace a component's activation in the clean run, by a stated recipe.

The replacement changes the answer (published circuit scores swing by their whole range with it), so the recipe is part
of every row and of the provenance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

from torch import Tensor

from interp.engine import Cell, CellWrite, Engine, Run
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.model import Model
from interp.model.prompt_provenance import hash_of_prompts
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import Prompt, PromptPair
from interp.recipes.choices import ABLATIONS, SCHEDULES
from interp.recipes.donors import aligned_rows, resample_donors
from interp.recipes.forcing import with_answer
from interp.recipes.mean_activations import (
    MEAN_KEYS,
    Ids,
    Means,
    check_support,
    listed_reference,
    means_of,
    reference_ids,
)
from interp.recipes.other_heads import check_other_heads, other_heads_writes
from interp.recipes.read_out import LAST, At
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.recipes.targets import Groups, Target, all_sites, components_of, expand_each, targets_of
from interp.results.effects import Effects
from interp.sites import Site, Sites
from interp.utils.arguments import check_seed

Using = Literal["zero", "mean", "position_mean", "cama", "resample", "other_heads"]
Schedule = Literal["each", "cumulative", "all but one"]
MOST_WRITES = 5_000_000  # that the cells of one call may hold: each takes a few microseconds to make


@in_session
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
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Ablate every site in the clean run of every pair, one site at a time.

        interp.ablate(model, pairs, model.sites("z"), using="mean")
        interp.ablate(model, pairs, "mlp_out.L9", using="resample", seed=1)
        interp.ablate(model, pairs, groups={"movers": ["z.L9H6", "z.L10H0"]}, using="zero")

    ``using``: ``"zero"``; ``"mean"``, over all tokens; ``"position_mean"``, over the tokens at the same place (prompts
    of one template); ``"cama"``, context-aware: over the same token at the same place, which keeps what the token
    itself says and removes what its context added (arXiv 2509.09650, "All for One"); ``"resample"``, the clean prompt
    of another example, drawn by ``seed`` among those of the same token length if there are any, else of the nearest
    length, aligned at the last token; ``"other_heads"``, for sites of ``z``: the mean z of the layer's other heads at
    the same tokens of the same run (V-SEAM, arXiv 2509.14837). Heads that are ablated together are not in that mean.
    ``reference``: the prompts (of a pair: the clean one) that means are taken over and examples drawn from; default
    the clean prompts given. ``at``: where the metric is read (default: the last position).

    ``schedule``: ``"each"`` site alone; ``"cumulative"``: each with all before it, in the order given; ``"all but
    one"``: everything except the site of the row. ``window`` and ``groups``: sites ablated together, as in
    `interp.patch`.

    ``effect`` is on the noising scale, (patched − clean)/(corrupt − clean): 1 means that losing this site costs as much
    as corrupting the prompt. ``raw`` is patched − clean in the metric's units. ``subset``: for `interp.sweep`. Raises
    InterpError for a recipe that the set cannot support (resampling needs two examples; means by place or token need
    two prompts for each), before any sweep.
    """
    _check_recipe(using, schedule, seed)
    loop = SweepLoop(model, pairs, metric, engine, memory, subset, show_progress, at=at)
    targets = targets_of(sites, groups, window, model)
    every_site = all_sites(targets)
    loop.runner.check_sites(every_site)
    plan = {i: _scheduled(list(expand_each(targets, loop.prompts[i])), schedule) for i in loop.selected}
    _check_writes(plan.values())
    if using == "other_heads":
        check_other_heads(plan.values(), model.n_heads)
    reference_prompts = listed_reference(reference)
    ids = reference_ids(reference_prompts, loop.prompts, model.coder)
    source = _AblationSource(loop, every_site, using, ids, reference_prompts is None, seed)
    recipe: dict[str, Any] = {"ablation": ABLATIONS[using], "ablation_seed": seed}
    recipe |= {"schedule": schedule, "window": window}
    if loop.strings and using in ("position_mean", "cama") and any(s.position is None for s in every_site):
        raise InterpError(
            f"using={using!r}: an answer of several tokens is read, and its tokens have no mean by place: name "
            "positions of the prompt (positions='each', or a span), or use 'mean', 'zero' or 'resample'"
        )
    if reference_prompts is not None:
        recipe |= {"reference": hash_of_prompts(reference_prompts, ids), "n_reference": len(reference_prompts)}
    if schedule == "cumulative":
        recipe["order"] = [str(t.address) for t in targets]
    cells = _AblationCells(f"ablate {'+'.join(components_of(targets))} ({using})", plan, source)
    return loop.run(lambda _: cells, f"ablate {using}" + _suffix(schedule, window), "noise", **recipe)


def _check_recipe(using: str, schedule: str, seed: int) -> None:
    if using not in ABLATIONS:
        raise InterpError(f"unknown ablation {using!r}: choose one of {', '.join(map(repr, ABLATIONS))}")
    if schedule not in SCHEDULES:
        raise InterpError(f"unknown schedule {schedule!r}: choose one of {', '.join(map(repr, SCHEDULES))}")
    check_seed(seed)


def _suffix(schedule: Schedule, window: int) -> str:
    words = {"each": "", "cumulative": ", cumulative", "all but one": ", all but this"}[schedule]
    return words + ("" if window == 1 else f", window of {window} layers")


def _scheduled(targets: list[Target], schedule: Schedule) -> list[Target]:
    """Return what each cell ablates, filed under the address of the site that is added or spared."""
    if schedule == "each":
        return targets
    if schedule == "cumulative":
        so_far = accumulate((t.sites for t in targets), lambda before, sites: (*before, *sites))
        return [replace(t, sites=sites) for t, sites in zip(targets, so_far, strict=True)]
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


class _AblationSource:
    """Where the replacing activations come from: zeros, means, or another prompt's run.

    ``reference``: token ids of the prompts that means are over and that donors are drawn from.  ``is_own_set``: they
    are the examples themselves. Raises PromptError or InterpError for a recipe that they cannot support.
    """

    def __init__(
        self, loop: SweepLoop, sites: Sites, using: Using, reference: Sequence[Ids], is_own_set: bool, seed: int
    ):
        self.runner: Engine = loop.runner
        self.using: Using = using
        self.components = sorted({s.component for s in sites}) if using == "resample" else []
        self.donors: list[Ids] = []
        self.means: Means | None = None
        if using == "resample":
            self.donors = resample_donors(loop.prompts, reference, is_own_set, seed)
            for side in loop.sides:  # raises for donors that no answer can follow
                for ids, prompt in zip(self.donors, side.prompts, strict=True):
                    with_answer(loop.model, ids, prompt.appended)
        if using in MEAN_KEYS:
            check_support(using, loop.prompts, reference, sites)
            self.means = means_of(loop.runner, reference, sites, using, loop.subset.means)

    def writer(self, batch: Batch) -> _Writer:
        """Return what makes the writes of a batch."""
        if self.using == "resample":
            model, examples = self.runner.model, zip(batch.numbers, batch.prompts, strict=True)
            ids = [with_answer(model, self.donors[i], p.appended) for i, p in examples]
            donors = self.runner.record(ids, self.components)
        else:
            donors = batch.clean_runs
        return _Writer(batch.prompts, donors, self.means, self.using, self.runner.model.n_heads)


@dataclass
class _AblationCells(CellSource):
    """The cells of every example: ``plan`` says by example which sites are ablated together."""

    title: str
    plan: Mapping[int, Sequence[Target]]
    source: _AblationSource

    def __post_init__(self) -> None:
        self.size = sum(map(len, self.plan.values()))
        self.components = self.source.components
        self.runs_per_example = 3

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Clean and corrupt runs."""
        return loop.record_pairs(numbers)

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every target of every example, in one group."""
        writer = self.source.writer(batch)
        yield [
            CellRow(n, target.address, Cell(n, writer.writes_of(n, target.sites)))
            for n, i in enumerate(batch.numbers)
            for target in self.plan[i]
        ]


class _Writer:
    """Makes the write that ablates a site in an example's clean run, once for all cells that share it."""

    def __init__(
        self, prompts: Sequence[Encoded], donors: Sequence[Run], means: Means | None, using: Using, n_heads: int
    ):
        self.prompts, self.donors, self.means, self.using = prompts, donors, means, using
        self.n_heads = n_heads
        self.writes: dict[tuple[int, Site], CellWrite] = {}

    def writes_of(self, n: int, sites: Sequence[Site]) -> tuple[CellWrite, ...]:
        """Return the writes that ablate the sites together in the batch's example ``n``."""
        if self.using == "other_heads":
            return tuple(other_heads_writes(sites, self.prompts[n], self.n_heads))
        return tuple(self.write(n, site) for site in sites)

    def write(self, n: int, site: Site) -> CellWrite:
        """Return the write at a site of the batch's example ``n``."""
        if (n, site) not in self.writes:
            start, stop = rows_of(site, self.prompts[n])
            self.writes[n, site] = CellWrite(site, start, stop, self._value(n, site, start, stop))
        return self.writes[n, site]

    def _value(self, n: int, site: Site, start: int, stop: int) -> Tensor:
        if self.means is not None:
            return self.means.value(site, self.prompts[n].clean, start, stop)
        if self.using == "resample":
            return aligned_rows(self.donors[n], site, start, stop, len(self.prompts[n]))
        return self.donors[n].resid.new_zeros(1, 1)
