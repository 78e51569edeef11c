"""Attention knock-out: forbid some tokens to read others, in a window of layers, and see what the answer loses.

Geva et al. 2023, "Dissecting recall of factual associations in auto-regressive language models": attention from the
last position to a span is cut in a window of layers around each layer. The cut is made inside the kernel, before the
softmax, so that what remains of a row still sums to 1.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from interp.engine import Cell, Cut, Engine
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError, PromptError
from interp.metrics import Metric, MetricFn, as_metric, logprob
from interp.model.model import Model
from interp.prompts.pairs import Encoded, Fact, PromptPair, encode_any
from interp.recipes.sweep_loop import (
    Rows,
    asked_of,
    check_metric,
    chunks,
    evaluate,
    provenance_of,
    readout,
    score_runs,
    tell_of_equal,
)
from interp.recipes.targets import window_layers
from interp.results.effects import Effects
from interp.sites import ALL, Site
from interp.utils.progress import progress


def knock_out(
    model: Model,
    prompts: PromptPair | Fact | Iterable[PromptPair | Fact],
    keys: int | str,
    queries: int | str | None = -1,
    *,
    layers: Iterable[int] | int | None = None,
    window: int | None = None,
    heads: Iterable[int] | int | None = None,
    metric: Metric | MetricFn | str = logprob,
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
    memory: int | str | None = None,
) -> Effects:
    """Cut what ``queries`` read from ``keys``, in ``window`` layers around each of ``layers``, in the clean run.

    ``keys``, ``queries``: a position (negative ones count from the end) or a named span ("subject" of a Fact);
    ``queries=None`` or ``"all"``: all positions. ``window``: layers cut together, centred as in `interp.trace`;
    default a fifth of the model's. ``heads``: query heads concerned, default all. One row per (prompt, layer), with
    the layer at the window's centre: ``raw`` is patched − clean in the metric's units; ``effect`` its share of
    corrupt − clean, NaN for a Fact, which has no corrupt prompt.

    Raises PromptError, SiteError or InterpError for bad input, also where a query would be left with nothing to read.
    """
    listed = asked_of(model, prompts)
    metric = as_metric(metric)
    encoded, pairs = encode_any(listed, model.coder)
    check_metric(metric, encoded, model)
    window = max(1, model.n_layers // 5) if window is None else window
    queries = None if queries == ALL else queries
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise InterpError(f"window must be at least 1 layer, got {window!r}")
    if layers is None:
        layers = model.attention_layers
    sites = model.sites("attn_out", layers=layers, positions="all" if queries is None else queries)
    chosen = None if heads is None else tuple(sorted({s.head or 0 for s in model.sites("z", layers=0, heads=heads)}))
    runner = Engine(model, engine, memory)
    runner.check_sites(sites)
    spans = [_spans(p, keys, queries) for p in encoded]
    rows = Rows(f"cut attention to {keys}", "noise", metric)
    with progress(f"knock out {keys}", len(sites) * len(encoded), show_progress) as advance:
        for chunk in chunks(encoded, runner, [], runs_per_example=2):
            here = [encoded[i] for i in chunk]
            clean = runner.record([p.clean for p in here])
            read = readout(here, [r.logits for r in clean])
            scores = score_runs(metric, clean, read)
            corrupt = torch.full_like(scores, torch.nan)
            if pairs:
                corrupt = score_runs(metric, runner.record([p.corrupt for p in here]), read)
                tell_of_equal(metric, scores.tolist(), corrupt.tolist())
            asked = [(n, site) for n in range(len(here)) for site in sites]
            cells = [_cell(n, site, spans[chunk[n]], window, model, chosen) for n, site in asked]
            values = evaluate(runner, metric, clean, cells, read, advance).tolist()
            for (n, site), value in zip(asked, values, strict=True):
                rows.add(chunk[n], site, here[n], float(scores[n]), float(corrupt[n]), value)
    recipe = {"cut_keys": str(keys), "cut_queries": str(queries), "window": window, "heads": chosen or "all"}
    return rows.effects(model, listed, engine=runner.describe(), **recipe, **provenance_of(prompts))


def _spans(prompt: Encoded, keys: int | str, queries: int | str | None) -> tuple[tuple[int, int], tuple[int, int]]:
    """Token rows of the queries and keys in one prompt."""
    read, by = (rows_of(Site("attn_out", 0, position=p), prompt) for p in (keys, queries))
    if read[0] == 0 and by[0] < read[1]:
        raise PromptError(
            f"cutting keys {keys!r} (tokens {read[0]} to {read[1] - 1}) leaves the query at token {by[0]} "
            f"({prompt.tokens[by[0]]!r}) nothing to read: choose later queries or fewer keys"
        )
    return by, read


def _cell(
    run: int,
    site: Site,
    spans: tuple[tuple[int, int], tuple[int, int]],
    window: int,
    model: Model,
    heads: tuple[int, ...] | None,
) -> Cell:
    assert site.layer is not None
    (start, stop), keys = spans
    there = window_layers(site.layer, window, model.n_layers)
    attending = set(model.attention_layers)
    return Cell(run, cuts=tuple(Cut(layer, start, stop, keys, heads) for layer in there if layer in attending))
