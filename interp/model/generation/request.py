"""What `Model.generate` is asked for, checked before any forward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import headstats

from interp.errors import InterpError, ModelError, PromptError, SiteError
from interp.model.collect_statistics import check_kind, one_number_each
from interp.model.generation.sampling import Sampling
from interp.model.loaded_model import LoadedModel
from interp.sites import COMPONENTS, Site
from interp.utils.arguments import check_whole


@dataclass(frozen=True)
class GenerationRequest:
    """Settings of one call; ``left_out``: statistics that have no number for each step."""

    max_new_tokens: int
    n: int
    sampling: Sampling
    stop: tuple[str, ...]
    stats: headstats.StatSpec | None
    left_out: tuple[str, ...]
    keep: tuple[Site, ...]
    batch_size: int


def generation_request(
    model: LoadedModel,
    max_new_tokens: int,
    n: int,
    sampling: Sampling,
    stop: str | Sequence[str] | None,
    stats: headstats.StatSpec | None,
    keep: str | Site | Iterable[str | Site],
    batch_size: int,
) -> GenerationRequest:
    """Check the settings. Raises InterpError, SiteError, or ModelError for a model that does not generate text."""
    _check_model(model)
    check_whole(1, None, max_new_tokens=max_new_tokens, n=n, batch_size=batch_size)
    _check_sampling(sampling, n)
    spec, left_out = (None, []) if stats is None else _by_step(stats)
    sites = tuple(_site(model, s) for s in ([keep] if isinstance(keep, str | Site) else keep))
    return GenerationRequest(
        max_new_tokens, n, sampling, _stop_strings(model, stop), spec, tuple(left_out), sites, batch_size
    )


def check_length(model: LoadedModel, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    """Raise PromptError for a prompt that leaves no room for the tokens to be generated."""
    number, longest = max(enumerate(map(len, prompts)), key=lambda x: x[1])
    if longest + max_new_tokens > model.n_ctx:
        raise PromptError(
            f"prompt {number} has {longest} tokens, and {max_new_tokens} more would not fit into {model.name}'s "
            f"context of {model.n_ctx}: shorten it, or ask for at most max_new_tokens={max(0, model.n_ctx - longest)}"
        )


def _check_model(model: LoadedModel) -> None:
    hf = model.bridge.original_model
    if model.stacks or model.reads != "text" or model.headless or model.masked:
        raise ModelError(f"{model.name} ({type(hf).__name__}) is no decoder of text: it generates none")


def _check_sampling(sampling: Sampling, n: int) -> None:
    t, k, p = sampling.temperature, sampling.top_k, sampling.top_p
    if not isinstance(t, int | float) or isinstance(t, bool) or not math.isfinite(t) or t < 0:
        raise InterpError(f"temperature={t!r}: a number from 0 on is expected; 0 takes the most probable token")
    if k is not None:
        check_whole(1, None, top_k=k)
    if p is not None and not (isinstance(p, int | float) and 0 < p <= 1):
        raise InterpError(f"top_p={p!r}: a share of the probability in (0, 1] is expected")
    check_whole(0, None, seed=sampling.seed)
    if t == 0 and (n > 1 or k is not None or p is not None):
        what = f"n={n} samples would all be the same" if n > 1 else "top_k and top_p have no effect"
        raise InterpError(f"temperature=0 takes the most probable token, so that {what}: give temperature=, e.g. 0.6")


def _stop_strings(model: LoadedModel, stop: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if wrong := [s for s in strings if not isinstance(s, str) or not s]:
        raise InterpError(f"stop={wrong[0]!r}: a text that ends generation is expected, or a list of texts")
    if strings and model.tokenizer is None:
        raise InterpError(f"{model.name} has no tokenizer, so that stop= cannot be found in what it generates")
    return strings


def _by_step(stats: Any) -> tuple[headstats.StatSpec, list[str]]:
    spec = check_kind(stats)
    by_query = {s.name for s in headstats.STATISTICS if s.shape == "B H M"}
    if not by_query & set(spec.requested()):
        raise InterpError(
            f"stats asks for {', '.join(spec.requested()) or 'nothing'}: while generating, statistics with one number "
            f"for a query are kept ({', '.join(sorted(by_query))})"
        )
    one, left_out = one_number_each(spec)
    by_key = [name for name in one.requested() if name not in by_query]
    return replace(one, **dict.fromkeys(by_key, False)), [*left_out, *by_key]


def _site(model: LoadedModel, written: str | Site) -> Site:
    site = Site.parse(written) if isinstance(written, str) else written
    if not isinstance(site, Site) or site.layer is None or site.position is not None:
        raise SiteError(f"keep={written!r}: a site of a layer without a position is expected, like 'resid_post.L12'")
    if site.layer not in model.layers_with(site.component):
        raise SiteError(f"keep={written!r}: {model.name} has no {site.component} in layer {site.layer}")
    if site.head is not None and not COMPONENTS[site.component].heads:
        raise SiteError(f"keep={written!r}: {site.component} has no heads")
    return site
