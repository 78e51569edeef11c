"""Attribution patching of sites, and exact patching of the best: screen, then verify.

The estimate is (source − base) · ∂metric/∂activation in the base run (Nanda 2023; Kramár et al. 2024, arXiv 2403.00745,
eq. 4): one backward pass for all sites, first order in the change, and blind to saturated attention. It is stored like
an exact effect, in an Effects table that says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from interp.circuits.attribution import weights_fixed
from interp.circuits.evaluation import token_batches
from interp.circuits.wiring import capture
from interp.effects import SITE_COLUMNS, Effects
from interp.engine import Engine
from interp.engine.cells import rows_of
from interp.engine.runs import hooks
from interp.errors import InterpError, SiteError
from interp.metrics import Metric, MetricFn, Readout, as_metric, logit_diff
from interp.model import Model
from interp.patching import patch
from interp.prompts import PromptPair, encode_pairs
from interp.recipes import Rows, check_metric, provenance_of, readout, resolve
from interp.sites import Site, Sites
from interp.targets import as_sites

Mode = Literal["denoise", "noise"]
ESTIMATE = "attribution patching (estimate)"


def attribute_sites(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    sites: Iterable[Site | str] | Site | str | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Mode = "denoise",
) -> Effects:
    """AtP: what `interp.patch` would find at every site, estimated by one backward pass per pair.

    Sites and modes as in `interp.patch`; ``patched`` is the base run's metric plus the estimate. Raises SiteError for
    resid_mid, whose hook does not carry the whole stream, and InterpError for a metric without a gradient.
    """
    if mode not in ("denoise", "noise"):
        raise InterpError(f"unknown mode {mode!r}: 'denoise' (clean into corrupt) or 'noise' (corrupt into clean)")
    metric = as_metric(metric)
    listed = [pairs] if isinstance(pairs, PromptPair) else list(pairs)
    prompts = encode_pairs(listed, model.coder)
    check_metric(metric, prompts)
    wanted = model.sites("z") if sites is None else as_sites([sites] if isinstance(sites, Site | str) else sites)
    Engine(model, "naive").check_sites(wanted)
    if any(s.component == "resid_mid" for s in wanted):
        raise SiteError("resid_mid: its gradient cannot be read at its hook; take resid_pre, or attn_out and mlp_out")
    names = list(dict.fromkeys(s.hook_name for s in wanted))
    base, source = ("corrupt", "clean") if mode == "denoise" else ("clean", "corrupt")
    rows = Rows(ESTIMATE, mode, metric)
    for batch in token_batches(prompts):
        here = [prompts[i] for i in batch]
        ids = {run: [getattr(p, run) for p in here] for run in ("clean", "corrupt")}
        acts = {run: capture(model, ids[run], names) for run in ids}
        read = readout(here, list(acts["clean"]["logits"]))
        known = {run: metric(acts[run]["logits"], read).double().tolist() for run in ids}
        grads = _gradients(model, ids[base], names, metric, read)
        products = {name: ((acts[source][name] - acts[base][name]) * grads[name]).double().cpu() for name in names}
        for row, i in enumerate(batch):
            for site in resolve(wanted, prompts[i]):
                start, stop = rows_of(site, prompts[i])
                found = products[site.hook_name][row, start:stop]
                change = float((found if site.head is None else found[:, site.head]).sum())
                rows.add(i, site, prompts[i], known["clean"][row], known["corrupt"][row], known[base][row] + change)
    return rows.effects(model, listed, engine="one backward pass", evidence="estimate", **provenance_of(pairs))


def screen(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    sites: Iterable[Site | str] | Site | str | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Mode = "denoise",
    *,
    k: int = 20,
) -> pd.DataFrame:
    """AtP over all sites, then exact patching of the ``k`` with the largest mean |estimate|: one labelled table.

    One row per site, by rank of the screen: ``estimate`` (mean raw change of the metric by AtP), ``screened`` (mean
    over pairs of |estimate|: the ranking), ``exact`` with ``lo`` and ``hi`` (95% over examples; NaN where it was not
    run) and ``evidence``, "exact" or "estimate". What AtP misses, the screen misses. Named spans cannot be screened,
    and positions only over prompts of one length.
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InterpError(f"k={k!r}: how many sites are verified, from 1 on")
    listed = [pairs] if isinstance(pairs, PromptPair) else list(pairs)
    table: Any = attribute_sites(model, listed, sites, metric, mode).frame()
    if table["position"].isna().any() and (table["role"] != "").any():
        raise InterpError("named spans cannot be screened: take sites with positions, or with all positions at once")
    keys = list(SITE_COLUMNS)
    table["screened"] = table["raw"].abs()
    found = table.groupby(keys, dropna=False, observed=True).agg(
        estimate=("raw", "mean"), screened=("screened", "mean"), n=("raw", "size")
    )
    if (found["n"] < len(listed)).any():
        raise InterpError("some positions are not in every prompt: screen prompts of one length, or positions='all'")
    found = found.drop(columns="n").reset_index().sort_values("screened", ascending=False, ignore_index=True)
    best = Sites(_site(row) for row in found.head(k).itertuples())
    exact: Any = patch(model, listed, best, metric, mode, show_progress=False).summary()
    exact = exact[[*keys, "raw", "raw_lo", "raw_hi"]]
    exact = exact.rename(columns={"raw": "exact", "raw_lo": "lo", "raw_hi": "hi"})
    found = found.merge(exact, on=keys, how="left")
    found["evidence"] = ["exact" if i < k else "estimate" for i in range(len(found))]
    return found


def _site(row: Any) -> Site:
    numbers = [None if pd.isna(x) else int(x) for x in (row.layer, row.head, row.position)]
    return Site(row.component, *numbers)


def _gradients(
    model: Model, ids: Sequence[Sequence[int]], names: Sequence[str], metric: Metric, read: Readout
) -> dict[str, Tensor]:
    """Gradients of the metric, summed over the batch, at some hooks."""
    kept: dict[str, Tensor] = {}

    def branch(name: str) -> tuple[str, Any]:
        def hook(x: Tensor, hook: Any) -> Tensor:
            kept[name] = x.clone()
            return kept[name]

        return name, hook

    first = "hook_embed" if "hook_embed" in model.bridge.hook_dict else "blocks.0.hook_resid_pre"
    pairs = [(first, lambda x, hook: x.detach().requires_grad_()), *map(branch, names)]
    with weights_fixed(model), torch.enable_grad(), hooks(model, *pairs):
        total = metric(model.last_logits(torch.tensor([list(p) for p in ids], device=model.device)), read).sum()
        if not total.requires_grad:
            raise InterpError(f"metric {metric.name!r} has no gradient: attribution needs one")
        found = torch.autograd.grad(total, list(kept.values()), materialize_grads=True)
    return dict(zip(kept, found, strict=True))
