"""Attention knock-out: block attention from some tokens to others in a window of layers, and read the metric.

Geva et al. 2023, "Dissecting recall of factual associations in auto-regressive language models": attention from the
last position to a span is blocked in a window of layers around each layer. It is blocked inside the kernel, before the
softmax, so that the remaining weights of a row still sum to 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from interp.engine import Cell
from interp.engine.cells import rows_of
from interp.engine.core import EngineKind
from interp.errors import PromptError
from interp.metrics import Metric, MetricFn, logprob
from interp.model.apply_masks import visible_keys
from interp.model.layer_edits import LayerEdit
from interp.model.layer_masks import masks_of
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import Fact, PromptPair
from interp.recipes.read_out import LAST, At
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.recipes.targets import window_layers
from interp.results.effects import Effects
from interp.sites import ALL, Site, Sites
from interp.utils.arguments import check_window

Rows = tuple[int, int]  # [start, stop)


@in_session
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
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Block attention from ``queries`` to ``keys``, in ``window`` layers around each of ``layers``, in the clean run.

        effects = interp.knock_out(model, facts, "subject")                     # from the last token to the subject
        effects = interp.knock_out(model, pairs, "S2", queries=-1, heads=[6])
        effects.summary(by="layer")

    ``keys``, ``queries``: a position (negative ones count from the end) or a named span ("subject" of a Fact);
    ``queries=None`` or ``"all"``: all positions. ``window``: number of layers blocked together, centred as in
    `interp.trace`; default a fifth of the model's layers. ``heads``: the query heads that are blocked, default all. One
    row per (prompt, layer), with the layer at the window's centre: ``raw`` is patched − clean in the metric's units;
    ``effect`` is its share of corrupt − clean, NaN for a Fact, which has no corrupt prompt. ``at``: where the metric is
    read, as in `interp.patch`. ``subset``: for `interp.sweep`.

    Raises PromptError, SiteError or InterpError for bad input, also where a query would have no key left to read, in
    every layer or in one that slides a window.
    """
    loop = SweepLoop(model, prompts, metric, engine, memory, subset, show_progress, takes_facts=True, at=at)
    window = max(1, model.n_layers // 5) if window is None else window
    queries = None if queries == ALL else queries
    check_window(window)
    if layers is None:
        layers = model.attention_layers
    sites = model.sites("attn_out", layers=layers, positions="all" if queries is None else queries)
    if heads is None:
        head_numbers = None
    else:
        head_numbers = tuple(sorted({s.head or 0 for s in model.sites("z", layers=0, heads=heads)}))
    loop.runner.check_sites(sites)

    def cells(part: SweepLoop) -> CellSource:
        spans = [_blocked_rows(p, keys, queries) for p in part.prompts]
        return _KnockOutCells(f"knock out {keys}", model, sites, spans, window, head_numbers)

    recipe: dict[str, Any] = {"cut_keys": str(keys), "cut_queries": str(queries), "window": window}
    return loop.run(cells, f"cut attention to {keys}", "noise", **recipe, heads=head_numbers or "all")


class _KnockOutCells(CellSource):
    """One cell per prompt and layer. ``spans``: rows of the queries and of the keys in each prompt."""

    def __init__(
        self, title: str, model: Model, sites: Sites, spans: list[tuple[Rows, Rows]], window: int,
        heads: tuple[int, ...] | None,
    ):  # fmt: skip
        self.title, self.sites, self.spans, self.heads = title, sites, spans, heads
        self.size = len(sites) * len(spans)
        attention_layers = set(model.attention_layers)
        self.layers = {
            site.layer: [i for i in window_layers(site.layer or 0, window, model.n_layers) if i in attention_layers]
            for site in sites
        }

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Clean runs, then corrupt runs if there are any."""
        batch = loop.record_clean_first(numbers)
        for number in numbers:
            self._check_what_is_left(loop, number)
        return batch

    def _check_what_is_left(self, loop: SweepLoop, number: int) -> None:
        """Raise PromptError if a query has no key left in a layer whose own mask, such as a window, hides others."""
        queries, (start, stop) = self.spans[number]
        prompt, calls, edited = loop.prompts[number], loop.runner.frame.calls, loop.model.instrument.edited
        masks = {} if edited is None else {i: masks_of(e) for i, e in edited.of_prompt(prompt.clean).items()}
        for layer in sorted(set().union(*self.layers.values()) & set(calls)):
            for row in range(*queries):
                seen = visible_keys(calls[layer], masks.get(layer, ()), row, len(prompt))
                if seen.any() and not (seen[:start].any() or seen[stop:].any()):
                    raise PromptError(
                        f"cutting tokens {start} to {stop - 1} leaves the query at token {row} "
                        f"({_word(prompt, row)}) nothing to read in layer {layer}, which shows it tokens "
                        f"{int(seen.nonzero()[0])} to {int(seen.nonzero()[-1])}: choose other queries or fewer keys"
                    )

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every layer of every prompt, in one group."""
        yield [CellRow(n, site, self._cell(n, site, i)) for n, i in enumerate(batch.numbers) for site in self.sites]

    def _cell(self, run: int, site: Site, number: int) -> Cell:
        (start, stop), keys = self.spans[number]
        queries = range(start, stop)
        edits = [LayerEdit(i, queries=queries, keys=range(*keys), heads=self.heads) for i in self.layers[site.layer]]
        return Cell(run, edits=tuple(edits))


def _word(prompt: Encoded, row: int) -> str:
    return repr(prompt.tokens[row]) if row < len(prompt.tokens) else "of the answer"


def _blocked_rows(prompt: Encoded, keys: int | str, queries: int | str | None) -> tuple[Rows, Rows]:
    """Return the token rows of the queries and of the keys in one prompt."""
    key_rows, query_rows = (rows_of(Site("attn_out", 0, position=p), prompt) for p in (keys, queries))
    if key_rows[0] == 0 and query_rows[0] < key_rows[1]:
        raise PromptError(
            f"cutting keys {keys!r} (tokens {key_rows[0]} to {key_rows[1] - 1}) leaves the query at token "
            f"{query_rows[0]} ({prompt.tokens[query_rows[0]]!r}) nothing to read: choose later queries or fewer keys"
        )
    return query_rows, key_rows
