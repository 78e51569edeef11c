"""Screen, then verify: rank sites by an estimate, patch the best exactly, and bound what was passed over."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from interp.circuits.attribution.miss_bound import missed
from interp.circuits.attribution.nodes import SPANS, Mode, SiteList, atp_star, attribute_sites, by_site
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.model import Model
from interp.prompts.pairs import PromptPair, listed_prompts
from interp.recipes.patching import patch
from interp.results.effects import SITE_COLUMNS
from interp.sites import Site, Sites

ScreenMethod = Literal["atp", "atp-qk", "atp-carried", "atp*", "ig-inputs", "ig-activations"]


def screen(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    sites: SiteList | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Mode = "denoise",
    *,
    k: int = 20,
    method: ScreenMethod = "atp",
    sample: int = 0,
    threshold: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Attribution of all sites, then exact patching of the ``k`` best and of a random sample: one labelled table.

    One row per site, by rank of the screen: ``estimate`` (mean raw change of the metric), ``screened`` (the ranking:
    mean over pairs of |estimate|, or the AtP* score), ``exact`` with ``lo`` and ``hi`` (95% over examples; NaN where it
    was not run) and ``evidence``: "exact", "exact, drawn" or "estimate".

    ``sample`` of the sites beyond the k best are drawn by ``seed`` and patched too; ``table.attrs["missed"]`` is then
    an `interp.circuits.attribution.miss_bound.Missed`: with ``confidence``, at most how many of those passed over have
    a mean |effect| above ``threshold`` (default: the largest of the k verified, divided by ten). Without a sample
    nothing is known of them. Methods are those of `attribute_sites`, and ``"atp*"``. Named spans cannot be screened,
    and positions only over prompts of one length.
    """
    for name, value, least in (("k", k, 1), ("sample", sample, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InterpError(f"{name}={value!r}: how many sites are verified, from {least} on")
    if method not in get_args(ScreenMethod):
        raise InterpError(f"unknown method {method!r}: choose one of {', '.join(get_args(ScreenMethod))}")
    if not 0 < confidence < 1:
        raise InterpError(f"confidence={confidence!r}: a share between 0 and 1")
    listed = listed_prompts(pairs)
    found = _ranked(model, listed, sites, metric, mode, method)
    beyond = np.arange(min(k, len(found)), len(found))
    drawn = np.random.default_rng(seed).permutation(beyond)[:sample]
    verified = [*range(len(found) - len(beyond)), *sorted(drawn.tolist())]
    best = Sites(_site(row) for row in found.iloc[verified].itertuples())
    exact: Any = patch(model, listed, best, metric, mode, show_progress=False).summary()
    exact = exact[[*SITE_COLUMNS, "raw", "raw_lo", "raw_hi"]]
    exact = exact.rename(columns={"raw": "exact", "raw_lo": "lo", "raw_hi": "hi"})
    found = found.merge(exact, on=list(SITE_COLUMNS), how="left")
    sampled = set(drawn.tolist())
    found["evidence"] = [
        "exact" if i < k else "exact, drawn" if i in sampled else "estimate" for i in range(len(found))
    ]
    size = found["exact"].abs().to_numpy(dtype=float)
    if sample:
        limit = float(size[:k].max()) / 10 if threshold is None else threshold
        found.attrs["missed"] = missed(size[drawn], len(beyond), limit, confidence)
    return found


def _ranked(model: Model, pairs: list[PromptPair], sites: Any, metric: Any, mode: Any, method: str) -> Any:
    """Site columns, estimate and screened, best first."""
    if method == "atp*":
        found = atp_star(model, pairs, sites, metric, mode).rename(columns={"score": "screened"})
        return found[[*SITE_COLUMNS, "estimate", "screened"]]
    table: Any = attribute_sites(model, pairs, sites, metric, mode, method=method).frame()  # type: ignore[arg-type]
    if (table["position"].isna() & (table["role"] != "")).any():
        raise InterpError(SPANS)
    table["screened"] = table["raw"].abs()
    found = by_site(table, len(pairs), {"estimate": ("raw", "mean"), "screened": ("screened", "mean")})
    return found.sort_values("screened", ascending=False, ignore_index=True, kind="stable")


def _site(row: Any) -> Site:
    numbers = [None if pd.isna(x) else int(x) for x in (row.layer, row.head, row.position)]
    return Site(row.component, *numbers)
