"""Ablation: take a component's activation away from the clean run, by a stated recipe.

What "away" means changes the answer (published circuit scores swing by their whole range with it), so the
recipe is part of every row and of the provenance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from interp.effects import Effects
from interp.engine import Cell, Engine, Run, Write
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError, PromptError
from interp.metrics import Metric, MetricFn, as_metric, logit_diff
from interp.model import Model
from interp.progress import progress
from interp.prompts import Encoded, PromptPair, encode_pairs
from interp.recipes import Rows, as_sites, check_metric, chunks, evaluate, provenance_of, readout, resolve, score_runs
from interp.sites import Site, Sites

Using = Literal["zero", "mean", "resample"]
RECIPES = {
    "zero": "activation set to 0",
    "mean": "activation set to its mean over all tokens of all clean prompts of the set",
    "resample": "activation taken, position by position from the last token back, from another example's clean prompt",
}


def ablate(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    sites: Iterable[Site | str] | Site | str,
    metric: Metric | MetricFn | str = logit_diff,
    using: Using = "mean",
    engine: EngineKind = "auto",
    seed: int = 0,
    show_progress: bool | None = None,
) -> Effects:
    """Ablate every site in the clean run of every pair, one at a time.

    ``using``: ``"zero"``; ``"mean"`` (over all tokens of all clean prompts given); ``"resample"`` (from the
    clean prompt of another example, drawn by ``seed`` among those of the same token length if there are any,
    else of the nearest length, aligned at the last token). ``effect`` is on the noising
    scale, (patched − clean)/(corrupt − clean): 1 means that losing this site costs as much as corrupting the
    prompt. ``raw`` is patched − clean in the metric's units. Raises InterpError for a recipe that the set
    cannot support (resampling needs two examples), before any sweep.
    """
    if using not in RECIPES:
        raise InterpError(f"unknown ablation {using!r}: choose one of {', '.join(map(repr, RECIPES))}")
    metric, sites = as_metric(metric), as_sites(sites)
    listed = [pairs] if isinstance(pairs, PromptPair) else list(pairs)
    prompts = encode_pairs(listed, model.coder)
    check_metric(metric, prompts)
    runner = Engine(model, engine)
    runner.check_sites(sites)
    plan = [list(resolve(sites, p)) for p in prompts]
    components = sorted({s.component for s in sites})
    donors = _donors(prompts, seed) if using == "resample" else list(range(len(prompts)))
    means = _means(runner, prompts, sites) if using == "mean" else {}
    rows = Rows(f"ablate {using}", "noise", metric)
    kept = components if using == "resample" else []
    with progress(f"ablate {'+'.join(components)} ({using})", sum(map(len, plan)), show_progress) as advance:
        for chunk in chunks(prompts, model, len(kept), runs_per_example=2 + len(kept)):
            here = [prompts[i] for i in chunk]
            both = runner.record([ids for p in here for ids in (p.clean, p.corrupt)])
            clean, corrupt = both[::2], both[1::2]
            donor_runs = runner.record([prompts[donors[i]].clean for i in chunk], kept) if kept else clean
            read = readout(here, [r.logits for r in clean])
            scores = [score_runs(metric, runs, read).tolist() for runs in (clean, corrupt)]
            asked = [(n, site) for n in range(len(here)) for site in plan[chunk[n]]]
            cells = [_cell(n, site, here[n], using, means, donor_runs[n], clean[n]) for n, site in asked]
            values = evaluate(runner, metric, clean, cells, read, advance).tolist()
            for (n, site), value in zip(asked, values, strict=True):
                rows.add(chunk[n], site, here[n], scores[0][n], scores[1][n], value)
    recipe = {"ablation": RECIPES[using], "ablation_seed": seed, **provenance_of(pairs)}
    return rows.effects(model, listed, engine=runner.describe(), **recipe)


def _cell(
    run: int, site: Site, prompt: Encoded, using: Using, means: dict[Site, Tensor], donor: Run, clean: Run
) -> Cell:
    start, stop = rows_of(site, prompt)
    if using == "zero":
        value = clean.resid.new_zeros(1, 1)
    elif using == "mean":
        value = means[site.at(None)][None]
    else:
        value = _aligned(donor, site, start, stop, len(prompt))
    return Cell(run, (Write(site, start, stop, value),))


def _donors(prompts: Sequence[Encoded], seed: int) -> list[int]:
    """For each example another one: a random cyclic order within each token length, else one of the nearest length."""
    if len(prompts) < 2:
        raise PromptError(
            "resample ablation draws from another example, and there is only one: add some, or use 'mean'"
        )
    rng = np.random.default_rng(seed)
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    donors = [0] * len(prompts)
    for length, members in by_length.items():
        if len(members) == 1:
            nearest = min((n for n in by_length if n != length), key=lambda n: abs(n - length))
            donors[members[0]] = int(rng.choice(by_length[nearest]))
            continue
        order = rng.permutation(members).tolist()
        for taker, giver in zip(order, order[1:] + order[:1], strict=True):
            donors[taker] = giver
    return donors


def _aligned(donor: Run, site: Site, start: int, stop: int, length: int) -> Tensor:
    """The donor's activation for rows [start, stop) of a prompt of ``length`` tokens, aligned at the last token.

    Same length: the same rows. A shorter donor repeats its first row, a longer one leaves its first rows out.
    """
    rows = torch.arange(start, stop, device=donor.resid.device) + len(donor) - length
    return donor.value(site, 0, len(donor))[rows.clamp(min=0)]


def _means(runner: Engine, prompts: Sequence[Encoded], sites: Sites) -> dict[Site, Tensor]:
    """Mean activation of each site (position set aside) over all tokens of all clean prompts, in float64."""
    wanted = list(dict.fromkeys(s.at(None) for s in sites))
    components = sorted({s.component for s in wanted})
    totals: dict[Site, Tensor] = {}
    count = 0
    for chunk in chunks(prompts, runner.model, len(components), runs_per_example=1):
        for run in runner.record([prompts[i].clean for i in chunk], components):
            count += len(run)
            for site in wanted:
                total = run.value(site, 0, len(run)).cpu().double().sum(0)  # on the CPU: MPS has no float64
                totals[site] = totals[site] + total if site in totals else total
    dtype = torch.float64 if runner.model.dtype == torch.float64 else torch.float32
    return {site: (total / count).to(runner.model.device, dtype) for site, total in totals.items()}
