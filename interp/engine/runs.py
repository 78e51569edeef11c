"""Base runs: one recorded forward per prompt.

Patches write into base runs, and take values from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine.cells import CellWrite
from interp.model.attention_call import AttentionCall
from interp.model.batching import equal_length_batches
from interp.model.edited_attention import attend
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.prompts.model_input import as_hashable
from interp.sites import COMPONENTS, Site

ReadRows = Sequence[tuple[int, ...] | None]  # of each prompt; None: the last
READ_ROWS = 512  # rows of logits that one forward of base runs computes


@dataclass
class Run:
    """One prompt's forward.

    ``resid[l]`` enters block l, and ``resid[n_layers]`` leaves the last one. ``keys`` and ``values`` are those that
    attention used (rotated), per layer. ``acts[component][layer]`` holds the requested components, with heads as the
    last axis but one. ``noise`` was added to the token embeddings. ``logits``: those of the last row; with ``read``,
    those of these rows (ascending), which are then all that is read of the run and of cells in it.
    """

    ids: tuple[int, ...]
    resid: Float[Tensor, "layers_plus_1 position d_model"]
    logits: Float[Tensor, "*read vocab"]
    keys: list[Float[Tensor, "kv_heads position d_head"]] = field(default_factory=list)
    values: list[Float[Tensor, "kv_heads position d_head"]] = field(default_factory=list)
    acts: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    noise: Float[Tensor, "position d_model"] | None = None
    read: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def read_rows(self) -> tuple[int, ...]:
        """The rows whose logits are read."""
        return (len(self.ids) - 1,) if self.read is None else self.read

    def tensors(self) -> Iterator[Tensor]:
        """All tensors that the run holds."""
        yield from (self.resid, self.logits, *self.keys, *self.values)
        for layers in self.acts.values():
            yield from layers.values()

    def whole(self, component: str, layer: int | None) -> Float[Tensor, "position *heads width"]:
        """A component's activation with all its heads (or neurons, of width 1)."""
        index = layer or 0  # the embedding, which exists once, is stored as layer 0
        if component in ("resid_pre", "resid_post"):
            return self.resid[index + (component == "resid_post")]
        activation = self.acts[component][index]
        return activation.unsqueeze(-1) if COMPONENTS[component].heads == "neuron" else activation

    def value(self, site: Site, start: int, stop: int) -> Float[Tensor, "rows width"]:
        """The activation at a site in rows [start, stop)."""
        rows = self.whole(site.component, site.layer)[start:stop]
        return rows if site.head is None else rows[:, site.head]


class ReadRun(Protocol):
    """The length of a base run, and which of its rows are read."""

    def __len__(self) -> int:
        """Number of tokens."""
        ...

    @property
    def read_rows(self) -> Sequence[int]:
        """The rows whose logits are read, in ascending order."""
        ...


def join_logits(logits: Sequence[Float[Tensor, "*read vocab"]]) -> Float[Tensor, "rows vocab"]:
    """Return the logits of all rows that are read, run after run."""
    return torch.cat([x.view(-1, x.shape[-1]) for x in logits])


def is_change(write: CellWrite, run: Run) -> bool:
    """Whether a write changes any value of ``run``.

    The run holds the write's component.
    """
    if write.how == "add":
        return write.value is None or bool(write.value.any())
    return write.value is None or bool((write.value != run.value(write.site, write.start, write.stop)).any())


@dataclass
class Frame:
    """The arguments of each block, to rebuild those of a packed forward.

    ``kwargs``: the keyword arguments of each block in the longest recorded batch, which has ``length`` tokens.
    ``calls``: the layers' attention calls without their tensors (causality, window, scale, …).
    ``positions_differ``: rotary positions are not the same for all prompts. Those of an image's tokens can depend on
    the image, and some scalings of rotary embeddings depend on the prompt's length.
    """

    length: int = 0
    kwargs: list[dict[str, Any]] = field(default_factory=list)
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    positions_differ: bool = False

    def compare_positions(self, kwargs: dict[str, Any], earlier: dict[str, Any]) -> None:
        """Set ``positions_differ`` if rotary positions differ from an earlier batch's."""
        for table, earlier_table in zip(_rotary_tables(kwargs), _rotary_tables(earlier), strict=True):
            n = min(table.shape[1], earlier_table.shape[1])
            self.positions_differ |= not bool((table[:, :n] == earlier_table[:1, :n]).all())


def _rotary_tables(kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    tables = kwargs.get("position_embeddings")
    return tables if isinstance(tables, tuple) else ()


def record(
    model: Model,
    prompts: Sequence[Sequence[int]],
    components: Sequence[str] = (),
    noise: Sequence[Tensor | None] | None = None,
    frame: Frame | None = None,
    keep_kv: bool = True,
    read: ReadRows | None = None,
) -> list[Run]:
    """Run every prompt once and store what a sweep needs.

    Prompts are batched by length, unpadded. ``noise[i]`` [position, d_model] is added to prompt i's token embeddings.
    Without noise, equal prompts share a run. ``frame``: filled with the blocks' arguments. ``read``: the rows of each
    prompt whose logits are read (None: the last).
    """
    reads: ReadRows = [None] * len(prompts) if read is None else read
    if noise is None:
        keys = list(zip(map(as_hashable, prompts), reads, strict=True))
        distinct = list(dict.fromkeys(keys))
        if len(distinct) < len(prompts):
            ids, rows = zip(*distinct, strict=True)
            runs = dict(zip(distinct, record(model, ids, components, None, frame, keep_kv, rows), strict=True))
            return [runs[key] for key in keys]
    noises = list(noise) if noise is not None else [None] * len(prompts)
    out: list[Run | None] = [None] * len(prompts)
    for batch in equal_length_batches(prompts):
        for part in small_enough(batch, prompts, reads):
            recorder = _Recorder(model, components, keep_kv, frame)
            batch_noise = _stack_noise([noises[i] for i in part])
            with recorder.attached(batch_noise):
                logits = read_logits(model, [prompts[i] for i in part], [reads[i] for i in part])
            for row, i in enumerate(part):
                run = recorder.run(row, as_hashable(prompts[i]), logits[row], noises[i])
                run.read = reads[i]
                out[i] = run
    return [run for run in out if run is not None]


def read_logits(
    model: Model, prompts: Sequence[Sequence[int]], read: ReadRows
) -> Sequence[Float[Tensor, "*read vocab"]]:
    """Return the logits of the rows of each prompt that are read, for prompts of equal shape."""
    if all(rows is None for rows in read):
        return list(model.last_logits(prompts))
    logits, first = model.logits_from(prompts, min(min(rows) for rows in read if rows is not None))
    return [x[-1] if rows is None else x[[r - first for r in rows]] for x, rows in zip(logits, read, strict=True)]


def small_enough(batch: list[int], prompts: Sequence[Sequence[int]], reads: ReadRows) -> Iterator[list[int]]:
    """Cut a batch of prompts so that not too many rows of logits exist at the same time."""
    computed = [len(prompts[i]) - min(rows) for i in batch if (rows := reads[i]) is not None]
    step = max(1, READ_ROWS // max(computed)) if computed else len(batch)
    yield from (batch[i : i + step] for i in range(0, len(batch), step))


def _stack_noise(noises: list[Tensor | None]) -> Tensor | None:
    like = next((n for n in noises if n is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if n is None else n for n in noises])


def _n_keys(bias: Tensor | None) -> int:
    return 0 if bias is None else bias.shape[-1]


class _Recorder:
    """Collects the activations of one batch, by hooks and an attention handler."""

    def __init__(self, model: Model, components: Sequence[str], keep_kv: bool, frame: Frame | None):
        self.model, self.keep_kv, self.frame = model, keep_kv, frame
        self.components = [c for c in components if c not in ("resid_pre", "resid_post")]
        self.resid: list[Tensor] = []
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.acts: dict[tuple[str, int], Tensor] = {}
        self.earlier_kwargs = [] if frame is None else frame.kwargs  # those of an earlier batch
        self.compared: tuple[Any, Any] = (None, None)  # the tables that were compared last
        self.block = 0

    @contextmanager
    def attached(self, noise: Tensor | None) -> Iterator[None]:
        n = self.model.n_layers
        pairs: list[tuple[str, Any]] = [(f"blocks.{i}.hook_resid_pre", self._keep_resid) for i in range(n)]
        pairs.append((f"blocks.{n - 1}.hook_resid_post", self._keep_resid))
        for component in self.components:
            spec = COMPONENTS[component]
            for layer in self.model.layers_with(component):
                pairs.append((spec.hook.format(layer=layer), self._keep(component, layer)))
        if noise is not None:
            pairs.append(("hook_embed", lambda x, hook: x + noise.to(x)))
        with ExitStack() as stack:
            stack.enter_context(hooks(self.model, *pairs))
            stack.enter_context(self.model.instrument.handled_by(self._attend))
            blocks = self.model.bridge.blocks
            handles = [b.register_forward_pre_hook(self._keep_kwargs, with_kwargs=True) for b in blocks]
            for handle in handles:
                stack.callback(handle.remove)
            yield

    def _keep_resid(self, x: Tensor, hook: Any) -> None:
        self.resid.append(x.detach())

    def _keep(self, component: str, layer: int) -> Any:
        def keep(x: Tensor, hook: Any) -> None:
            self.acts[component, layer] = x.detach()

        return keep

    def _keep_kwargs(self, block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        frame, length = self.frame, args[0].shape[1] if args else kwargs["hidden_states"].shape[1]
        if frame is None:
            return
        earlier = self.earlier_kwargs[self.block] if len(self.earlier_kwargs) == self.model.n_layers else kwargs
        self.block += 1
        tables = kwargs.get("position_embeddings"), earlier.get("position_embeddings")
        if tables[0] is not self.compared[0] or tables[1] is not self.compared[1]:  # layers share their tables
            self.compared = tables
            frame.compare_positions(kwargs, earlier)
        if length < frame.length:
            return
        if length > frame.length or len(frame.kwargs) == self.model.n_layers:
            frame.length, frame.kwargs = length, []
        frame.kwargs.append({k: v for k, v in kwargs.items() if k != "hidden_states"})

    def _attend(self, call: AttentionCall) -> Tensor:
        if self.keep_kv:
            self.kv[call.layer] = (call.k.detach(), call.v.detach())
        if self.frame is not None:
            empty = call.q.new_empty(0)
            earlier = self.frame.calls.get(call.layer)
            own = call.unmasked()
            bias = own.bias if earlier is None or earlier.bias is None else max(earlier.bias, own.bias, key=_n_keys)
            self.frame.calls[call.layer] = replace(own, q=empty, k=empty, v=empty, bias=bias)
        result = attend(call, backend=self.model.instrument.backend)
        self.model.instrument.record(call.layer).backends[result.backend] += 1
        return result.out

    def run(self, row: int, ids: tuple[int, ...], logits: Tensor, noise: Tensor | None) -> Run:
        n = self.model.n_layers
        acts = {c: {layer: self.acts[c, layer][row] for layer in self.model.layers_with(c)} for c in self.components}
        keys, values = ([self.kv[i][j][row] for i in range(n)] if len(self.kv) == n else [] for j in (0, 1))
        return Run(ids, torch.stack([r[row] for r in self.resid]), logits, keys, values, acts, noise)
