"""Edits of every forward inside a block: what `Model.edited` enters.

A forward's token ids say which prompt each batch row holds, and with it which rows its named spans are. Prompts that
are encoded inside the block tell their spans to `EditedForwards.name_tokens`, through `Coder.name`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from interp.errors import InterpError, ModelError, PromptError
from interp.interventions import AttentionChange, AttentionEdit, AttentionMask, Write
from interp.model.attention_call import AttentionCall
from interp.model.generation_hooks import Watch, watched
from interp.model.layer_edits import LayerEdit, refuse_clashes, shifted
from interp.model.layer_masks import LayerMask
from interp.model.loaded_model import LoadedModel
from interp.model.resolve_edits import HeadsByLayer, edited_rows, heads_by_layer, key_rows, layer_edits
from interp.model.resolve_masks import layer_masks
from interp.prompts.embeddings import Embeddings
from interp.prompts.pairs import Span

Ids = tuple[int, ...]
FOR_EVER = 2**31  # rows of tokens that are decoded later
PROMPTS = "_interp_prompts"  # attribute of a cache of keys and values: the prompts that filled it, with their edits


@dataclass(frozen=True)
class TokenNames:
    """The tokens of one prompt, and its named spans."""

    tokens: Sequence[str]
    spans: Mapping[str, Span] = field(default_factory=dict)


@dataclass
class _BatchRow:
    """One row of the batch that the model is running: the prompt, and how many padding tokens stand before it."""

    ids: Ids
    padding: int = 0


class EditedForwards:
    """Edits of one model's forwards, resolved for the prompts that it runs.

    Raises SiteError at once for a layer or a head that the model does not have.
    """

    def __init__(self, model: LoadedModel, edits: Sequence[AttentionChange], outer: EditedForwards | None = None):
        self.model, self.edits = model, edits
        self._by_span = [e for e in edits if _names_spans(e)]
        self.heads: list[HeadsByLayer] = [heads_by_layer(model, e) for e in edits]
        self.outer = outer
        self.names: dict[Ids, TokenNames] = {} if outer is None else outer.names
        self._resolved: dict[Ids, dict[int, tuple[LayerEdit | LayerMask, ...]]] = {}
        self._batch: list[_BatchRow] = []  # of the running forward, and of the last one
        self._last: list[_BatchRow] = []
        self._decodes = False  # whether the forward reads tokens that come after a prompt's own
        self._generation: list[_BatchRow] | None = None  # the prompts of a running `generate`, once it has read them
        self.vectors: Sequence[Embeddings] = ()

    @property
    def texts(self) -> list[str]:
        """All edits, the outer ones first, as provenance states them."""
        return [*([] if self.outer is None else self.outer.texts), *(e.text for e in self.edits)]

    @property
    def changes(self) -> set[str]:
        """The fields that the edits set."""
        outer = set() if self.outer is None else self.outer.changes
        return outer.union(*(e.changes for e in self.edits))

    def name_tokens(self, ids: Sequence[int], tokens: Sequence[str], spans: Mapping[str, Span]) -> None:
        """Name the tokens of a prompt that will be run.

        Raises PromptError if an edit names tokens that the prompt does not have, and if a prompt of the same tokens was
        encoded earlier in the block whose spans give the edits other tokens; InterpError for edits that clash.
        """
        key = _key(ids)
        names = self.names.get(key)
        before = None if names is None else self.of_prompt(key)
        self._rename(key, TokenNames(tokens, spans))
        try:
            if before is not None and _rows_of(self.of_prompt(key)) != _rows_of(before):
                raise PromptError(
                    f"two prompts have the same tokens {_shortened(tokens)} and spans at different places, which "
                    f"attention edits name ({'; '.join(self.texts)}): run each in a `with model.edited(…)` block of "
                    "its own"
                )
            self.of_prompt(key)
        except InterpError:
            self._rename(key, names)
            raise

    def name_longer(self, ids: Sequence[int], appended: Sequence[int]) -> None:
        """Name the tokens of a prompt with others behind it, which positions and spans do not count."""
        names = self.names.get(tuple(ids)) or TokenNames([str(i) for i in ids])
        self.name_tokens((*ids, *appended), names.tokens, names.spans)

    def _rename(self, ids: Ids, names: TokenNames | None) -> None:
        self.names.pop(ids, None)
        if names is not None:
            self.names[ids] = names
        forwards: EditedForwards | None = self
        while forwards is not None:
            forwards._resolved.pop(ids, None)
            forwards = forwards.outer

    def of_prompt(self, ids: Sequence[int]) -> Mapping[int, tuple[LayerEdit | LayerMask, ...]]:
        """The edits of a prompt by layer, the outer ones first.

        Raises PromptError if an edit names tokens that the prompt does not have; InterpError for edits that clash.
        """
        key = _key(ids)
        if key not in self._resolved:
            by_layer: dict[int, list[LayerEdit | LayerMask]] = {}
            if self.outer is not None:
                by_layer = {layer: list(edits) for layer, edits in self.outer.of_prompt(key).items()}
            for edit, heads in zip(self.edits, self.heads, strict=True):
                for e in self._edits(edit, heads, key):
                    by_layer.setdefault(e.layer, []).append(e)
            for of_layer in by_layer.values():
                refuse_clashes([e for e in of_layer if isinstance(e, LayerEdit)])
            self._resolved[key] = {layer: tuple(edits) for layer, edits in by_layer.items()}
        return self._resolved[key]

    def opens_later(self, prompts: Iterable[Sequence[int]]) -> bool:
        """Whether a mask shows tokens of a prompt what comes after them."""
        changes = (e for ids in prompts for edits in self.of_prompt(ids).values() for e in edits)
        return any(isinstance(e, LayerMask) and e.opens_later for e in changes)

    @property
    def has_masks(self) -> bool:
        """Whether a mask is among the edits, of this block or of one around it."""
        own = any(isinstance(e, AttentionMask) for e in self.edits)
        return own or (self.outer is not None and self.outer.has_masks)

    def _edits(self, edit: AttentionChange, heads: HeadsByLayer, ids: Ids) -> list[LayerEdit] | list[LayerMask]:
        """One edit's changes of a prompt; those of all tokens go on while tokens are decoded."""
        if isinstance(edit, AttentionMask):
            return layer_masks(edit, heads, self._names_of(ids))
        if edit.phase == "decoding":
            n = len(ids) if ids not in self.names else len(self.names[ids].tokens)
            return layer_edits(edit, heads, {"queries": range(n, FOR_EVER), **self._keys(edit, ids)})
        rows = edited_rows(edit, self._names_of(ids))
        assert rows is not None  # it is not an edit of decoding alone
        queries = range(FOR_EVER) if edit.queries is None and edit.phase is None else rows["queries"]
        return layer_edits(edit, heads, {**rows, "queries": queries, **self._keys(edit, ids)})

    def _keys(self, edit: AttentionEdit, ids: Ids) -> dict[str, Sequence[Any]]:
        rows = key_rows(edit, self._names_of(ids))
        return {**rows, "keys": range(FOR_EVER)} if edit.keys is None else rows

    def _names_of(self, ids: Ids) -> TokenNames:
        if ids in self.names:
            return self.names[ids]
        if names := self._by_span:
            raise PromptError(
                f"{names[0]!r} names a span, and this prompt of {len(ids)} tokens was given as token ids or as text "
                "without spans: pass an interp.Prompt or PromptPair that has it, inside the block, or name tokens by "
                "number"
            )
        return TokenNames([str(i) for i in ids])

    # ------------------------------------------------------------ forwards

    @property
    def _is_innermost(self) -> bool:
        """Whether no other block has been entered inside this one, which would add these edits too."""
        return self.model.instrument.edited is self

    def read_inputs(self, _module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note which prompts a forward of the Hugging Face model holds.

        A forward that continues a cache keeps them, and so does one of ``generate`` that repeats them for want of one.
        """
        if not self._is_innermost:
            return
        ids = kwargs.get("input_ids", args[0] if args and isinstance(args[0], Tensor) else None)
        cache = kwargs.get("past_key_values")
        if cache is not None and getattr(cache, "get_seq_length", lambda: 0)():
            owner, self._batch = getattr(cache, PROMPTS, (None, []))
            if owner is not self:
                raise InterpError(
                    "attention edits of a forward that continues a cache of keys and values: it was filled under other "
                    "edits or none. Fill it inside the same `with model.edited(…)` block"
                )
            self._decodes = True
            return
        if ids is None and self.vectors:
            self._batch, self.vectors, self._decodes = [_BatchRow(p) for p in self.vectors], (), False
            return
        if ids is None:
            raise InterpError("attention edits of a forward without input_ids: the tokens that they name are unknown")
        mask = kwargs.get("attention_mask")
        batch = [_batch_row(row, None if mask is None else mask[i]) for i, row in enumerate(ids)]
        prompts = self._generation or []
        self._decodes = len(prompts) == len(batch) and all(map(_repeats, batch, prompts))
        if self._decodes:
            batch = [replace(row, ids=prompt.ids) for row, prompt in zip(batch, prompts, strict=True)]
        elif self._generation == []:
            self._generation = batch
        self._batch = batch

    def generation(self) -> Watch:
        """A new run of ``generate``: makes the context of each of its stretches."""
        prompts: list[_BatchRow] = []

        @contextmanager
        def stretch() -> Iterator[None]:
            nonlocal prompts
            if self._generation is not None:  # TransformerLens' generate may call that of transformers
                yield
                return
            self._generation = prompts
            try:
                yield
            finally:
                prompts, self._generation = self._generation, None

        return stretch

    def expect(self, prompts: Sequence[Embeddings]) -> None:
        """Say which prompts of vectors the next forward holds, which its inputs do not tell."""
        self.vectors = prompts

    def continue_rows(self, rows: Sequence[int], cache: Any) -> None:
        """Say which rows of the latest forward, whose cache is given, the next ones continue: some, or some twice."""
        _, batch = getattr(cache, PROMPTS, (self, self._generation or []))
        batch = [batch[i] for i in rows]
        if self._generation:
            self._generation = batch
        if hasattr(cache, "get_seq_length"):
            setattr(cache, PROMPTS, (self, batch))

    def end_forward(self, _module: Any, _args: Any, output: Any) -> None:
        """Note on a forward's cache of keys and values which prompts it holds, and forget them.

        A part of the model that is called alone does not say which prompts it runs.
        """
        if not self._is_innermost:
            return
        cache = getattr(output, "past_key_values", None)
        if hasattr(cache, "get_seq_length"):
            setattr(cache, PROMPTS, (self, self._batch))
        self._last, self._batch = self._batch, []

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Blocks that are called alone inside run the prompts of the last forward."""
        self._batch = self._last
        try:
            yield
        finally:
            self._batch = []

    def add(self, call: AttentionCall) -> AttentionCall:
        """Add the edits of every batch row to a call of attention."""
        if len(self._batch) != call.q.shape[0]:
            raise InterpError(
                f"attention edits: layer {call.layer} runs {call.q.shape[0]} prompts, and the model's own forward has "
                f"read {len(self._batch)}. A part of the model that is called alone, as some models' generate does, "
                "does not know its prompts: run the whole model, through model(…), model.bridge(…) or a recipe"
            )
        edits = tuple(shifted(self.of_prompt(row.ids).get(call.layer, ()), row.padding) for row in self._batch)
        if not any(edits):
            return call
        if self._decodes:
            _refuse_counting(edits, is_cached=call.q.shape[2] < call.k.shape[2])
        rows = zip(call.edits_by_row(), edits, strict=True)
        return replace(call, edits=tuple((*own, *new) for own, new in rows))


def _key(ids: Sequence[int]) -> Ids:
    return ids if isinstance(ids, Embeddings) else tuple(ids)


def _batch_row(ids: Tensor, mask: Tensor | None) -> _BatchRow:
    if mask is None or mask.ndim != 1:
        return _BatchRow(tuple(ids.tolist()))
    real = mask[: len(ids)].bool().nonzero()[:, 0].tolist()
    first = real[0] if real else 0
    return _BatchRow(tuple(ids[first : real[-1] + 1].tolist()) if real else (), first)


def _repeats(row: _BatchRow, prompt: _BatchRow) -> bool:
    """Whether a row holds a prompt and tokens after it."""
    n = len(prompt.ids)
    return len(row.ids) > n and row.ids[:n] == prompt.ids


def _refuse_counting(edits: Iterable[Sequence[LayerEdit | LayerMask]], is_cached: bool) -> None:
    """Raise InterpError for decoding under edits that depend on the number of keys, which every token changes."""
    for e in (e for row in edits for e in row if isinstance(e, LayerEdit) and e.counts_keys):
        if not is_cached or e.stop == FOR_EVER:
            raise InterpError(
                f"({e.edit}) divides by the number of all keys, which grows with every decoded token, so that the same "
                "token would have other weights in a full forward: set renormalise=True, or phase='prompt' and decode "
                "with a cache"
            )


def _names_spans(edit: AttentionChange) -> bool:
    """Whether an edit or a mask names tokens by a span."""
    if isinstance(edit, AttentionMask):
        return edit.names_spans
    named = [*edit.weights] if isinstance(edit.weights, Mapping) else ()
    for tokens in (edit.queries, edit.keys, edit.take, edit.give, tuple(named)):
        if isinstance(tokens, str) or (isinstance(tokens, tuple) and any(isinstance(t, str) for t in tokens)):
            return True
    return False


def _rows_of(by_layer: Mapping[int, Sequence[LayerEdit | LayerMask]]) -> list[Any]:
    """The token rows of edits, to compare them."""
    return [
        (layer, e.rules if isinstance(e, LayerMask) else (e.queries, e.keys, e.take, e.give, e.targets, e.shares))
        for layer, edits in by_layer.items()
        for e in edits
    ]


def _shortened(tokens: Sequence[str]) -> str:
    text = "".join(tokens)
    return repr(text if len(text) < 60 else f"{text[:60]}…")


def refuse_edited(model: LoadedModel) -> None:
    """Raise ModelError inside `Model.edited`, for run directories, which would mix edited and unedited parts."""
    if (forwards := model.instrument.edited) is not None:
        raise ModelError(
            "a run directory does not record the edits of a `with model.edited(…)` block, so that a resumed run would "
            f"mix edited and unedited parts ({'; '.join(forwards.texts)}): run the recipe itself, or the recipe 'edit'"
        )


@contextmanager
def edited(model: LoadedModel, edits: Iterable[AttentionChange]) -> Iterator[EditedForwards]:
    """Edit every forward inside the block; see `Model.edited`."""
    several = list(edits)
    if wrong := [e for e in several if not isinstance(e, AttentionEdit | AttentionMask)]:
        hint = " (interp.edit takes writes, beside edits and masks)" if isinstance(wrong[0], Write) else ""
        raise InterpError(f"model.edited takes AttentionEdits and AttentionMasks{hint}, got {wrong[0]!r:.60}")
    if model.stacks or model.reads == "images":
        raise PromptError(f"{model.name}: attention edits need a model that reads one sequence of tokens")
    with model.session, ExitStack() as stack:
        instrument = model.instrument
        forwards = EditedForwards(model, several, instrument.edited)
        instrument.edited, outer = forwards, instrument.edited
        stack.callback(setattr, instrument, "edited", outer)
        root = model.bridge.original_model
        stack.callback(root.register_forward_pre_hook(forwards.read_inputs, with_kwargs=True).remove)
        stack.callback(root.register_forward_hook(forwards.end_forward, always_call=True).remove)
        stack.enter_context(watched([root, model.bridge], forwards.generation))
        yield forwards
