"""Causal tracing: corrupt a fact's subject, restore one state, and read how much of the answer returns.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (ROME), section 2: noise of 3 standard deviations
of the subject embeddings, 10 noise samples, the probability of the fact as the metric; MLP and attention outputs
restored in windows of 10 layers, centred on the reported layer; paths severed by keeping the MLP or attention outputs
of the restored token at their corrupted values. Instead of noise, another prompt can be used: symmetric token
replacement, which stays on the data's distribution (NOTICE, Golovanevsky et al. 2024, arXiv 2406.16320).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from interp.engine import Cell, CellWrite, Run
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, prob
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import Fact, PromptPair
from interp.recipes.choices import SEVERED, TRACED_WINDOWS
from interp.recipes.corruption import NoiseCorruption, PairCorruption, corruption_of
from interp.recipes.inputs import expand_sites
from interp.recipes.read_out import LAST, At
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.recipes.targets import window_with
from interp.recipes.trace_table import trace_table
from interp.results.effects import Effects
from interp.sites import EACH, Site, Sites
from interp.utils.arguments import check_seed, check_window

__all__ = ["trace", "trace_table"]

Component = Literal["resid_post", "mlp_out", "attn_out"]


@in_session
def trace(
    model: Model,
    facts: Fact | PromptPair | Iterable[Fact | PromptPair],
    component: Component = "resid_post",
    *,
    window: int | None = None,
    layers: Iterable[int] | int | None = None,
    positions: Iterable[int | str] | int | str = EACH,
    noise: float | None = None,
    samples: int | None = None,
    sigma: float | None = None,
    sever: Literal["mlp", "attn"] | None = None,
    metric: Metric | MetricFn | str = prob,
    seed: int = 0,
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
    memory: int | str | None = None,
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Trace facts through the model.

        facts = interp.tasks.facts(model, n=8)
        effects = interp.trace(model, facts)                       # states; "mlp_out" and "attn_out" in windows of 10
        interp.trace_table(effects)                                # averaged by layer and kind of token

    For each Fact, Gaussian noise of ``noise`` × σ (default 3) is added to the subject's token embeddings in ``samples``
    (default 10) corrupted runs. ``sigma``: σ, default the standard deviation of the embedding values of all subject
    tokens in ``facts`` (as published; give that of a longer list of subjects to compare few facts with others),
    measured where the noise is added: behind a factor or norm that the model's embedding has. For a
    PromptPair the corrupted run is its corrupt prompt, without noise: symmetric token replacement
    (`interp.tasks.fact_pairs` makes such pairs of facts).

    In each corrupted run the clean state of ``component`` is restored at one position, in ``window`` layers around each
    layer (default as published: 1 for resid_post, 10 for mlp_out and attn_out; from ⌊w/2⌋ layers below to ⌈w/2⌉ − 1
    above, clipped at the ends). ``positions``: ``"each"``, ``"subject"`` (all its tokens at once), ``"subject:last"``,
    or any other. ``sever="mlp"`` or ``"attn"`` keeps the MLP or attention outputs of all later layers, at the restored
    tokens, at their corrupted values: the answer then returns without them. Needs component="resid_post".

    Row values are means over the samples: ``clean`` = P, ``corrupt`` = P*, ``patched`` = P with the state restored.
    Total effect TE = clean − corrupt; indirect effect IE = ``raw``; ``effect`` is IE/TE. `trace_table` averages them
    over facts. ``at``: where the metric is read, as in `interp.patch`. ``subset``: for `interp.sweep`. Raises
    PromptError or InterpError for bad input, before the sweep.
    """
    window = _checked_window(component, window, sever)
    check_seed(seed)
    loop = SweepLoop(model, facts, metric, engine, memory, subset, show_progress, takes_facts=True, at=at)
    if loop.metric.reads_run:
        raise InterpError(
            f"a trace has several corrupted runs, and metric {loop.metric.name!r} reads one: use interp.kl"
        )
    corruption = corruption_of(model, loop.prompts, loop.has_pairs, noise, samples, sigma, seed)
    sites = model.sites(component, layers=layers, positions=positions)
    restore = _Restore(model, window, None if sever is None else SEVERED[sever])
    loop.runner.check_sites([*sites, *restore.other_sites(sites)])
    intervention = f"restore {component}{_suffix(window, sever)}"

    def cells(part: SweepLoop) -> CellSource:
        return _TraceCells(f"trace: {intervention}", part, sites, component, corruption, restore)

    recipe = {"window": window, "severed": sever, "trace_seed": seed, **corruption.recipe()}
    if not loop.has_pairs:
        recipe["task"] = "facts"
    return loop.run(cells, intervention, "denoise", **recipe)


class _TraceCells(CellSource):
    """The cells of every fact, in each of its corrupted runs. Raises PromptError for a position that a fact lacks."""

    def __init__(
        self, title: str, loop: SweepLoop, sites: Sites, component: str, corruption: NoiseCorruption | PairCorruption,
        restore: _Restore,
    ):  # fmt: skip
        self.title, self.component, self.corruption, self.restore = title, component, corruption, restore
        self.is_fast = loop.runner.fast
        self.samples = corruption.samples
        self.sites = {i: list(expand_sites(sites, loop.prompts[i])) for i in loop.selected}
        self.size = self.samples * sum(map(len, self.sites.values()))
        self.components = [component, *restore.frozen]
        self.runs_per_example = 1 + self.samples

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Clean runs, and corrupted runs that cells go into; a fact's corrupt score is the mean over its runs."""
        prompts = [loop.prompts[i] for i in numbers]
        ids = [p.clean for p in prompts]
        clean = loop.runner.record(ids, [self.component], read=loop.read_rows(numbers, ids))
        rows = loop.read_rows(numbers, [row for row in ids for _ in range(self.samples)])
        corrupted = self.corruption.runs(loop.runner, prompts, numbers, self.restore.frozen, rows)
        read = loop.readout(numbers, prompts, clean, clean)
        corrupted_read = read.rows(torch.arange(len(prompts)).repeat_interleave(self.samples))
        self.corrupted_scores = loop.score(corrupted, corrupted_read)
        scores = loop.score(clean, read)
        corrupt = torch.stack([x.mean(0) for x in self.corrupted_scores.split(self.samples)])
        rounding = loop.rounding([(clean, read)])
        no_gap = ((scores - corrupt).abs() <= rounding).tolist()
        return Batch(
            numbers, prompts, clean, [], corrupted, corrupted_read, scores.tolist(), corrupt.tolist(), no_gap,
            rounding.tolist(),
        )  # fmt: skip

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every site of every corrupted run of every fact, in one group."""
        rows = []
        for r, corrupted in enumerate(batch.runs):
            n = r // self.samples
            prompt = batch.prompts[n]
            first = self.corruption.first(prompt) if self.is_fast else 0
            for site in self.sites[batch.numbers[n]]:
                cell = self.restore.cell(r, site, prompt, batch.clean_runs[n], corrupted, first)
                rows.append(CellRow(n, site, cell, self.corrupted_scores[r].tolist()))
        yield rows


def _suffix(window: int, sever: str | None) -> str:
    words = {None: "", "mlp": ", MLPs severed", "attn": ", attention severed"}[sever]
    return (f" (window {window})" if window > 1 else "") + words


def _checked_window(component: str, window: int | None, sever: str | None) -> int:
    if not isinstance(component, str) or component not in TRACED_WINDOWS:
        raise InterpError(f"cannot trace {component!r}: choose one of {', '.join(map(repr, TRACED_WINDOWS))}")
    if sever is not None and (sever not in SEVERED or component != "resid_post"):
        raise InterpError(
            f"sever={sever!r} with component={component!r}: 'mlp' or 'attn' expected, and component='resid_post'"
        )
    window = TRACED_WINDOWS[component] if window is None else window
    check_window(window)
    return window


@dataclass(frozen=True)
class _Restore:
    """What a cell restores, and which component it keeps corrupted while it does."""

    model: Model
    window: int
    severed: str | None

    @property
    def frozen(self) -> list[str]:
        """Components kept at their corrupted values."""
        return [] if self.severed is None else [self.severed]

    def other_sites(self, sites: Sites) -> Iterator[Site]:
        """Yield the sites of a window, and severed ones, besides those that the caller named."""
        component, layers = next(s.component for s in sites), sorted({s.layer or 0 for s in sites})
        for layer in sorted({i for centre in layers for i in window_with(self.model, component, centre, self.window)}):
            yield Site(component, layer)
        yield from self._severed_after(window_with(self.model, component, layers[0], self.window)[-1])

    def _severed_after(self, layer: int) -> list[Site]:
        """Return the severed sites behind a layer, in layers that have them."""
        if self.severed is None:
            return []
        return [Site(self.severed, later) for later in self.model.layers_with(self.severed) if later > layer]

    def cell(self, run: int, site: Site, prompt: Encoded, clean: Run, corrupted: Run, first: int) -> Cell | None:
        """Return the restoring cell; None where the corruption cannot have an effect (before row ``first``)."""
        start, stop = rows_of(site, prompt)
        start = max(start, first)
        if start >= stop:
            return None
        assert site.layer is not None
        layers = window_with(self.model, site.component, site.layer, self.window)
        writes = [
            CellWrite(s, start, stop, clean.value(s, start, stop)) for s in (Site(site.component, i) for i in layers)
        ]
        severed = self._severed_after(layers[-1])
        writes += [CellWrite(s, start, stop, corrupted.value(s, start, stop)) for s in severed]
        return Cell(run, tuple(writes))
