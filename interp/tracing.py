"""Causal tracing: corrupt a fact's subject with embedding noise, restore one state, see what comes back.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (ROME), section 2: noise of 3 standard
deviations of the subject embeddings, 10 noise samples, the probability of the fact as the metric; MLP and
attention outputs restored in windows of 10 layers, centred on the reported layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from interp.effects import Effects
from interp.engine import Cell, Engine, Run, Write
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, as_metric, prob
from interp.model import Model
from interp.progress import progress
from interp.prompts import Encoded, Fact, encode_facts
from interp.recipes import Rows, check_metric, chunks, evaluate, readout, resolve, score_runs, window_layers
from interp.sites import EACH, Site, Sites

Component = Literal["resid_post", "mlp_out", "attn_out"]
PUBLISHED_WINDOW = {"resid_post": 1, "mlp_out": 10, "attn_out": 10}


def trace(
    model: Model,
    facts: Fact | Iterable[Fact],
    component: Component = "resid_post",
    *,
    window: int | None = None,
    layers: Iterable[int] | int | None = None,
    positions: Iterable[int | str] | int | str = EACH,
    noise: float = 3.0,
    samples: int = 10,
    metric: Metric | MetricFn | str = prob,
    seed: int = 0,
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
) -> Effects:
    """Trace facts through the model.

    For each fact, Gaussian noise of ``noise`` × σ is added to the subject's token embeddings in ``samples``
    corrupted runs (σ: standard deviation of the embedding values of the distinct subject tokens in ``facts``);
    in each, the clean state of ``component`` is restored at one position, in ``window`` layers around each layer
    (default as published: 1 for resid_post, 10 for mlp_out and attn_out; from ⌊w/2⌋ layers below to ⌈w/2⌉ − 1 above,
    clipped at the ends). Row values are means over the samples: ``clean`` = P, ``corrupt`` = P*, ``patched`` = P
    with the state restored. Total effect = clean − corrupt; indirect effect = ``raw``; ``effect`` is its share.

    Raises PromptError or InterpError for bad input, before the sweep.
    """
    if component not in PUBLISHED_WINDOW:
        raise InterpError(f"cannot trace {component!r}: choose one of {', '.join(map(repr, PUBLISHED_WINDOW))}")
    if noise <= 0 or samples < 1:
        raise InterpError(f"noise must be positive and samples at least 1, got noise={noise}, samples={samples}")
    window = PUBLISHED_WINDOW[component] if window is None else window
    if window < 1:
        raise InterpError(f"window must be at least 1 layer, got {window}")
    metric = as_metric(metric)
    listed = [facts] if isinstance(facts, Fact) else list(facts)
    prompts = encode_facts(listed, model.coder)
    check_metric(metric, prompts)
    sites = model.sites(component, layers=layers, positions=positions)
    runner = Engine(model, engine)
    runner.check_sites(sites)
    plan = [list(resolve(sites, p)) for p in prompts]
    sigma = subject_std(model, prompts)
    title = f"restore {component}" + (f" (window {window})" if window > 1 else "")
    rows = Rows(title, "denoise", metric)
    with progress(f"trace: {title}", samples * sum(map(len, plan)), show_progress) as advance:
        for chunk in chunks(prompts, model, 1, runs_per_example=1 + samples):
            here = [prompts[i] for i in chunk]
            clean = runner.record([p.clean for p in here], [component])
            noisy_of = [i for i in range(len(here)) for _ in range(samples)]
            noises = [
                _noise(model, prompt, noise * sigma, seed, chunk[i], s)
                for i, prompt in enumerate(here)
                for s in range(samples)
            ]
            noisy = runner.record([here[i].clean for i in noisy_of], (), noises)
            read = readout(here, [r.logits for r in clean])
            noisy_read = read.rows(torch.tensor(noisy_of))
            start = score_runs(metric, noisy, noisy_read)
            asked = [(r, site) for r, i in enumerate(noisy_of) for site in plan[chunk[i]]]
            possible = [
                _cell(r, site, here[noisy_of[r]], clean[noisy_of[r]], model.n_layers, window, runner.fast)
                for r, site in asked
            ]
            cells = [c for c in possible if c is not None]
            advance(runner.leave(len(possible) - len(cells)))
            scored = iter(evaluate(runner, metric, noisy, cells, noisy_read, advance).tolist())
            patched = torch.tensor(
                [float(start[r]) if c is None else next(scored) for (r, _), c in zip(asked, possible, strict=True)],
                dtype=torch.float64,
            )
            _add_means(rows, chunk, here, plan, score_runs(metric, clean, read), start, patched, samples)
    return rows.effects(
        model, listed, engine=runner.describe(), noise=f"Gaussian, {noise} × σ on subject embeddings", sigma=sigma,
        samples=samples, window=window, trace_seed=seed, task="facts",
    )  # fmt: skip


def subject_std(model: Model, prompts: Sequence[Encoded]) -> float:
    """Standard deviation of the embedding values of all distinct subject tokens."""
    ids = sorted({i for p in prompts for i in p.clean[slice(*p.spans["subject"])]})
    if len(ids) == 0:
        raise InterpError("the facts have no subject tokens")
    embed = model.bridge.embed(torch.tensor([ids], device=model.device))
    return float(embed.detach().float().std())


def _noise(model: Model, prompt: Encoded, std: float, seed: int, example: int, sample: int) -> Tensor:
    """Noise on the subject's embeddings, zero elsewhere; the same for the same (seed, example, sample)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + example) * 10_007 + sample)
    start, stop = prompt.spans["subject"]
    out = torch.zeros(len(prompt), model.d_model)
    out[start:stop] = std * torch.randn(stop - start, model.d_model, generator=generator)
    return out.to(model.device)


def _cell(run: int, site: Site, prompt: Encoded, clean: Run, n_layers: int, window: int, causal: bool) -> Cell | None:
    """The restoring cell; None where the noise cannot have reached (before the subject, under causal attention)."""
    start, stop = rows_of(site, prompt)
    if causal:
        start = max(start, prompt.spans["subject"][0])
        if start >= stop:
            return None
    assert site.layer is not None
    there = Sites(Site(site.component, layer) for layer in window_layers(site.layer, window, n_layers))
    return Cell(run, tuple(Write(s, start, stop, clean.value(s, start, stop)) for s in there))


def _add_means(
    rows: Rows, chunk: range, here: Sequence[Encoded], plan: Sequence[Sequence[Site]],
    clean: Tensor, start: Tensor, patched: Tensor, samples: int,
) -> None:  # fmt: skip
    """Average over noise samples and add one row per (fact, site)."""
    at = 0
    for n, prompt in enumerate(here):
        sites = plan[chunk[n]]
        block = patched[at : at + samples * len(sites)].view(samples, len(sites)).mean(0).tolist()
        at += samples * len(sites)
        corrupt = float(start[n * samples : (n + 1) * samples].mean())
        for site, value in zip(sites, block, strict=True):
            rows.add(chunk[n], site, prompt, float(clean[n]), corrupt, value)
