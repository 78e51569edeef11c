"""Causal tracing: corrupt a fact's subject, restore one state, see what comes back.

Meng et al. 2022, "Locating and Editing Factual Associations in GPT" (ROME), section 2: noise of 3 standard
deviations of the subject embeddings, 10 noise samples, the probability of the fact as the metric; MLP and
attention outputs restored in windows of 10 layers, centred on the reported layer; paths severed by keeping the MLP or
attention outputs of the restored token at their corrupted values. In place of noise, another prompt: symmetric token
replacement, which stays on the data's distribution (NOTICE, Golovanevsky et al. 2024, arXiv 2406.16320).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.engine import Cell, Engine, Run, Write
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, as_metric, prob
from interp.model.model import Model
from interp.prompts.pairs import Encoded, Fact, PromptPair, encode_any
from interp.recipes.sweep_loop import (
    Rows,
    asked_of,
    check_metric,
    check_seed,
    chosen,
    chunks,
    evaluate_or_keep,
    provenance_of,
    readout,
    resolve,
    score_runs,
)
from interp.recipes.targets import window_layers
from interp.results.effects import Effects
from interp.sites import EACH, Site, Sites
from interp.utils.progress import Advance, progress

Component = Literal["resid_post", "mlp_out", "attn_out"]
PUBLISHED_WINDOW = {"resid_post": 1, "mlp_out": 10, "attn_out": 10}
PUBLISHED_NOISE, PUBLISHED_SAMPLES = 3.0, 10
SEVERED = {"mlp": "mlp_out", "attn": "attn_out"}


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
) -> Effects:
    """Trace facts through the model.

    For each Fact, Gaussian noise of ``noise`` × σ (default 3) is added to the subject's token embeddings in ``samples``
    (default 10) corrupted runs. ``sigma``: σ, default the standard deviation of the embedding values of all subject
    tokens in ``facts`` (as published; give that of a longer list of subjects to compare few facts with others). For a
    PromptPair the corrupted run is its corrupt prompt, without noise: symmetric token replacement
    (`interp.tasks.fact_pairs` makes such pairs of facts).

    In each corrupted run the clean state of ``component`` is restored at one position, in ``window`` layers around each
    layer (default as published: 1 for resid_post, 10 for mlp_out and attn_out; from ⌊w/2⌋ layers below to ⌈w/2⌉ − 1
    above, clipped at the ends). ``positions``: ``"each"``, ``"subject"`` (all its tokens at once), ``"subject:last"``,
    or any other. ``sever="mlp"`` or ``"attn"`` keeps the MLP or attention outputs of all later layers, at the restored
    tokens, at their corrupted values: what comes back then does so without them. Needs component="resid_post".

    Row values are means over the samples: ``clean`` = P, ``corrupt`` = P*, ``patched`` = P with the state restored.
    Total effect TE = clean − corrupt; indirect effect IE = ``raw``; ``effect`` is its share. `trace_table` averages
    them over facts. Raises PromptError or InterpError for bad input, before the sweep.
    """
    window = _checked(component, window, sever)
    check_seed(seed)
    listed = asked_of(model, facts)
    metric = as_metric(metric)
    prompts, pairs = encode_any(listed, model.coder)
    check_metric(metric, prompts, model)
    corruption = _corruption(model, prompts, pairs, noise, samples, sigma, seed)
    sites = model.sites(component, layers=layers, positions=positions)
    runner = Engine(model, engine, memory)
    restore = _Restore(model.n_layers, window, None if sever is None else SEVERED[sever])
    runner.check_sites([*sites, *restore.others(sites)])
    sweep = _Sweep(runner, metric, prompts, sites, component, corruption, restore)
    rows = Rows(f"restore {component}{_suffix(window, sever)}", "denoise", metric)
    with progress(f"trace: {rows.intervention}", sweep.size, show_progress) as advance:
        for chunk in chunks(prompts, runner, [component, *restore.frozen], runs_per_example=1 + corruption.samples):
            sweep.run(chunk, rows, advance)
    recipe = {"window": window, "severed": sever, "trace_seed": seed, **corruption.recipe()}
    about = provenance_of(facts) if pairs else {"task": "facts"}
    return rows.effects(model, listed, engine=runner.describe(), **recipe, **about)


class _Sweep:
    """The cells of every fact, in each of its corrupted runs. Raises PromptError for a position that one lacks."""

    def __init__(
        self, runner: Engine, metric: Metric, prompts: Sequence[Encoded], sites: Sites, component: str,
        corruption: _Noise | _Replacement, restore: _Restore,
    ):  # fmt: skip
        self.runner, self.metric, self.prompts, self.component = runner, metric, prompts, component
        self.corruption, self.restore, self.samples = corruption, restore, corruption.samples
        self.plan = {i: list(resolve(sites, prompts[i])) for i in chosen(len(prompts))}

    @property
    def size(self) -> int:
        """Number of cells."""
        return self.samples * sum(map(len, self.plan.values()))

    def run(self, chunk: range, rows: Rows, advance: Advance) -> None:
        """Adds the rows of some facts, each the mean over its corrupted runs."""
        here = [self.prompts[i] for i in chunk]
        clean = self.runner.record([p.clean for p in here], [self.component])
        noisy = self.corruption.runs(self.runner, here, chunk, self.restore.frozen)
        fact_of = [n for n in range(len(here)) for _ in range(self.samples)]
        read = readout(here, [r.logits for r in clean])
        noisy_read = read.rows(torch.tensor(fact_of))
        start = score_runs(self.metric, noisy, noisy_read)
        first = [self.corruption.first(p) if self.runner.fast else 0 for p in here]
        asked = [(r, site) for r, n in enumerate(fact_of) for site in self.plan[chunk[n]]]
        cells = [
            self.restore.cell(r, site, here[fact_of[r]], clean[fact_of[r]], noisy[r], first[fact_of[r]])
            for r, site in asked
        ]
        known = [float(start[r]) for r, _ in asked]
        values = evaluate_or_keep(self.runner, self.metric, noisy, cells, known, noisy_read, advance)
        patched = torch.tensor(values, dtype=torch.float64)
        scores = score_runs(self.metric, clean, read).tolist()
        for n, i in enumerate(chunk):
            sites = self.plan[i]
            mine, patched = patched.split([self.samples * len(sites), len(patched) - self.samples * len(sites)])
            corrupt = float(start[n * self.samples : (n + 1) * self.samples].mean())
            for site, value in zip(sites, mine.view(self.samples, len(sites)).mean(0).tolist(), strict=True):
                rows.add(i, site, here[n], scores[n], corrupt, value)


def _suffix(window: int, sever: str | None) -> str:
    words = {None: "", "mlp": ", MLPs severed", "attn": ", attention severed"}[sever]
    return (f" (window {window})" if window > 1 else "") + words


def _checked(component: str, window: int | None, sever: str | None) -> int:
    if not isinstance(component, str) or component not in PUBLISHED_WINDOW:
        raise InterpError(f"cannot trace {component!r}: choose one of {', '.join(map(repr, PUBLISHED_WINDOW))}")
    if sever is not None and (sever not in SEVERED or component != "resid_post"):
        raise InterpError(
            f"sever={sever!r} with component={component!r}: 'mlp' or 'attn' expected, and component='resid_post'"
        )
    window = PUBLISHED_WINDOW[component] if window is None else window
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise InterpError(f"window must be at least 1 layer, got {window!r}")
    return window


@dataclass(frozen=True)
class _Noise:
    """Corrupted runs of facts: ``std`` of noise on the subject."""

    model: Model
    multiple: float
    sigma: float
    samples: int
    seed: int

    def runs(self, runner: Engine, prompts: Sequence[Encoded], numbers: range, kept: Sequence[str]) -> list[Run]:
        many = [(i, p, s) for i, p in zip(numbers, prompts, strict=True) for s in range(self.samples)]
        std = self.multiple * self.sigma
        noises = [subject_noise(self.model, p, std, self.seed, i, s) for i, p, s in many]
        return runner.record([p.clean for _, p, _ in many], kept, noises)

    def first(self, prompt: Encoded) -> int:
        return prompt.spans["subject"][0]

    def recipe(self) -> dict[str, object]:
        words = f"Gaussian, {self.multiple} × σ on subject embeddings"
        return {"corruption": words, "noise": words, "sigma": self.sigma, "samples": self.samples}


@dataclass(frozen=True)
class _Replacement:
    """Corrupted runs of pairs: their corrupt prompts."""

    samples: int = 1

    def runs(self, runner: Engine, prompts: Sequence[Encoded], numbers: range, kept: Sequence[str]) -> list[Run]:
        return runner.record([p.corrupt for p in prompts], kept)

    def first(self, prompt: Encoded) -> int:
        return prompt.first_difference

    def recipe(self) -> dict[str, object]:
        return {"corruption": "the corrupt prompt (symmetric token replacement)", "samples": 1}


def _corruption(
    model: Model, prompts: Sequence[Encoded], pairs: bool, noise: float | None, samples: int | None,
    sigma: float | None, seed: int,
) -> _Noise | _Replacement:  # fmt: skip
    if pairs:
        if noise is not None or samples is not None or sigma is not None:
            raise InterpError("noise, samples and sigma are for Facts: a PromptPair is corrupted by its corrupt prompt")
        return _Replacement()
    noise = PUBLISHED_NOISE if noise is None else noise
    samples = PUBLISHED_SAMPLES if samples is None else samples
    whole = isinstance(samples, int) and not isinstance(samples, bool)
    numeric = all(isinstance(x, int | float) for x in (noise, 0 if sigma is None else sigma))
    if (
        not numeric
        or not 0 < noise < float("inf")
        or not whole
        or samples < 1
        or (sigma is not None and not 0 < sigma < float("inf"))
    ):
        raise InterpError(
            f"noise must be positive, sigma too, and samples a number from 1 on, got noise={noise}, samples={samples}, "
            f"sigma={sigma}"
        )
    return _Noise(model, noise, subject_std(model, prompts) if sigma is None else sigma, samples, seed)


def subject_std(model: Model, prompts: Sequence[Encoded]) -> float:
    """Standard deviation of the embedding values of all subject tokens, each as often as it occurs."""
    ids = [i for p in prompts for i in p.clean[slice(*p.spans["subject"])]]
    if len(ids) == 0:
        raise InterpError("the facts have no subject tokens")
    embed = model.bridge.embed(torch.tensor([ids], device=model.device))
    return float(embed.detach().float().std())


def subject_noise(model: Model, prompt: Encoded, std: float, seed: int, example: int, sample: int) -> Tensor:
    """Noise on the subject's embeddings, zero elsewhere; the same for the same (seed, example, sample)."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + example) * 10_007 + sample) % 2**63)
    start, stop = prompt.spans["subject"]
    out = torch.zeros(len(prompt), model.d_model)
    out[start:stop] = std * torch.randn(stop - start, model.d_model, generator=generator)
    return out.to(model.device)


@dataclass(frozen=True)
class _Restore:
    """What a cell restores, and which component it keeps corrupted while it does."""

    n_layers: int
    window: int
    severed: str | None

    @property
    def frozen(self) -> list[str]:
        return [] if self.severed is None else [self.severed]

    def others(self, sites: Sites) -> Iterator[Site]:
        """The sites of a window, and severed ones, beside those asked for."""
        component, layers = next(s.component for s in sites), sorted({s.layer or 0 for s in sites})
        for layer in sorted({i for at in layers for i in window_layers(at, self.window, self.n_layers)}):
            yield Site(component, layer)
        if self.severed is not None:
            first = window_layers(layers[0], self.window, self.n_layers)[-1] + 1
            yield from (Site(self.severed, layer) for layer in range(first, self.n_layers))

    def cell(self, run: int, site: Site, prompt: Encoded, clean: Run, noisy: Run, first: int) -> Cell | None:
        """The restoring cell; None where the corruption cannot have reached (before ``first``)."""
        start, stop = rows_of(site, prompt)
        start = max(start, first)
        if start >= stop:
            return None
        assert site.layer is not None
        there = [Site(site.component, layer) for layer in window_layers(site.layer, self.window, self.n_layers)]
        writes = [Write(s, start, stop, clean.value(s, start, stop)) for s in there]
        if self.severed is not None:
            later = [Site(self.severed, layer) for layer in range((there[-1].layer or 0) + 1, self.n_layers)]
            writes += [Write(s, start, stop, noisy.value(s, start, stop)) for s in later]
        return Cell(run, tuple(writes))


CATEGORIES = (
    "before the subject", "first subject token", "middle subject tokens", "last subject token",
    "first subsequent token", "further tokens", "last token",
)  # fmt: skip


def trace_table(effects: Effects, *, level: float = 0.95, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Average total and indirect effects over facts, by layer and kind of token (as in Meng et al. 2022, figure 2).

    ``effects``: of `trace` with positions="each". One row per (layer, category), in reading order: ``n`` facts;
    ``ATE``, the mean of clean − corrupt over all facts; ``AIE``, the mean indirect effect, with its bootstrap interval
    ``lo``, ``hi`` over facts (tokens of one category of one fact are averaged first); ``share`` = AIE over those
    facts' mean total effect. The only token of a subject counts as its last. Raises InterpError if a fact's tokens
    were not all traced, or none is its subject.
    """
    f: Any = effects.frame()
    if f.empty or f["position"].isna().any() or set(f["mode"]) != {"denoise"}:
        raise InterpError("trace_table needs the effects of interp.trace with positions='each', one row per token")
    category = pd.Series("", index=f.index, dtype="string")
    for example, part in f.groupby("example"):
        category[part.index] = _categories(example, part)
    averaged = Effects(f.assign(role=category, position=pd.NA, token=""))
    table = averaged.summary(by=["layer", "role"], level=level, n_boot=n_boot, seed=seed)
    one: Any = f.drop_duplicates("example")
    out = pd.DataFrame({
        "layer": table["layer"], "category": pd.Categorical(table["role"], CATEGORIES, ordered=True), "n": table["n"],
        "ATE": float((one["clean"] - one["corrupt"]).mean()), "AIE": table["raw"], "lo": table["raw_lo"],
        "hi": table["raw_hi"], "share": table["pooled"],
    })  # fmt: skip
    return out.sort_values(["category", "layer"]).reset_index(drop=True)


def _categories(example: Any, part: Any) -> np.ndarray:
    at = part["position"].to_numpy(dtype=int)
    inside = at[(part["role"] == "subject").to_numpy(dtype=bool)]
    if not len(inside) or set(at) != set(range(at.max() + 1)):
        raise InterpError(f"example {example}: every token must be traced, and one span be called 'subject'")
    first, last, end = inside.min(), inside.max(), at.max()
    conditions = [at == end, at < first, at == last, at == first, at < last, at == last + 1]
    names = [CATEGORIES[i] for i in (6, 0, 3, 1, 2, 4)]
    return np.select(conditions, names, CATEGORIES[5])
