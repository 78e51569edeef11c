"""The same sweeps as other libraries' users write them: TransformerLens' loop, Hugging Face hooks, nnsight.

Each answers a `Job` with one number a cell, so that a time counts only where the numbers agree. All of them take
models of Llama's layout, which the embedded one has.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.sites import Site

TOKENS_PER_FORWARD = 2048  # of a batched sweep: fills the matrix products of this size of model
Record = dict[tuple[str, int], Tensor]  # (component, layer) -> activation [position, width]


@dataclass(frozen=True, eq=False)
class Cell:
    """One forward: ``site``'s activation becomes ``value`` in token rows [start, stop)."""

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
class Job:
    """A sweep of one prompt. ``make`` takes a function that records a prompt's activations by component and layer, and
    returns the cells: what a user computes before the sweep counts as part of it.

    ``loop``: how `transformer_lens.patching` is told the same; None where it has no such loop.
    """

    ids: Sequence[int]
    answer: int
    foil: int | None
    make: Callable[[Callable[[Sequence[int]], Record]], list[Cell]]
    loop: Loop | None = None

    def read(self, logits: Float[Tensor, "cells vocab"]) -> Float[Tensor, " cells"]:
        """Logit difference; without a foil the answer's probability."""
        if self.foil is None:
            return logits.softmax(-1)[:, self.answer]
        return logits[:, self.answer] - logits[:, self.foil]


@dataclass(frozen=True)
class Loop:
    """Arguments of `transformer_lens.patching.generic_activation_patch`: one row of ``index`` for each cell.

    ``source``: ids whose cache is patched in; None: zeros.
    """

    component: str
    setter: str
    index: pd.DataFrame
    source: Sequence[int] | None


class HuggingFace:
    """Forward hooks on the plain model with SDPA attention, as many cells to a forward as fill it."""

    name = "Hugging Face hooks, batched"

    def __init__(self, hf: Any, tokens_per_forward: int = TOKENS_PER_FORWARD):
        self.hf, self.tokens_per_forward = hf, tokens_per_forward

    @torch.no_grad()
    def sweep(self, job: Job) -> np.ndarray:
        """One number a cell."""
        cells = job.make(self.record)
        step = max(1, self.tokens_per_forward // len(job.ids))
        found = []
        for first in range(0, len(cells), step):
            some = cells[first : first + step]
            with self._hooked(some):
                tokens = torch.tensor([list(job.ids)]).expand(len(some), -1)
                logits = self.hf(tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
            found.append(job.read(logits))
        return torch.cat(found).numpy()

    @torch.no_grad()
    def record(self, ids: Sequence[int]) -> Record:
        """Residual stream and head outputs of every layer."""
        kept: Record = {}
        handles = []
        for layer, block in enumerate(self.hf.model.layers):
            for component, module in (("resid_pre", block), ("z", block.self_attn.o_proj)):

                def keep(module: Any, args: Any, key: tuple[str, int] = (component, layer)) -> None:
                    kept[key] = args[0][0].clone()

                handles.append(module.register_forward_pre_hook(keep))
        last = len(self.hf.model.layers)
        handles.append(self.hf.model.norm.register_forward_pre_hook(
            lambda module, args: kept.__setitem__(("resid_pre", last), args[0][0].clone())
        ))  # fmt: skip
        try:
            self.hf(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=1)
        finally:
            for handle in handles:
                handle.remove()
        return kept

    def _place(self, site: Site) -> tuple[Any, bool]:
        """The module that carries a site, and whether in its output."""
        model, layer = self.hf.model, site.layer or 0
        if site.component in ("resid_pre", "resid_post"):
            at = layer + (site.component == "resid_post")
            return (model.norm if at == len(model.layers) else model.layers[at]), False
        attention = model.layers[layer].self_attn
        if site.component == "z":
            return attention.o_proj, False
        return getattr(attention, f"{site.component}_proj"), True

    @contextlib.contextmanager
    def _hooked(self, cells: Sequence[Cell]) -> Iterator[None]:
        by_module: dict[tuple[Any, bool], list[tuple[int, Cell]]] = {}
        for row, cell in enumerate(cells):
            by_module.setdefault(self._place(cell.site), []).append((row, cell))
        handles = []
        for (module, output), mine in by_module.items():

            def put(x: Tensor, mine: list[tuple[int, Cell]] = mine) -> Tensor:
                x = x.clone()
                for row, cell in mine:
                    x[row, cell.start : cell.stop, cell.columns] = cell.value
                return x

            if output:
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


class OneByOne(HuggingFace):
    """The same, one cell to a forward."""

    name = "Hugging Face hooks, a forward a cell"

    def __init__(self, hf: Any):
        super().__init__(hf, tokens_per_forward=1)


@dataclass
class TransformerLens:
    """`transformer_lens.patching` on a bridge as it is booted; where that has no such loop, one by hand."""

    bridge: Any
    hf: HuggingFace  # its records, for loops by hand
    name: str = field(default="transformer_lens.patching", init=False)

    @torch.no_grad()
    def sweep(self, job: Job) -> np.ndarray:
        """One number a cell."""
        tokens = torch.tensor([list(job.ids)])
        if job.loop is None:
            return np.array([float(self._one(job, tokens, cell)) for cell in job.make(self.hf.record)])
        from transformer_lens import patching

        loop, before = job.loop, self.bridge
        name = f"hook_{loop.component}" if loop.component.startswith("resid") else f"attn.hook_{loop.component}"
        source = tokens if loop.source is None else torch.tensor([list(loop.source)])
        _, cache = before.run_with_cache(source, names_filter=lambda n: n.endswith(name))
        values = {k: torch.zeros_like(v) if loop.source is None else v for k, v in cache.items()}
        sweep: Any = patching.generic_activation_patch  # written for HookedTransformer, which a bridge stands in for
        found = sweep(
            self.bridge, tokens, values, lambda logits: job.read(logits[:, -1])[0], getattr(patching, loop.setter),
            loop.component, index_df=loop.index,
        )  # fmt: skip
        return found.numpy()

    def _one(self, job: Job, tokens: Tensor, cell: Cell) -> Tensor:
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
    """nnsight's batched invokes: as many cells to a trace as the Hugging Face sweep has to a forward."""

    name = "nnsight invokes, batched"

    def __init__(self, hf: HuggingFace, tokenizer: Any):
        nnsight: Any = importlib.import_module("nnsight")  # an extra: type checkers need not have it
        self.hf, self.model = hf, nnsight.TransformersModel(hf.hf, tokenizer=tokenizer)

    @torch.no_grad()
    def sweep(self, job: Job) -> np.ndarray:
        """One number a cell."""
        cells, tokens = job.make(self.hf.record), torch.tensor([list(job.ids)])
        step = max(1, self.hf.tokens_per_forward // len(job.ids))
        found = []
        for first in range(0, len(cells), step):
            logits = self._trace(tokens, cells[first : first + step])
            found.append(job.read(torch.cat(logits)))
        return torch.cat(found).numpy()

    def _trace(self, tokens: Tensor, cells: Sequence[Cell]) -> list[Tensor]:
        model, out = self.model, []
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
                    out.append(model.lm_head.output[:, -1].save())
        return out


class Pyvene:
    """pyvene's interventions, a forward a cell: one intervention is the same for a whole batch."""

    name = "pyvene, a forward a cell"

    def __init__(self, hf: HuggingFace):
        self.hf = hf
        self.library: Any = importlib.import_module("pyvene")  # an extra

    @torch.no_grad()
    def sweep(self, job: Job) -> np.ndarray:
        """One number a cell."""
        tokens = torch.tensor([list(job.ids)])
        return np.array([float(self._one(job, tokens, cell)) for cell in job.make(self.hf.record)])

    def _one(self, job: Job, tokens: Tensor, cell: Cell) -> Tensor:
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
    """Why a library is not measured, or None."""
    package = OPTIONAL.get(kind)
    absent = package is not None and importlib.util.find_spec(package) is None
    return f"{package} is not installed: pip install 'interp[bench]'" if absent else None
