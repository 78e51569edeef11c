"""Activation patching: carry an activation from one prompt's run into the other's, and see what follows.

Denoising (clean → corrupt run) asks what is sufficient to restore the answer; noising (corrupt → clean run)
what is necessary for it. Heimersheim & Nanda 2024, "How to use and interpret activation patching".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from interp.effects import Effects
from interp.engine import Cell, Engine, Run, Write
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, as_metric, logit_diff
from interp.model import Model
from interp.progress import progress
from interp.prompts import Encoded, PromptPair, encode_pairs
from interp.recipes import Rows, as_sites, check_metric, chunks, evaluate, provenance_of, readout, resolve, score_runs
from interp.sites import Site


def patch(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    sites: Iterable[Site | str] | Site | str,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Literal["denoise", "noise"] = "denoise",
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
) -> Effects:
    """Patch every site of every pair, one at a time.

    ``mode="denoise"`` writes the clean activation into the corrupt run; ``"noise"`` the corrupt one into the
    clean run. ``metric`` reads the next-token logits at the prompt's last position. Returns one row per
    (pair, site): the metric on the clean, corrupt and patched runs, and ``effect``, 0 for a patch that does
    nothing and 1 for one that carries the whole difference over (NaN where clean and corrupt score the same).

    ``engine="naive"`` runs one full forward per cell; ``"auto"`` re-runs only what a patch can change, where
    that is exact. Raises PromptError, SiteError or InterpError for bad input, before any sweep begins.
    """
    if mode not in ("denoise", "noise"):
        raise InterpError(f"unknown mode {mode!r}: 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)")
    metric, sites = as_metric(metric), as_sites(sites)
    listed = [pairs] if isinstance(pairs, PromptPair) else list(pairs)
    prompts = encode_pairs(listed, model.coder)
    check_metric(metric, prompts)
    runner = Engine(model, engine)
    runner.check_sites(sites)
    plan = [list(resolve(sites, p)) for p in prompts]
    rows = Rows("patch", mode, metric)
    components = sorted({s.component for s in sites})
    with progress(f"patch {'+'.join(components)} ({mode})", sum(map(len, plan)), show_progress) as advance:
        for chunk in chunks(prompts, model, len(components), runs_per_example=2):
            here = [prompts[i] for i in chunk]
            both = runner.record([ids for p in here for ids in (p.clean, p.corrupt)], components)
            clean, corrupt = both[::2], both[1::2]
            read = readout(here, [r.logits for r in clean])
            scores = {"clean": score_runs(metric, clean, read), "corrupt": score_runs(metric, corrupt, read)}
            target, source = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
            unchanged = scores["corrupt" if mode == "denoise" else "clean"]
            asked = [
                (n, site, _cell(n, site, prompt, source[n], runner.fast))
                for n, prompt in enumerate(here)
                for site in plan[chunk[n]]
            ]
            cells = [cell for *_, cell in asked if cell is not None]
            advance(runner.leave(len(asked) - len(cells)))
            patched = iter(evaluate(runner, metric, target, cells, read, advance).tolist())
            for n, site, cell in asked:
                value = float(unchanged[n]) if cell is None else next(patched)
                rows.add(chunk[n], site, here[n], float(scores["clean"][n]), float(scores["corrupt"][n]), value)
    return rows.effects(model, listed, engine=runner.describe(), **provenance_of(pairs))


def _cell(run: int, site: Site, prompt: Encoded, source: Run, causal: bool) -> Cell | None:
    """The cell that writes ``source``'s activation; None if it provably changes nothing.

    Under causal attention an activation depends on tokens up to its own position only: where clean and
    corrupt agree up to there, the patch writes what is there already.
    """
    start, stop = rows_of(site, prompt)
    if causal:
        start = max(start, prompt.first_difference)
        if start >= stop:
            return None
    return Cell(run, (Write(site, start, stop, source.value(site, start, stop)),))
