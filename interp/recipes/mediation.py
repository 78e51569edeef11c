"""Causal mediation: how much of a prompt change's effect passes through one component.

Pearl 2001, "Direct and indirect effects"; Vig et al. 2020, "Investigating gender bias in language models using
causal mediation analysis". With the clean prompt x, the corrupt prompt x', the metric Y and a mediator M (a site):

    total effect              TE  = Y(x', M(x')) − Y(x, M(x))
    natural direct effect     NDE = Y(x', M(x))  − Y(x, M(x))     the prompt changes, the mediator stays
    natural indirect effect   NIE = Y(x, M(x'))  − Y(x, M(x))     the mediator changes, the prompt stays
    interaction               TE − NDE − NIE                      0 where the two add up
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from interp.engine.core import EngineKind
from interp.errors import InterpError, Interrupted
from interp.metrics import Metric, MetricFn, as_metric, logit_diff
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.pairs import Align, PromptPair
from interp.recipes.inputs import as_prompts
from interp.recipes.patching import patch
from interp.recipes.read_out import LAST, At
from interp.recipes.sweep_loop import WHOLE_SET, Subset
from interp.recipes.targets import Groups
from interp.results.effects import Effects
from interp.sites import Site

TOTAL, DIRECT, INDIRECT, INTERACTION = (
    "total effect",
    "natural direct effect",
    "natural indirect effect",
    "interaction",
)


@in_session
def mediate(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    mediators: Iterable[Site | str] | Site | str | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
    *,
    groups: Groups | None = None,
    window: int = 1,
    align: Align = "position",
    memory: int | str | None = None,
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Measure the total, direct and indirect effect of the change from clean to corrupt prompt, for each mediator.

        effects = interp.mediate(model, pairs, model.sites("z"))
        effects.summary(by=["intervention", "layer", "head"], tests=True)

    Four rows per (pair, mediator), which differ in ``intervention``: "total effect", "natural direct effect", "natural
    indirect effect", "interaction". ``raw`` is the effect in the metric's units, ``effect`` its share of the total
    effect, ``patched`` the metric of the counterfactual run (for the interaction: clean + interaction). A mediator is
    one site: a head (z), a neuron (mlp_post), a layer's attn_out or mlp_out, …; or several sites as one, by ``groups``,
    ``window`` and ``align`` as in `interp.patch`. ``at``: where the metric is read, as in `interp.patch`. ``subset``:
    for `interp.sweep`.

    Vig et al. report effects relative to Y(x) of a positive ratio metric; with ``metric=interp.prob`` that is
    ``raw / clean``. ``effects.summary(tests=True)`` gives p-values and false discovery rates. Raises the errors of
    `interp.patch`.
    """
    items = as_prompts(model, pairs)
    if as_metric(metric).reads_run:
        raise InterpError(
            "interp.mediate compares changes of two runs, and metric 'token_kl' of each is its own: use interp.kl"
        )
    sites = list(mediators) if isinstance(mediators, Iterable) and not isinstance(mediators, str) else mediators
    options: dict[str, Any] = {
        "groups": groups, "window": window, "align": align, "memory": memory, "subset": subset, "at": at,
    }  # fmt: skip
    try:
        indirect = patch(model, items, sites, metric, "noise", engine, show_progress, **options)
    except Interrupted:
        raise KeyboardInterrupt from None  # no example has all its effects yet
    try:
        direct = patch(model, items, sites, metric, "denoise", engine, show_progress, **options)
    except Interrupted as stop:
        raise Interrupted(_four_effects(indirect, stop.effects)) from None
    return _four_effects(indirect, direct)


def _four_effects(indirect: Effects, direct: Effects) -> Effects:
    """Return the rows of all four effects, of the examples of which both patches are there.

    ``indirect``: from patching corrupt activations into clean runs; ``direct``: clean ones into corrupt runs.
    """
    into_clean, into_corrupt = indirect.frame(), direct.frame()
    into_clean = into_clean.iloc[: len(into_corrupt)]  # of an interrupted second patch
    total = into_clean.assign(patched=into_clean["corrupt"])
    direct_effect = into_clean.assign(patched=into_corrupt["patched"])
    both = direct_effect["patched"] + into_clean["patched"] - into_clean["clean"]
    interaction = into_clean.assign(patched=into_clean["clean"] + into_clean["corrupt"] - both)
    by_name = {TOTAL: total, DIRECT: direct_effect, INDIRECT: into_clean, INTERACTION: interaction}
    frame = pd.concat([_with_effects(f.assign(intervention=name)) for name, f in by_name.items()], ignore_index=True)
    frame = frame.iloc[np.arange(len(frame)).reshape(len(by_name), -1).T.ravel()]  # a mediator's four rows together
    return Effects(frame, {**direct.provenance, **indirect.provenance, "intervention": "mediation", "mode": "noise"})


def _with_effects(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with its own effects; NaN where the patch of the mediator has none (clean and corrupt equal)."""
    raw = frame["patched"] - frame["clean"]
    gap = frame["corrupt"] - frame["clean"]
    return frame.assign(raw=raw, effect=(raw / gap).where(frame["effect"].notna()), mode="noise")
