"""Checks of what every recipe takes: a model, prompts, a metric, positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from interp.engine.cells import rows_of
from interp.errors import InterpError, PromptError
from interp.metrics import METRICS, Metric
from interp.model.model import Model
from interp.prompts.coder import Encoded
from interp.prompts.pair_set import PairSet
from interp.prompts.pairs import listed_prompts
from interp.sites import EACH, Site, Sites


def as_prompts(model: Model, prompts: Any) -> list[Any]:
    """Return the prompts as a list.

    Raises InterpError if ``model`` is not a Model, PromptError if ``prompts`` are not prompts.
    """
    if not isinstance(model, Model):
        raise InterpError(f"a model expected, e.g. interp.load('smollm2'), got {model!r:.80}")
    return listed_prompts(prompts)


def provenance_of(prompts: Any) -> dict[str, Any]:
    """Return the task name and seed of a PairSet; nothing for a plain list."""
    return {"task": prompts.task, "seed": prompts.seed} if isinstance(prompts, PairSet) else {}


def check_readable(model: Model, at: Any, metric: Metric) -> None:
    """Raise InterpError if only one position of the model's output can be read, or if it is none of the prompt's."""
    if model.reads == "images" or model.masked or model.headless:
        why = "reads images" if model.reads == "images" else "fills in a mask" if model.masked else "has no LM head"
        raise InterpError(f"{model.name} {why}, so that at={at!r} and metric {metric.name!r} cannot be read from it")


def check_metric(metric: Metric, prompts: Sequence[Encoded], model: Model, any_position: bool = False) -> None:
    """Raise, before any forward, if the metric cannot be read from these prompts and this model.

    A built-in metric needs a language-model head (a custom metric may read the hidden states of a model without one),
    and a metric with ``needs_foil`` needs a foil in every pair. ``any_position``: the caller can read several
    positions, and the run before a change; others take no metric that needs them.
    """
    if not any_position and (metric.over == "positions" or metric.reads_run):
        raise InterpError(
            f"metric {metric.name!r} reads several positions or the run before a change, which recipes with at= can; "
            "here one position of each run is read: use interp.logprob, interp.kl or a metric of one position"
        )
    if model.headless and METRICS.get(metric.name) is metric:
        raise InterpError(
            f"{model.name} has no language-model head and ends in hidden states, and metric {metric.name!r} reads "
            "logits of words: load the model with its head, or pass a custom metric"
        )
    without_foil = [i for i, p in enumerate(prompts) if metric.needs_foil and p.foil is None]
    if without_foil:
        raise PromptError(
            f"metric {metric.name!r} needs a foil, and pair {without_foil[0]} has none: give PromptPair(foil=…), "
            "or use metric=interp.logprob"
        )


def expand_sites(sites: Sites, prompt: Encoded) -> Iterator[Site]:
    """Yield the sites of one prompt, ``"each"`` as one site per position.

    Raises PromptError if the prompt does not have a position.
    """
    for site in sites:
        if site.position == EACH:
            yield from (site.at(i) for i in range(len(prompt.tokens)))
        else:
            rows_of(site, prompt)
            yield site
