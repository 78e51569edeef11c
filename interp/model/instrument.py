"""Instrument: computes a model's attention through headstats.

TransformerLens' hooks keep working. How attention is intercepted depends on the kind of bridge:

* Hugging Face modules call the function that is registered under ``config._attn_implementation``. `install` registers
  ours, together with a mask function that passes on padding, causality and window instead of an n×n mask (`masks`).
* TransformerLens' bridges for rotary and fused-QKV models implement attention again, densely. Each such object gets a
  generated subclass that keeps every hook and computes attention here (`attention_bridges`).
* TransformerLens' own small models ("native") are treated in the same way.

All of them end in `Instrument.__call__`, the only place where a layer's attention is computed.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import headstats
import torch
from headstats.stats import TopK
from torch import Tensor

from interp.errors import ModelError
from interp.model.apply_masks import apply_masks
from interp.model.attention_call import UNALIGNED, AttentionCall, dense_attention, rows_unknown
from interp.model.edited_attention import attend, with_rows_of_held_keys
from interp.model.layer_edits import refuse_clashes
from interp.model.layer_masks import masks_of
from interp.model.protocols import AttentionLayer
from interp.model.session import ModelLock

LINK = "_interp_link"  # attribute of attention modules and bridges that holds their `Link`

Handler = Callable[[AttentionCall], Tensor]


@dataclass
class LayerRecord:
    """How one layer's attention was computed since loading.

    ``dense_because`` is of the latest call, and empty if that was not dense. ``statistics_by``: the backend of the
    latest statistics.
    """

    calls: int = 0
    backends: Counter[str] = field(default_factory=Counter)
    dense_because: str = ""
    statistics_by: str = ""

    def count(self, backend: str, *dense_because: str) -> None:
        """Count a call that ``backend`` computes, and note why it is dense; empty reasons are left out."""
        self.backends[backend] += 1
        self.dense_because = "; ".join(filter(None, dense_because))


@dataclass(frozen=True, eq=False)
class Editor:
    """A function that adds edits to calls, and whether edited layers are computed densely."""

    edit: Callable[[AttentionCall], AttentionCall]
    dense: bool = False


class Reader(Protocol):
    """Collects statistics that depend on more than queries, keys and values."""

    def arguments(self, call: AttentionCall) -> dict[str, Tensor]:
        """Return further arguments of `headstats.attend`."""
        ...

    def reduced(self, stats: headstats.AttentionStats) -> Any:
        """Return what is stored of a layer's statistics."""
        ...


class Instrument:
    """Computes attention for every layer of one model, and records how.

    ``handler``, when set, replaces the computation; the engine uses it to pack many runs into one forward. ``spec``,
    when set, requests statistics from the kernel, which are stored in ``collected[layer]``; ``reader`` then says what
    else they depend on, and what is stored of them. All are set under the model's ``lock``.
    """

    def __init__(self, backend: str = "auto", lock: ModelLock | None = None):
        self.backend, self.lock = backend, lock or ModelLock()
        self.handler: Handler | None = None
        self.spec: headstats.StatSpec | None = None
        self.reader: Reader | None = None
        self.collected: dict[int, Any] = {}
        self.layers: dict[int, LayerRecord] = {}
        self.editors: list[Editor] = []
        self.edited: Any = None  # the innermost `interp.model.edited.EditedForwards`, inside `Model.edited`
        self.packed = False  # whether the handler computes packed cells, whose batch rows are not prompts

    def record(self, layer: int) -> LayerRecord:
        """The record of a layer, created at the first call."""
        return self.layers.setdefault(layer, LayerRecord())

    def __call__(self, call: AttentionCall, bridge: AttentionLayer) -> Tensor:
        """Compute attention output [B, H, M, Dv] of one layer.

        It is computed densely if that layer's scores or pattern are hooked.
        """
        record = self.record(call.layer)
        record.calls += 1
        call, masked = self.with_edits(call), ""
        if any(masks_of(edits) for edits in call.edits):
            call, masked = apply_masks(call)
        if any(call.edits) and any(editor.dense for editor in self.editors):
            record.count("dense", masked, "the naive engine edits whole patterns")
            for edits in call.without_masks():
                refuse_clashes(edits)
            call = with_rows_of_held_keys(call)
            return dense_attention(call, *(getattr(bridge, n, _same) for n in ("hook_attn_scores", "hook_pattern")))
        hook_names = [n for n in ("hook_attn_scores", "hook_pattern") if _has_hooks(bridge, n)]
        if hook_names and self.spec is None and self.handler is None:
            record.count("dense", masked, " and ".join(hook_names) + " hooked")
            call = with_rows_of_held_keys(call)
            return dense_attention(call, bridge.hook_attn_scores, bridge.hook_pattern)
        if self.handler is not None:
            record.dense_because = masked
            return self.handler(call)
        spec = self.spec if self.spec is None or not call.first_key else held_keys_only(self.spec, call)
        more = {} if self.reader is None else self.reader.arguments(call)
        result = attend(call, spec=spec, backend=self.backend, **more)
        record.count(result.backend, masked)
        if self.spec is not None:
            record.statistics_by = result.backend
            stats = count_from_first_key(result, self.spec, call)
            self.collected[call.layer] = stats if self.reader is None else self.reader.reduced(stats)
        return result.out

    def with_edits(self, call: AttentionCall) -> AttentionCall:
        """Return a call with the edits and masks of this forward."""
        if self.edited is not None and not self.packed:
            call = self.edited.add(call)
        for editor in self.editors:
            call = editor.edit(call)
        return call

    @contextmanager
    def handled_by(self, handler: Handler, packed: bool = False) -> Iterator[None]:
        """Let ``handler`` compute attention inside the block.

        ``packed``: it computes packed cells, and adds the edits of `Model.edited` by itself.
        """
        with self.lock:
            if self.handler is not None:
                raise RuntimeError("an attention handler is already active; handlers do not nest")
            self.handler, self.packed = handler, packed
            try:
                yield
            finally:
                self.handler, self.packed = None, False

    @contextmanager
    def editing(self, edit: Callable[[AttentionCall], AttentionCall], dense: bool = False) -> Iterator[None]:
        """Let ``edit`` add edits to every call of attention inside the block; blocks nest, the outer one first.

        ``dense``: compute edited layers densely, by `dense_attention`.
        """
        editor = Editor(edit, dense)
        self.editors.append(editor)
        try:
            yield
        finally:
            self.editors.remove(editor)

    @contextmanager
    def collecting(self, spec: headstats.StatSpec, reader: Reader | None = None) -> Iterator[dict[int, Any]]:
        """Collect per-layer statistics of forwards inside the block.

        Without a ``reader`` they are `headstats.AttentionStats`.
        """
        with self.lock:
            self.spec, self.reader, self.collected = spec, reader, {}
            try:
                yield self.collected
            finally:
                self.spec = self.reader = None


def held_keys_only(spec: headstats.StatSpec, call: AttentionCall) -> headstats.StatSpec:
    """Return the spec for the keys that a sliding cache still holds.

    Raises ModelError for statistics that cannot be counted from the sequence's first key.
    """
    if call.first_key == UNALIGNED:
        raise ModelError(rows_unknown(call, "statistics"))
    if call.first_key < 0:
        raise ModelError(
            f"layer {call.layer}: its sliding cache has dropped padded keys, so statistics cannot count keys from the "
            "first real one. Decode prompts of one length together, or without statistics"
        )
    if axis := [s.name for s in headstats.STATISTICS if s.axis == "key" and getattr(spec, s.name)]:
        raise ModelError(
            f"layer {call.layer}: its sliding cache holds the keys from {call.first_key} on, so {', '.join(axis)}, one "
            "number for each key of the sequence, cannot be computed. Leave them out of the spec"
        )
    return dataclasses.replace(spec, sink=max(0, spec.sink - call.first_key))


def count_from_first_key(
    result: headstats.Attended, spec: headstats.StatSpec, call: AttentionCall
) -> headstats.AttentionStats:
    """Return statistics whose key numbers count from the sequence's first key, not from the first key still held."""
    if not call.first_key:
        return result.stats
    values = result.stats.as_dict()
    if (best := values.get("argmax")) is not None:
        values["argmax"] = _shift(best, call.first_key)
    if (top := values.get("topk")) is not None:
        values["topk"] = TopK(top[0], _shift(top[1], call.first_key))
    if spec.sink and "sink" not in values:
        values["sink"] = torch.zeros_like(result.lse)  # all of the first keys are gone, and none has weight
    return headstats.AttentionStats(**values)


def _shift(keys: Any, first: int) -> Tensor:
    return torch.where(keys >= 0, keys + first, -1)


def _same(x: Tensor) -> Tensor:
    return x


def _has_hooks(bridge: AttentionLayer, name: str) -> bool:
    hook = getattr(bridge, name, None)
    return hook is not None and hook.has_hooks()


@dataclass
class Link:
    """Points from an attention module back to its bridge.

    It is a plain attribute of the module, not a submodule.
    """

    instrument: Instrument
    bridge: AttentionLayer
    layer: int

    def run(self, call: AttentionCall) -> Tensor:
        """Fire the post-rotation hooks, then compute attention."""
        if hasattr(self.bridge, "hook_q_latent"):
            return self.instrument(fire_latent(self.bridge, call), self.bridge)
        for name, hook in (("q", "hook_rot_q"), ("k", "hook_rot_k")):
            if _has_hooks(self.bridge, hook):
                call = replace(call, **{name: getattr(self.bridge, hook)(getattr(call, name))})
        return self.instrument(call, self.bridge)


def fire_latent(attn: Any, call: AttentionCall) -> AttentionCall:
    """Fire a latent attention's hooks on queries, keys and values.

    Keys and values are those of the positions of this step. In decoding, an edit of earlier positions' keys does not
    persist in later steps; an edit of the latent does.
    """
    rope, m = attn.original_component.qk_rope_head_dim, call.q.shape[2]
    q = attn.hook_q(torch.cat([call.q[..., :-rope], attn.hook_rot_q(call.q[..., -rope:])], dim=-1))
    past = call.k.shape[2] - m
    k, v = (
        torch.cat([x[:, :, :past], hook(x[:, :, past:])], dim=2)
        for x, hook in ((call.k, attn.hook_k), (call.v, attn.hook_v))
    )
    return replace(call, q=q, k=k, v=v)
