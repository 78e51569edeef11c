"""The same sweeps as users of other libraries write them.

They use TransformerLens' loop, Hugging Face hooks, nnsight and pyvene. Each returns one number per cell of a `PeerJob`,
so that a time counts only if the numbers agree. All of them need models of Llama's layout, which the embedded model
has.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from interp.model.protocols import Bridge
from interp.sites import Site

TOKENS_PER_FORWARD = 2048  # of a batched sweep: enough to fill the matrix products of a model of this size
Record = dict[tuple[str, int], Tensor]  # (component, layer) -> activation [position, width]


@dataclass(frozen=True, eq=False)
class PeerCell:
    """One forward in which ``site`` has ``value`` in token rows [start, stop)."""

    site: Site
    start: int
    stop: int
    value: Float[Tensor, "#rows #width"]
    noise: Float[Tensor, "position d_model"] | None = None  # added to the token embeddings

    @property
    def columns(self) -> slice:
        """The site's part of the activation's last axis."""
        if self.site.head is None:
            return slice(None)
        width = self.value.shape[-1]
        return slice(self.site.head * width, (self.site.head + 1) * width)


@dataclass(frozen=True)
class PeerJob:
    """A sweep of one prompt.

    ``make`` takes a function that records a prompt's activations by component and layer, and returns the cells; this
    preparation counts as part of the sweep. ``loop``: the same sweep for `transformer_lens.patching`; None if it has no
    such loop.
    """

    ids: Sequence[int]
    answer: int
    foil: int | None
    make: Callable[[Callable[[Sequence[int]], Record]], Sequence[Any]]  # PeerCells, or PatternCells for `DenseHooks`
    loop: Loop | None = None

    def read(self, logits: Float[Tensor, "cells vocab"]) -> Float[Tensor, " cells"]:
        """Logit difference, or without a foil the answer's probability."""
        if self.foil is None:
            return logits.softmax(-1)[:, self.answer]
        return logits[:, self.answer] - logits[:, self.foil]


@dataclass(frozen=True)
class Loop:
    """Arguments of `transformer_lens.patching.generic_activation_patch`.

    ``index`` has one row for each cell. ``source``: ids whose cache is patched in; None patches in zeros.
    """

    component: str
    setter: str
    index: pd.DataFrame
    source: Sequence[int] | None


class HuggingFace:
    """Forward hooks on the plain model with SDPA attention.

    Each forward holds as many cells as fill it.
    """

    name = "Hugging Face hooks, batched"

    def __init__(self, hf: Any, tokens_per_forward: int = TOKENS_PER_FORWARD):
        self.hf, self.tokens_per_forward = hf, tokens_per_forward

    @torch.no_grad()
    def sweep(self, job: PeerJob) -> np.ndarray:
        """One number per cell."""
        cells = job.make(self.record)
        step = max(1, self.tokens_per_forward // len(job.ids))
        values = []
        for first in range(0, len(cells), step):
            batch = cells[first : first + step]
            with self._hooked(batch):
                tokens = torch.tensor([list(job.ids)]).expand(len(batch), -1)
                logits = self.hf(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
            values.append(job.read(logits))
        return torch.cat(values).numpy()

    @torch.no_grad()
    def record(self, ids: Sequence[int]) -> Record:
        """Record residual stream and head outputs of every layer."""
        activations: Record = {}
        handles = []
        for layer, block in enumerate(self.hf.model.layers):
            for component, module in (("resid_pre", block), ("z", block.self_attn.o_proj)):

                def keep(module: Any, args: Any, key: tuple[str, int] = (component, layer)) -> None:
                    activations[key] = args[0][0].clone()

                handles.append(module.register_forward_pre_hook(keep))
        last = len(self.hf.model.layers)

        def keep_last(module: Any, args: Any) -> None:
            activations["resid_pre", last] = args[0][0].clone()

        handles.append(self.hf.model.norm.register_forward_pre_hook(keep_last))
        try:
            self.hf(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return activations

    def _place(self, site: Site) -> tuple[Any, bool]:
        """The module that carries a site, and whether its output does."""
        model, layer = self.hf.model, site.layer or 0
        if site.component in ("resid_pre", "resid_post"):
            at = layer + (site.component == "resid_post")
            return (model.norm if at == len(model.layers) else model.layers[at]), False
        attention = model.layers[layer].self_attn
        if site.component == "z":
            return attention.o_proj, False
        return getattr(attention, f"{site.component}_proj"), True

    @contextlib.contextmanager
    def _hooked(self, cells: Sequence[PeerCell]) -> Iterator[None]:
        by_module: dict[tuple[Any, bool], list[tuple[int, PeerCell]]] = {}
        for row, cell in enumerate(cells):
            by_module.setdefault(self._place(cell.site), []).append((row, cell))
        handles = []
        for (module, is_output), module_cells in by_module.items():

            def put(x: Tensor, module_cells: list[tuple[int, PeerCell]] = module_cells) -> Tensor:
                x = x.clone()
                for row, cell in module_cells:
                    x[row, cell.start : cell.stop, cell.columns] = cell.value
                return x

            if is_output:
                handles.append(module.register_forward_hook(lambda module, args, out, put=put: put(out)))
            else:
                handles.append(
                    module.register_forward_pre_hook(lambda module, args, put=put: (put(args[0]), *args[1:]))
                )
        if any(c.noise is not None for c in cells):
            noise = torch.stack([c.noise for c in cells if c.noise is not None])
            handles.append(self.hf.model.embed_tokens.register_forward_hook(lambda module, args, out: out + noise))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


@dataclass(frozen=True, eq=False)
class PatternCell:
    """One forward in which one layer's scores, or its pattern, are changed by a function.

    ``scores``: of [heads, query, key] after the mask; ``pattern``: of the same after the softmax.
    """

    layer: int
    scores: Callable[[Tensor], Tensor] | None = None
    pattern: Callable[[Tensor], Tensor] | None = None


class DenseHooks(HuggingFace):
    """Hooks on dense scores and patterns of the plain model, in batches.

    Layers that no cell of a batch changes keep SDPA attention.
    """

    name = "Hugging Face, hooks on dense attention, batched"

    @torch.no_grad()
    def sweep(self, job: PeerJob) -> np.ndarray:
        """One number per cell."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        cells: Sequence[Any] = job.make(self.record)
        step = max(1, self.tokens_per_forward // len(job.ids))
        AttentionMaskInterface.register("dense_hooks", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        before, values = self.hf.config._attn_implementation, []
        try:
            for first in range(0, len(cells), step):
                batch = cells[first : first + step]
                AttentionInterface.register("dense_hooks", partial(_attend_with_hooks, batch))
                self.hf.set_attn_implementation("dense_hooks")
                tokens = torch.tensor([list(job.ids)]).expand(len(batch), -1)
                values.append(job.read(self.hf(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]))
        finally:
            self.hf.set_attn_implementation(before)
        return torch.cat(values).numpy()


def _attend_with_hooks(
    cells: Sequence[PatternCell], module: Any, q: Tensor, k: Tensor, v: Tensor, _mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attention in which the rows of a batch whose cell is in this layer are computed densely."""
    rows = [i for i, cell in enumerate(cells) if cell.layer == module.layer_idx]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
    if rows:
        n, groups = q.shape[2], q.shape[1] // k.shape[1]
        k, v = (x[rows].repeat_interleave(groups, 1) for x in (k, v))
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        scores = (q[rows] @ k.transpose(-1, -2) * scaling).masked_fill(hidden, -torch.inf)
        for i, row in enumerate(rows):
            if (change := cells[row].scores) is not None:
                scores[i] = change(scores[i])
        pattern = scores.softmax(-1)
        for i, row in enumerate(rows):
            if (change := cells[row].pattern) is not None:
                pattern[i] = change(pattern[i])
        out[rows] = pattern @ v
    return out.transpose(1, 2), None


class OneByOne(HuggingFace):
    """The same with one cell per forward."""

    name = "Hugging Face hooks, a forward a cell"

    def __init__(self, hf: Any):
        super().__init__(hf, tokens_per_forward=1)


@dataclass
class TransformerLens:
    """`transformer_lens.patching` on a bridge as booted.

    A job without such a loop runs in one written by hand.
    """

    bridge: Bridge
    hf: HuggingFace  # records activations for loops written by hand
    name: str = field(default="transformer_lens.patching", init=False)

    @torch.no_grad()
    def sweep(self, job: PeerJob) -> np.ndarray:
        """One number per cell."""
        tokens = torch.tensor([list(job.ids)])
        if job.loop is None:
            return np.array([float(self._one(job, tokens, cell)) for cell in job.make(self.hf.record)])
        from transformer_lens import patching

        loop = job.loop
        name = f"hook_{loop.component}" if loop.component.startswith("resid") else f"attn.hook_{loop.component}"
        source = tokens if loop.source is None else torch.tensor([list(loop.source)])
        _, cache = self.bridge.run_with_cache(source, names_filter=lambda n: n.endswith(name))
        patches = {k: torch.zeros_like(v) if loop.source is None else v for k, v in cache.items()}
        sweep: Any = patching.generic_activation_patch  # written for HookedTransformer; a bridge works too
        values = sweep(
            self.bridge, tokens, patches, lambda logits: job.read(logits[:, -1])[0], getattr(patching, loop.setter),
            loop.component, index_df=loop.index,
        )  # fmt: skip
        return values.numpy()

    def _one(self, job: PeerJob, tokens: Tensor, cell: PeerCell) -> Tensor:
        def put(x: Tensor, hook: Any) -> Tensor:
            x = x.clone()
            at = x[0, cell.start : cell.stop]
            (at if cell.site.head is None else at[:, cell.site.head])[:] = cell.value
            return x

        pairs: list[tuple[str, Any]] = [(cell.site.hook_name, put)]
        if cell.noise is not None:
            pairs.append(("hook_embed", lambda x, hook: x + cell.noise))
        return job.read(self.bridge.run_with_hooks(tokens, fwd_hooks=pairs)[:, -1])[0]


class NNsight:
    """nnsight's batched invokes.

    A trace has as many cells as a forward of the Hugging Face sweep.
    """

    name = "nnsight invokes, batched"

    def __init__(self, hf: HuggingFace, tokenizer: Any):
        nnsight: Any = importlib.import_module("nnsight")  # an optional extra that type checkers need not have
        self.hf, self.model = hf, nnsight.TransformersModel(hf.hf, tokenizer=tokenizer)

    @torch.no_grad()
    def sweep(self, job: PeerJob) -> np.ndarray:
        """One number per cell."""
        cells, tokens = job.make(self.hf.record), torch.tensor([list(job.ids)])
        step = max(1, self.hf.tokens_per_forward // len(job.ids))
        values = []
        for first in range(0, len(cells), step):
            logits = self._trace(tokens, cells[first : first + step])
            values.append(job.read(torch.cat(logits)))
        return torch.cat(values).numpy()

    def _trace(self, tokens: Tensor, cells: Sequence[PeerCell]) -> list[Tensor]:
        model, logits = self.model, []
        with model.trace(logits_to_keep=1) as tracer:
            for cell in cells:
                with tracer.invoke(tokens):
                    site = cell.site
                    if cell.noise is not None:
                        model.model.embed_tokens.output[:] = model.model.embed_tokens.output + cell.noise
                    rows = slice(cell.start, cell.stop)
                    attention = model.model.layers[site.layer].self_attn
                    if site.component == "resid_pre":
                        model.model.layers[site.layer].input[:, rows] = cell.value
                    elif site.component == "resid_post":
                        model.model.layers[site.layer].output[:, rows] = cell.value
                    elif site.component == "z":
                        attention.o_proj.input[:, rows, cell.columns] = cell.value
                    else:
                        getattr(attention, f"{site.component}_proj").output[:, rows, cell.columns] = cell.value
                    logits.append(model.lm_head.output[:, -1].save())
        return logits


class Pyvene:
    """pyvene's interventions, one forward per cell.

    One intervention is the same for a whole batch.
    """

    name = "pyvene, a forward a cell"

    def __init__(self, hf: HuggingFace):
        self.hf = hf
        self.library: Any = importlib.import_module("pyvene")  # an optional extra

    @torch.no_grad()
    def sweep(self, job: PeerJob) -> np.ndarray:
        """One number per cell."""
        tokens = torch.tensor([list(job.ids)])
        return np.array([float(self._one(job, tokens, cell)) for cell in job.make(self.hf.record)])

    def _one(self, job: PeerJob, tokens: Tensor, cell: PeerCell) -> Tensor:
        def put(x: Tensor, source: Any) -> Tensor:
            x = x.clone()
            x[:, cell.start : cell.stop, cell.columns] = cell.value
            return x

        parts = [{"component": self._place(cell.site), "intervention": put}]
        if cell.noise is not None:
            parts.append({"component": "model.embed_tokens.output", "intervention": lambda x, source: x + cell.noise})
        model = self.library.IntervenableModel(parts, model=self.hf.hf)
        return job.read(model({"input_ids": tokens})[1].logits[:, -1])[0]

    def _place(self, site: Site) -> str:
        layer = f"model.layers[{site.layer}]"
        if site.component == "z":
            return f"{layer}.self_attn.o_proj.input"
        if site.component in ("resid_pre", "resid_post"):
            return f"{layer}.{'input' if site.component == 'resid_pre' else 'output'}"
        return f"{layer}.self_attn.{site.component}_proj.output"


OPTIONAL: dict[type, str] = {NNsight: "nnsight", Pyvene: "pyvene"}


def missing(kind: type) -> str | None:
    """The reason why a library is not measured, or None."""
    package = OPTIONAL.get(kind)
    absent = package is not None and importlib.util.find_spec(package) is None
    return f"{package} is not installed: pip install 'interp[bench]'" if absent else None
