"""Interventions by name: change how queries read keys, which they see, or activations, and read the metric.

What the fields of an edit do is defined, with its sources, in `headstats.Edit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from interp.engine import Cell, CellWrite, Run
from interp.engine.core import OPENS_LATER, EngineKind
from interp.engine.runs import is_change
from interp.errors import InterpError
from interp.interventions import AttentionChange, AttentionEdit, AttentionMask, Change, Write
from interp.metrics import Metric, MetricFn, logit_diff
from interp.model.layer_edits import LayerEdit, refuse_clashes
from interp.model.layer_masks import LayerMask
from interp.model.model import Model
from interp.model.resolve_edits import HeadsByLayer, check_order, edited_rows, heads_by_layer, layer_edits
from interp.model.resolve_masks import layer_masks, mask_rules
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import Fact, PromptPair
from interp.recipes.choices import EDITED_ALONE
from interp.recipes.read_out import LAST, At
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.recipes.targets import Address
from interp.recipes.written_cells import RowWrites, check_overlap, check_widths, check_writes
from interp.results.effects import Effects
from interp.sites import COMPONENTS, Site

Edits = Mapping[str, Change | Sequence[Change]]
Places = Mapping[Any, tuple[int, ...] | None]  # heads by layer; None: all heads, or a change before layer 0


@in_session
def edit(
    model: Model,
    prompts: PromptPair | Fact | Iterable[PromptPair | Fact],
    edits: Edits | Change,
    metric: Metric | MetricFn | str = logit_diff,
    mode: Literal["noise", "denoise"] = "noise",
    *,
    each: Literal["layer", "head"] | None = None,
    engine: EngineKind = "auto",
    show_progress: bool | None = None,
    memory: int | str | None = None,
    subset: Subset = WHOLE_SET,
    at: At = LAST,
) -> Effects:
    """Apply each of ``edits`` (or masks, or writes) in the clean run, one at a time.

        sharper = interp.AttentionEdit(queries=-1, keys="subject", logit_factor=1.5)
        effects = interp.edit(model, pairs, {"sharper": sharper, "cut": interp.AttentionEdit(keys="S2", knockout=True)})
        interp.edit(model, pairs, {"uniform": interp.AttentionEdit(counterfactual="uniform")}, each="head")
        interp.edit(model, pairs, {"blind": interp.AttentionMask(close=[(None, "subject")])}, each="layer")
        interp.edit(model, pairs, {"both": [interp.Write("z.L9H6", "END", set=0.0), sharper]})

    ``edits``: by name; a list acts at once. If one of the masks shows tokens what comes after them, every cell takes a
    full forward. ``each="layer"`` or ``"head"``: apply an edit in every one of its layers, or to every one of its
    heads, alone; writes, which have one place, are refused then. ``mode="denoise"``: in the corrupt run. One row per
    (prompt, edit[, layer[, head]]), whose component is the edit's name: ``raw`` is patched − clean (or − corrupt) in
    the metric's units; ``effect`` is on the recovery scale, NaN for a Fact. ``at``: where the metric is read, as in
    `interp.patch`. ``subset``: for `interp.sweep`.

    Raises PromptError, SiteError or InterpError for bad input, before any forward.
    """
    loop = SweepLoop(model, prompts, metric, engine, memory, subset, show_progress, takes_facts=mode == "noise", at=at)
    if mode not in ("noise", "denoise"):
        raise InterpError(f"mode={mode!r}: 'noise' (edit the clean run) or 'denoise' (the corrupt run) expected")
    if each not in (None, *EDITED_ALONE):
        raise InterpError(f"each={each!r}: None, 'layer' or 'head' expected")
    named = _named(edits)
    masks = [e for several in named.values() for e in several if isinstance(e, AttentionMask)]
    writes = [e for several in named.values() for e in several if isinstance(e, Write)]
    if writes and each is not None:
        raise InterpError(f"each={each!r}: a write acts at its own site alone, and one is given ({writes[0].text})")
    if masks and each == "head":
        raise InterpError(f"each='head': a mask acts on all heads of a layer, and one is given ({masks[0]})")
    if masks and loop.strings:
        raise InterpError(
            f"a mask says what the tokens of a prompt see, and an answer of several tokens adds others ({masks[0]}): "
            "use answers of one token, or attention edits"
        )
    if any(rule.opens_later for m in masks for prompt in loop.prompts for rule in mask_rules(m, prompt)):
        loop.runner.needs_full_forwards = OPENS_LATER
    check_writes(loop.runner, writes)
    edits_alone = [e for several in named.values() for e in several if not isinstance(e, Write)]
    recipe: dict[str, Any] = {"edits": {name: [e.text for e in several] for name, several in named.items()}}
    return loop.run(
        lambda part: _EditCells(part, named, mode, each), _kinds(writes, edits_alone), mode, **recipe,
        each=each or "all at once",
    )  # fmt: skip


@dataclass(frozen=True)
class _Place:
    """What one cell changes: writes, and edits with the heads by layer in which each of them acts."""

    address: Address
    edits: Sequence[AttentionChange]
    heads: Sequence[HeadsByLayer]
    writes: Sequence[Write] = ()


class _EditCells(CellSource):
    """One cell per prompt and edit, or per prompt, edit and layer or head."""

    def __init__(self, loop: SweepLoop, named: Mapping[str, Sequence[Change]], mode: str, each: str | None):
        self.mode, self.title, self.fast = mode, f"edit: {', '.join(named)}", loop.runner.kind != "naive"
        self.device = loop.model.device
        self.places = [p for name, several in named.items() for p in _places(loop.model, name, several, each)]
        self.edits = edits = [e for place in self.places for e in place.edits]
        self.writes = [w for place in self.places for w in place.writes]
        self.components = sorted({w.address.component for w in self.writes})
        self.silences = any(isinstance(e, AttentionEdit) and e.silences for e in edits)
        self.layer_changes = [{id(e): _resolver(e, p) for e in edits} for p in loop.prompts]
        self.row_writes = [{id(w): RowWrites.of(w, p) for w in self.writes} for p in loop.prompts]
        for by_write in self.row_writes:
            for place in self.places:
                check_overlap(place.address.component, [by_write[id(w)] for w in place.writes], loop.model)
        sees_ahead = any(isinstance(e, AttentionMask) for e in edits) or loop.model.instrument.edited is not None
        weighted = [e for e in edits if isinstance(e, AttentionEdit) and e.weights is not None]
        for e in () if sees_ahead else weighted:
            for resolve in self.layer_changes:
                resolved = resolve[id(e)](heads_by_layer(loop.model, e))
                check_order(loop.model, [x for x in resolved if isinstance(x, LayerEdit)])
        self.size = len(self.places) * len(loop.prompts)
        self.with_z, self.n_heads, self.prompts = loop.model.layers_with("z"), loop.model.n_heads, loop.prompts

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Clean runs, and corrupt runs if there are any; the edits go into one of them.

        Numbers depend on what is recorded together in their last bits: knock-outs are recorded as `interp.knock_out`
        records them, edits that silence heads as `interp.ablate` does.
        """
        if self.mode == "noise" and not (self.silences and loop.has_pairs):
            batch = loop.record_clean_first(numbers, self.components)
        else:
            batch = loop.record_pairs(numbers, self.components, into="clean" if self.mode == "noise" else "corrupt")
        check_widths(self.writes, batch.runs[0])
        return batch

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every edit of every prompt, in one group."""
        unchanged = batch.clean if self.mode == "noise" else batch.corrupt
        yield [
            CellRow(n, place.address, self._cell(n, i, place, batch.runs[n]), unchanged[n])
            for n, i in enumerate(batch.numbers)
            for place in self.places
        ]

    def _cell(self, number: int, prompt: int, place: _Place, run: Run) -> Cell | None:
        """Return a prompt's cell; None if its edits only act while decoding, or it changes nothing.

        Edits that silence heads are zeros written to z, so that they equal the ablation by zeros to the bit.
        """
        resolve, rows = self.layer_changes[prompt], self.row_writes[prompt]
        changes = [x for e, heads in zip(place.edits, place.heads, strict=True) for x in resolve[id(e)](heads)]
        if len(changes) > 1:
            refuse_clashes([e for e in changes if isinstance(e, LayerEdit)])
        edits = [e for e in changes if not (isinstance(e, LayerEdit) and e.is_neutral)]
        writes = [x for w in place.writes for x in rows[id(w)].cell_writes(self.device)]
        if self.fast and not any(is_change(w, run) for w in writes):
            writes = []
        if not any(w.site.component == "z" for w in writes):  # those act after the heads are silent
            silent = [e for e in edits if isinstance(e, LayerEdit) and e.silences and e.layer in self.with_z]
            edits = [e for e in edits if e not in silent]
            writes += [w for e in silent for w in self._zeros(e, len(self.prompts[prompt]))]
        return Cell(number, tuple(writes), tuple(edits)) if edits or writes else None

    def _zeros(self, edit: LayerEdit, length: int) -> Iterator[CellWrite]:
        """The writes of zeros to z that an edit which silences heads is."""
        rows = range(length) if edit.queries is None else edit.queries
        for head in range(self.n_heads) if edit.heads is None else edit.heads:
            yield from RowWrites(Write(Site("z", edit.layer, head), set=0.0), rows).cell_writes(self.device)


def _resolver(change: AttentionChange, prompt: Encoded) -> Callable[[HeadsByLayer], Sequence[LayerEdit | LayerMask]]:
    """Return a function that gives a change of one prompt in some layers; nothing if it only acts while decoding.

    Raises PromptError for tokens that the prompt does not have.
    """
    if isinstance(change, AttentionMask):
        layer_masks(change, (), prompt)
        return lambda heads: layer_masks(change, heads, prompt)
    rows = _rows(change, prompt)
    return lambda heads: [] if rows is None else layer_edits(change, heads, rows)


def _rows(edit: AttentionEdit, prompt: Encoded) -> Mapping[str, Sequence[int]] | None:
    """Return the token rows that an edit names. Tokens of an answer behind the prompt are as if they were decoded.

    They are among all queries and all keys, unless the phase is "prompt"; they are the queries of phase "decoding".
    """
    if not prompt.appended:
        return edited_rows(edit, prompt)
    named = replace(edit, phase=None, queries=None) if edit.phase == "decoding" else edit
    rows, everything = dict(edited_rows(named, prompt) or {}), range(len(prompt))
    if edit.keys is None:
        rows["keys"] = everything
    if edit.phase == "decoding":
        rows["queries"] = everything[len(prompt.tokens) :]
    elif edit.queries is None and edit.phase is None and getattr(edit.gate, "ndim", 0) < 2:  # not a gate for each token
        rows["queries"] = everything
    return rows


def _named(edits: Any) -> dict[str, list[Change]]:
    """Return edits, masks and writes as lists by name. Raises InterpError for anything else."""
    by_name = {"edit": edits} if isinstance(edits, Change) else edits
    if not isinstance(by_name, Mapping) or not by_name:
        raise InterpError(
            f"edits={edits!r:.80}: a dict of AttentionEdits, AttentionMasks or Writes by name expected, e.g. "
            "{'cut': interp.AttentionEdit(keys='subject', knockout=True)}"
        )
    named: dict[str, list[Change]] = {}
    for name, several in by_name.items():
        if str(name) in COMPONENTS:
            raise InterpError(f"an edit is called {name!r}, which is the name of a component: choose another name")
        listed: Any = several if isinstance(several, Iterable) and not isinstance(several, str) else [several]
        named[str(name)] = list(listed)
        wrong = [e for e in named[str(name)] if not isinstance(e, Change)]
        if wrong or not named[str(name)]:
            raise InterpError(f"edit {name!r}: AttentionEdits, AttentionMasks or Writes expected, got {several!r:.80}")
    return named


def _kinds(writes: Sequence[Write], edits: Sequence[AttentionChange]) -> str:
    return " and ".join([*(["attention edit"] if edits else ()), *(["write"] if writes else ())])


def _places(model: Model, name: str, changes: Sequence[Change], each: str | None) -> list[_Place]:
    """Return what the cells of a name change: all at once, or every layer or head alone."""
    writes = [c for c in changes if isinstance(c, Write)]
    edits = [c for c in changes if not isinstance(c, Write)]
    heads = [heads_by_layer(model, e) for e in edits]
    if each is None:
        return [_Place(Address(name, *_shared([*heads, *map(_place_of, writes)])), edits, heads, writes)]
    layers = sorted({layer for by_layer in heads for layer in by_layer})
    places = []
    for layer in layers:
        one = [{layer: by_layer[layer]} if layer in by_layer else {} for by_layer in heads]
        if each == "layer":
            places.append(_Place(Address(name, layer), edits, one))
            continue
        acting = [{*_acting(by_layer, layer, model.n_heads)} for by_layer in heads]
        for head in sorted(set().union(*acting)):
            alone = [{layer: (head,)} if head in of_edit else {} for of_edit in acting]
            places.append(_Place(Address(name, layer, head), edits, alone))
    return places


def _acting(heads: HeadsByLayer, layer: int, n_heads: int) -> Iterable[int]:
    """Return the heads of a layer that an edit changes."""
    if layer not in heads:
        return ()
    of_layer = heads[layer]
    return range(n_heads) if of_layer is None else of_layer


def _place_of(write: Write) -> Places:
    """Return the layer of a write, and its head."""
    site = write.address
    return {site.layer: None if site.head is None or site.spec.heads == "neuron" else (site.head,)}


def _shared(heads: Sequence[Places]) -> tuple[int | None, int | None]:
    """Return the layer and the head, where there is only one."""
    layers = {layer for by_layer in heads for layer in by_layer}
    if len(layers) > 1:
        return None, None
    of_layer = {by_layer[layer] for by_layer in heads for layer in by_layer}
    (only,) = of_layer if len(of_layer) == 1 else (None,)
    return next(iter(layers)), only[0] if only is not None and len(only) == 1 else None
