"""Steering: add a direction to activations, and see where the answer moves.

Turner et al. 2023, "Steering language models with activation engineering"; difference of means as in Marks & Tegmark
2023, "The geometry of truth".
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine import Cell, Engine, Run, Write
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError, PromptError, SiteError
from interp.metrics import Metric, MetricFn, as_metric, logit_diff
from interp.model.model import Model
from interp.prompts.pairs import Fact, PromptPair, encode_any
from interp.recipes.sweep_loop import (
    Rows,
    asked_of,
    check_metric,
    chunks,
    evaluate,
    provenance_of,
    readout,
    resolve,
    score_runs,
    tell_of_equal,
)
from interp.recipes.targets import as_sites
from interp.results.effects import Effects
from interp.sites import Site
from interp.utils.progress import progress

TEXTS_AT_ONCE = 64  # of `mean_difference`, whose activations exist at one time


def steer(
    model: Model,
    prompts: PromptPair | Fact | Iterable[PromptPair | Fact],
    sites: Iterable[Site | str] | Site | str,
    direction: Float[Tensor, " width"],
    scale: float = 1.0,
    metric: Metric | MetricFn | str = logit_diff,
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
    memory: int | str | None = None,
) -> Effects:
    """Add ``scale`` × ``direction`` to the activation at every site in the clean run, one site at a time.

    ``direction`` has the width of the sites' activation: d_model, or d_head for q, k, v and z. One row per (prompt,
    site): ``raw`` is patched − clean in the metric's units, ``effect`` its share of corrupt − clean (NaN for a Fact).
    Raises SiteError or PromptError for bad input, before the sweep.
    """
    listed = asked_of(model, prompts)
    metric, sites = as_metric(metric), as_sites(sites)
    encoded, pairs = encode_any(listed, model.coder)
    check_metric(metric, encoded, model)
    runner = Engine(model, engine, memory)
    runner.check_sites(sites)
    plan = [list(resolve(sites, p)) for p in encoded]
    push = _push(direction, scale).to(model.device)
    components = sorted({s.component for s in sites})
    rows = Rows(f"steer × {scale:g}", "noise", metric)
    with progress(f"steer {'+'.join(components)}", sum(map(len, plan)), show_progress) as advance:
        for chunk in chunks(encoded, runner, components, runs_per_example=2):
            here = [encoded[i] for i in chunk]
            clean = runner.record([p.clean for p in here], components)
            _check_width(push, clean[0], plan[chunk[0]])
            read = readout(here, [r.logits for r in clean])
            scores = score_runs(metric, clean, read)
            corrupt = torch.full_like(scores, torch.nan)
            if pairs:
                corrupt = score_runs(metric, runner.record([p.corrupt for p in here]), read)
                tell_of_equal(metric, scores.tolist(), corrupt.tolist())
            asked = [(n, site) for n in range(len(here)) for site in plan[chunk[n]]]
            cells = [Cell(n, (Write(s, *rows_of(s, here[n]), push[None], "add"),)) for n, s in asked]
            values = evaluate(runner, metric, clean, cells, read, advance).tolist()
            for (n, site), value in zip(asked, values, strict=True):
                rows.add(chunk[n], site, here[n], float(scores[n]), float(corrupt[n]), value)
    recipe = {"scale": scale, "direction_norm": float(push.norm()), **provenance_of(prompts)}
    return rows.effects(model, listed, engine=runner.describe(), **recipe)


def _push(direction: Tensor, scale: float) -> Tensor:
    """What is added. Raises InterpError for what is no finite direction of real numbers."""
    try:
        push = scale * torch.as_tensor(direction).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InterpError(f"direction={direction!r:.60}, scale={scale!r}: a tensor and a number expected") from None
    if push.is_complex() or push.dtype == torch.bool:
        raise InterpError(f"the direction's numbers are of {push.dtype}: real numbers expected")
    if not push.isfinite().all():
        raise InterpError("the direction, or the scale, is not finite: nothing could be read after it was added")
    return push


def _check_width(push: Tensor, run: Run, sites: Sequence[Site]) -> None:
    for site in sites:
        width = run.value(site, 0, 1).shape[-1]
        if push.shape != (width,):
            raise SiteError(
                f"the direction has shape {list(push.shape)}, and the activation at {site} has width {width}: one "
                "number for each expected"
            )


@torch.no_grad()
def mean_difference(
    model: Model, positive: Iterable[str], negative: Iterable[str], site: Site | str
) -> Float[Tensor, " width"]:
    """Mean activation at ``site`` over the ``positive`` texts, less that over the ``negative`` ones.

    A site without a position averages over all positions of each text but a leading special token's, texts weighing
    the same. Raises PromptError if either list is empty.
    """
    site = Site.parse(site) if isinstance(site, str) else site
    runner = Engine(model, "naive")  # nothing is swept: keys and values need not be kept
    runner.check_sites([site])
    means = []
    for name, given in (("positive", positive), ("negative", negative)):
        texts = [] if isinstance(given, str) else list(given)
        if not texts:
            raise PromptError(f"mean_difference needs a list of at least one {name} text, got {given!r:.60}")
        found = []
        for i in range(0, len(texts), TEXTS_AT_ONCE):
            some = texts[i : i + TEXTS_AT_ONCE]
            runs = runner.record([model.coder.encode(t) for t in some], [site.component])
            found += [_mean(model, run.value, site, text) for run, text in zip(runs, some, strict=True)]
        means.append(torch.stack(found).mean(0))
    return means[0] - means[1]


def _mean(model: Model, value, site: Site, text: str) -> Tensor:
    n = len(model.coder.encode(text))
    if isinstance(site.position, str):
        raise SiteError(f"site {site}: texts have no named spans; give a number, or none for the mean of all positions")
    if isinstance(site.position, int):
        if not -n <= site.position < n:
            raise PromptError(f"site {site}: {text!r} has {n} tokens")
        return value(site, site.position % n, site.position % n + 1)[0]
    special = model.coder.offsets(text)[0] == (0, 0) and n > 1
    return value(site, int(special), n).mean(0)
