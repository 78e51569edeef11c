"""Steering: add a direction to activations, and read the metric.

Turner et al. 2023, "Steering language models with activation engineering"; difference of means as in Marks & Tegmark
2023, "The geometry of truth".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine import Cell, CellWrite, Engine, Run
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import InterpError, PromptError, SiteError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.layer_progress import by_layer
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.listing import TokenIds
from interp.prompts.pairs import Fact, PromptPair, encode_prompt, listed_of_any_kind, text_of
from interp.recipes.inputs import expand_sites
from interp.recipes.read_out import LAST, At
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.recipes.targets import as_sites
from interp.results.effects import Effects
from interp.sites import Site, Sites
from interp.utils.progress import progress
from interp.utils.provenance import weights_hash

TEXTS_AT_ONCE = 64  # texts of `mean_difference` whose activations are held at one time


@in_session
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
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Add ``scale`` × ``direction`` to the activation at every site in the clean run, one site at a time.

        direction = interp.mean_difference(model, ["I love it"], ["I hate it"], "resid_post.L12")
        effects = interp.steer(model, pairs, model.sites("resid_pre", positions="all"), direction, scale=2.0)
        effects.summary(by="layer")

    ``direction`` has the width of the sites' activation: d_model, or d_head for q, k, v and z. One row per (prompt,
    site): ``raw`` is patched − clean in the metric's units, ``effect`` its share of corrupt − clean (NaN for a Fact).
    ``read_at``: where the metric is read, as in `interp.patch`. ``subset``: for `interp.sweep`. Raises SiteError or
    PromptError for bad input, before the sweep.
    """
    loop = SweepLoop(model, prompts, metric, engine, memory, subset, show_progress, takes_facts=True, at=at)
    sites = as_sites(sites)
    loop.runner.check_sites(sites)
    addend = _scaled_direction(direction, scale).to(model.device)
    recipe = {
        "scale": scale, "direction_norm": float(addend.norm()), "direction": weights_hash([("direction", addend)]),
    }  # fmt: skip
    return loop.run(lambda part: _SteerCells(part, sites, addend), f"steer × {scale:g}", "noise", **recipe)


class _SteerCells(CellSource):
    """One cell per prompt and site. ``addend``: the scaled direction."""

    def __init__(self, loop: SweepLoop, sites: Sites, addend: Tensor):
        self.addend = addend
        self.sites = [list(expand_sites(sites, p)) for p in loop.prompts]
        self.components = sorted({s.component for s in sites})
        self.title = f"steer {'+'.join(self.components)}"
        self.size = sum(map(len, self.sites))

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Clean runs with the sites' activations, then corrupt runs if there are any."""
        batch = loop.record_clean_first(numbers, self.components)
        _check_width(self.addend, batch.clean_runs[0], self.sites[numbers[0]])
        return batch

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every site of every prompt, in one group."""
        yield [
            CellRow(n, s, Cell(n, (CellWrite(s, *rows_of(s, batch.prompts[n]), self.addend[None], "add"),)))
            for n, i in enumerate(batch.numbers)
            for s in self.sites[i]
        ]


def _scaled_direction(direction: Tensor, scale: float) -> Tensor:
    """Return ``scale`` × ``direction``. Raises InterpError unless it is a finite tensor of real numbers."""
    try:
        addend = scale * torch.as_tensor(direction).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InterpError(f"direction={direction!r:.60}, scale={scale!r}: expected a tensor and a number") from None
    if addend.is_complex() or addend.dtype == torch.bool:
        raise InterpError(f"the direction's numbers are {addend.dtype}: expected real numbers")
    if not addend.isfinite().all():
        raise InterpError("the direction, or the scale, is not finite: every metric after it would be NaN")
    return addend


def _check_width(addend: Tensor, run: Run, sites: Sequence[Site]) -> None:
    for site in sites:
        width = run.value(site, 0, 1).shape[-1]
        if addend.shape != (width,):
            raise SiteError(
                f"the direction has shape {list(addend.shape)}, and the activation at {site} has width {width}: "
                "expected one number for each"
            )


@in_session
@torch.no_grad()
def mean_difference(
    model: Model, positive: Iterable[Any], negative: Iterable[Any], site: Site | str
) -> Float[Tensor, " width"]:
    """Return the mean activation at ``site`` over the ``positive`` texts minus that over the ``negative`` texts.

    A site without a position averages over all positions of each text except special tokens around it; every text has
    the same weight. Raises PromptError if either list is empty.
    """
    site = Site.parse(site) if isinstance(site, str) else site
    runner = Engine(model, "naive")  # nothing is swept, so keys and values need not be kept
    runner.check_sites([site])
    means = []
    for name, argument in (("positive", positive), ("negative", negative)):
        texts = [] if isinstance(argument, str) else listed_of_any_kind(argument, f"{name} texts")
        if not texts:
            raise PromptError(f"mean_difference needs a list of at least one {name} text, got {argument!r:.60}")
        activations = []
        with progress(f"mean of {name} texts", len(texts)) as advance:
            for i in range(0, len(texts), TEXTS_AT_ONCE):
                chunk = texts[i : i + TEXTS_AT_ONCE]
                with by_layer(model, advance, len(chunk)):
                    runs = runner.record([encode_prompt(t, model.coder) for t in chunk], [site.component])
                activations += [
                    _text_mean(model, run, site, text_of(text)) for run, text in zip(runs, chunk, strict=True)
                ]
        means.append(torch.stack(activations).mean(0))
    return means[0] - means[1]


def _text_mean(model: Model, run: Run, site: Site, text: str | TokenIds) -> Tensor:
    n = len(run)
    if isinstance(site.position, str):
        raise SiteError(f"site {site}: texts have no named spans; give a number, or none for the mean of all positions")
    if isinstance(site.position, int):
        if not -n <= site.position < n:
            raise PromptError(f"site {site}: {text!r} has {n} tokens")
        return run.value(site, site.position % n, site.position % n + 1)[0]
    special = model.special_tokens
    first = len(special.before) if tuple(run.ids[: len(special.before)]) == special.before else 0
    last = n - len(special.after) if special.after and tuple(run.ids[-len(special.after) :]) == special.after else n
    return run.value(site, *((first, last) if first < last else (0, n))).mean(0)


def direction_between(model: Model, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `steer` with the difference of means of two lists of texts as direction.

    ``arguments``: those of `steer`, with ``positive`` and ``negative`` (texts) and ``direction_at`` (a site as text;
    default the first of ``sites``, at all positions) in place of ``direction``.
    """
    if not arguments["sites"]:
        raise SiteError("there are no sites to steer at: name some, e.g. resid_pre@all")
    others = {name: value for name, value in arguments.items() if name not in ("positive", "negative", "direction_at")}
    first, place = next(iter(arguments["sites"])), arguments.get("direction_at")
    site = first.at(None) if place is None else Site.parse(place)
    return {**others, "direction": mean_difference(model, arguments["positive"], arguments["negative"], site)}
