"""All for one: can the last token do it alone, after others waited and it peeked at them for a few layers?

"All for One" (arXiv 2509.09650): up to layer L_wait tokens only say what they are themselves: the residual stream
leaving it is replaced by its context-aware mean (CAMA). Then attention-based peeking (ABP) masks attention before the
softmax: every token reads itself and the first one alone, except that the last token reads all of them in the next
``full`` layers ("full peek"), and afterwards no others either ("self peek"). What the model can still do, it does with
one token's computation and ``full`` layers of transfer.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

from interp.engine import Cell, Cut, Engine, Write
from interp.engine.core import EngineKind
from interp.engine.packed_forward import other_mixer
from interp.errors import InterpError, SiteError
from interp.metrics import Metric, MetricFn, as_metric, logit_diff
from interp.model.model import Model
from interp.prompts.pairs import Encoded, Prompt, PromptPair, encode_pairs
from interp.recipes.mean_activations import Means, check_support, listed_reference, means_of, reference_ids
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
from interp.results.effects import Effects
from interp.sites import Site
from interp.utils.progress import progress
from interp.utils.provenance import prompt_hash


def peek(
    model: Model,
    pairs: PromptPair | Iterable[PromptPair],
    wait: Iterable[int] | int | None = None,
    full: int = 2,
    *,
    context: Literal["mean", "keep"] = "mean",
    reference: Iterable[str | Prompt | PromptPair] | None = None,
    metric: Metric | MetricFn | str = logit_diff,
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
    memory: int | str | None = None,
) -> Effects:
    """The clean run with tokens waiting up to each layer of ``wait`` (default: all) and then peeking, one at a time.

    ``full``: layers after it in which the last token reads all others; 0: none. ``context="mean"`` takes away, at
    resid_post of the layer, what tokens had read of each other so far (CAMA, over ``reference`` prompts of the same
    template, default the clean prompts, as in `interp.ablate`); ``"keep"`` leaves the residual stream, and only
    attention is masked.

    One row per (pair, layer): ``effect`` on the noising scale, 0 where nothing is lost, so that 1 − effect is the
    subgraph's faithfulness; ``raw`` is patched − clean. Raises SiteError, PromptError or InterpError for bad input,
    before the sweep.
    """
    if isinstance(full, bool) or not isinstance(full, int) or full < 0 or context not in ("mean", "keep"):
        raise InterpError(f"full={full!r}, context={context!r}: a number of layers, and 'mean' or 'keep' expected")
    listed = asked_of(model, pairs)
    metric = as_metric(metric)
    prompts = encode_pairs(listed, model.coder)
    check_metric(metric, prompts, model)
    if len(model.attention_layers) < model.n_layers or any(map(partial(other_mixer, model), range(model.n_layers))):
        raise SiteError(
            f"{model.name} carries something from token to token beside softmax attention, which no mask of attention "
            "stops: tokens would not wait"
        )
    sites = model.sites("resid_post", layers=wait, positions="all")
    runner = Engine(model, engine, memory)
    runner.check_sites(sites)
    given = listed_reference(reference)
    known = reference_ids(given, prompts, model.coder)
    means = None
    if context == "mean":
        check_support("cama", prompts, known, sites)
        means = means_of(runner, known, sites, "cama")
    rows = Rows(f"all for one, full peek of {full} layers", "noise", metric)
    with progress(rows.intervention, len(sites) * len(prompts), show_progress) as advance:
        for chunk in chunks(prompts, runner, [], runs_per_example=2):
            here = [prompts[i] for i in chunk]
            both = runner.record([ids for p in here for ids in (p.clean, p.corrupt)])
            clean, corrupt = both[::2], both[1::2]
            read = readout(here, [r.logits for r in clean])
            scores = [score_runs(metric, runs, read).tolist() for runs in (clean, corrupt)]
            tell_of_equal(metric, *scores)
            asked = [(n, site) for n in range(len(here)) for site in sites]
            cells = [_cell(n, site, here[n], means, full, model.n_layers) for n, site in asked]
            advance(runner.count_answered(sum(c is None for c in cells)))
            values = iter(evaluate(runner, metric, clean, [c for c in cells if c], read, advance).tolist())
            for (n, site), cell in zip(asked, cells, strict=True):
                value = scores[0][n] if cell is None else next(values)
                rows.add(chunk[n], site, here[n], scores[0][n], scores[1][n], value)
    context_words = "context-aware mean, then " if context == "mean" else ""
    recipe = {"full_peek": full, "context": context, "ablation": f"{context_words}masked attention"}
    if given is not None:
        recipe |= {"reference": prompt_hash(given), "n_reference": len(given)}
    return rows.effects(model, listed, engine=runner.describe(), **recipe, **provenance_of(pairs))


def _cell(run: int, site: Site, prompt: Encoded, means: Means | None, full: int, n_layers: int) -> Cell | None:
    """The waiting tokens' residual and the masks of all later layers; None if nothing is changed."""
    assert site.layer is not None
    n = len(prompt)
    writes = () if means is None else (Write(site, 0, n, means.value(site, prompt.clean, 0, n)),)
    cuts: list[Cut] = []
    for layer in range(site.layer + 1, n_layers):
        last = n - 1 if layer <= site.layer + full else n  # the last token's own row is masked after its full peek
        cuts += [Cut(layer, row, row + 1, (1, row)) for row in range(2, last)]
    return Cell(run, writes, tuple(cuts)) if writes or cuts else None
