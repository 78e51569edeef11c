"""Screen sites by an estimate, patch the best, and bound the others' effects."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pandas as pd

from interp.circuits.attribution.miss_bound import missed
from interp.circuits.attribution.nodes import SPANS, SiteList, atp_star, attribute_sites, by_site
from interp.circuits.choices import ScreenMethod
from interp.circuits.inputs import Pairs
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.pairs import PromptPair, listed_prompts
from interp.recipes.patching import Mode, patch
from interp.results.effects import SITE_COLUMNS
from interp.sites import Site, Sites
from interp.utils.arguments import check_whole


@in_session
def screen(
    model: Model,
    pairs: Pairs,
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
    """Attribute all sites, then patch the ``k`` best and a random sample exactly.

    One row per site, in order of the screen: ``estimate`` (mean raw change of the metric), ``screened`` (the ranking:
    mean over pairs of |estimate|, or the AtP* score), ``exact`` with ``lo`` and ``hi`` (95% interval over examples; NaN
    if the site was not patched) and ``evidence``: "exact", "exact, drawn" or "estimate".

    ``sample`` of the sites after the k best are drawn by ``seed`` and also patched. ``table.attrs["missed"]`` is then
    an `interp.circuits.attribution.miss_bound.Missed`: with ``confidence``, an upper bound on the number of sites after
    the k best that have a mean |effect| above ``threshold`` (default: the largest of the k verified, divided by ten).
    Without a sample, nothing is known about these sites. Methods are those of `attribute_sites`, and ``"atp*"``. Named
    spans cannot be screened, and positions only over prompts of one length.
    """
    check_whole(1, k=k)
    check_whole(0, sample=sample)
    if method not in get_args(ScreenMethod):
        raise InterpError(f"unknown method {method!r}: choose one of {', '.join(get_args(ScreenMethod))}")
    if not 0 < confidence < 1:
        raise InterpError(f"confidence={confidence!r}: expected a share between 0 and 1")
    pair_list = listed_prompts(pairs)
    table = _ranked_sites(model, pair_list, sites, metric, mode, method)
    beyond = np.arange(min(k, len(table)), len(table))
    drawn = np.random.default_rng(seed).permutation(beyond)[:sample]
    verified = [*range(len(table) - len(beyond)), *sorted(drawn.tolist())]
    verified_sites = Sites(_site(row) for row in table.iloc[verified].itertuples())
    exact: Any = patch(model, pair_list, verified_sites, metric, mode).summary()
    exact = exact[[*SITE_COLUMNS, "raw", "raw_lo", "raw_hi"]]
    exact = exact.rename(columns={"raw": "exact", "raw_lo": "lo", "raw_hi": "hi"})
    table = table.merge(exact, on=list(SITE_COLUMNS), how="left")
    sampled = set(drawn.tolist())
    table["evidence"] = [
        "exact" if i < k else "exact, drawn" if i in sampled else "estimate" for i in range(len(table))
    ]
    size = table["exact"].abs().to_numpy(dtype=float)
    if sample:
        limit = float(size[:k].max()) / 10 if threshold is None else threshold
        table.attrs["missed"] = missed(size[drawn], len(beyond), limit, confidence)
    return table


def _ranked_sites(
    model: Model, pairs: list[PromptPair], sites: SiteList | None, metric: Metric | MetricFn | str, mode: Mode,
    method: ScreenMethod,
) -> Any:  # fmt: skip
    """Table of site columns, estimate and screened, best first."""
    if method == "atp*":
        scores = atp_star(model, pairs, sites, metric, mode).rename(columns={"score": "screened"})
        return scores[[*SITE_COLUMNS, "estimate", "screened"]]
    table: Any = attribute_sites(model, pairs, sites, metric, mode, method=method).frame()
    if (table["position"].isna() & (table["role"] != "")).any():
        raise InterpError(SPANS)
    table["screened"] = table["raw"].abs()
    ranked = by_site(table, len(pairs), {"estimate": ("raw", "mean"), "screened": ("screened", "mean")})
    return ranked.sort_values("screened", ascending=False, ignore_index=True, kind="stable")


def _site(row: Any) -> Site:
    """The site of a row of the table."""
    numbers = [None if pd.isna(x) else int(x) for x in (row.layer, row.head, row.position)]
    return Site(row.component, *numbers)
