"""All for One: can the last token compute the answer alone, after all tokens waited and it read them in few layers?

"All for One" (arXiv 2509.09650): up to layer L_wait, tokens carry only their own information: the residual stream that
leaves the layer is replaced by its context-aware mean (CAMA). Then attention-based peeking (ABP) masks attention before
the softmax: every token reads only itself and the first token. The last token is the exception: it reads all tokens in
the next ``full`` layers ("full peek"), and afterwards only itself and the first ("self peek"). What the model can still
do, it does with one token's computation and ``full`` layers of transfer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, Literal

from interp.engine import Cell, CellWrite
from interp.engine.core import EngineKind
from interp.engine.packed_forward import find_other_mixer
from interp.errors import InterpError, SiteError
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.layer_edits import LayerEdit
from interp.model.model import Model
from interp.model.prompt_provenance import hash_of_prompts
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import Prompt, PromptPair
from interp.recipes.choices import PEEK_CONTEXTS
from interp.recipes.mean_activations import Means, check_support, listed_reference, means_of, reference_ids
from interp.recipes.read_out import LAST, At
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.results.effects import Effects
from interp.sites import Site, Sites
from interp.utils.arguments import is_whole


@in_session
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
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Run the clean prompt with tokens waiting up to each layer of ``wait`` (default: all) and then peeking.

        effects = interp.peek(model, pairs, full=2)
        1 - effects.summary(by="layer")["effect"]      # faithfulness, by the layer up to which tokens wait

    ``full``: number of layers after the waiting layer in which the last token reads all others; 0: none.
    ``context="mean"`` removes, at resid_post of the layer, what tokens had read of each other so far (CAMA, over
    ``reference`` prompts of the same template, default the clean prompts, as in `interp.ablate`); ``"keep"`` leaves the
    residual stream unchanged, and only attention is masked.

    One row per (pair, layer): ``effect`` on the noising scale, 0 where nothing is lost, so that 1 − effect is the
    subgraph's faithfulness; ``raw`` is patched − clean. ``at``: where the metric is read, as in `interp.patch`; it is
    the last token that peeks wherever the metric is read, and all others see only themselves and the first token.
    ``subset``: for `interp.sweep`. Raises SiteError, PromptError or InterpError for bad input, before the sweep.
    """
    if not is_whole(full, 0) or context not in PEEK_CONTEXTS:
        raise InterpError(f"full={full!r}, context={context!r}: a number of layers, and 'mean' or 'keep' expected")
    loop = SweepLoop(model, pairs, metric, engine, memory, subset, show_progress, at=at, takes_strings=False)
    if len(model.attention_layers) < model.n_layers or any(
        map(partial(find_other_mixer, model), range(model.n_layers))
    ):
        raise SiteError(
            f"{model.name} passes information from token to token by other means than softmax attention, which no mask "
            "of attention stops: tokens would not wait"
        )
    sites = model.sites("resid_post", layers=wait, positions="all")
    loop.runner.check_sites(sites)
    reference_prompts = listed_reference(reference)
    means = None
    if context == "mean":
        ids = reference_ids(reference_prompts, loop.prompts, model.coder)
        check_support("cama", loop.prompts, ids, sites)
        means = means_of(loop.runner, ids, sites, "cama", subset.means)
    else:
        reference_ids(reference_prompts, loop.prompts, model.coder)  # raises for prompts that cannot be encoded
    ablation = "context-aware mean, then masked attention" if context == "mean" else "masked attention"
    recipe: dict[str, Any] = {"full_peek": full, "context": context, "ablation": ablation}
    if reference_prompts is not None:
        recipe |= {"reference": hash_of_prompts(reference_prompts, ids), "n_reference": len(reference_prompts)}
    cells = _PeekCells(f"all for one, full peek of {full} layers", loop, sites, means, full)
    return loop.run(cells, cells.title, "noise", **recipe)


class _PeekCells(CellSource):
    """One cell per pair and layer up to which tokens wait."""

    def __init__(self, title: str, loop: SweepLoop, sites: Sites, means: Means | None, full: int):
        self.title, self.sites, self.means, self.full = title, sites, means, full
        self.n_layers = loop.model.n_layers
        self.size = len(sites) * len(loop.prompts)

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Clean and corrupt runs."""
        return loop.record_pairs(numbers)

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every layer of every pair, in one group."""
        yield [
            CellRow(n, site, self._cell(n, site, prompt), batch.clean[n])
            for n, prompt in enumerate(batch.prompts)
            for site in self.sites
        ]

    def _cell(self, run: int, site: Site, prompt: Encoded) -> Cell | None:
        """Return the waiting tokens' residual stream and the masks of all later layers; None if nothing changes."""
        assert site.layer is not None
        n = len(prompt)
        writes = () if self.means is None else (CellWrite(site, 0, n, self.means.value(site, prompt.clean, 0, n)),)
        edits: list[LayerEdit] = []
        for layer in range(site.layer + 1, self.n_layers):
            # the row of the last token is masked after its full peek
            stop = n - 1 if layer <= site.layer + self.full else n
            edits += [LayerEdit(layer, queries=(row,), keys=range(1, row)) for row in range(2, stop)]
        return Cell(run, writes, tuple(edits)) if writes or edits else None
