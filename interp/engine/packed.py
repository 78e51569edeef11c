"""The fast path: all cells of a batch advance through the blocks together, re-running only what can change.

Exact for causal decoders, by four facts:

* blocks before the first written site see the base run's input: a cell enters at its first changed block;
* under causal attention positions before the first written one never change: only rows from there on are
  computed, and their attention reads the base run's keys and values for the rest;
* everything but attention acts on tokens one by one: rows of all cells are packed into one [1, rows, d]
  hidden state, so that short prompts still fill the matrix products;
* the metric reads the last position: only that row meets the unembedding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.dense import AttentionCall
from interp.engine.cells import Cell, Write, index_rows
from interp.engine.runs import Frame, Run, hooks
from interp.instrument import attend
from interp.model import Model

ROWWISE_KWARGS = ("position_embeddings", "position_ids", "alibi")
DROPPED_KWARGS = (
    "attention_mask", "past_key_values", "layer_past", "use_cache", "cache_position", "encoder_attention_mask",
    "position_bias",  # a linear bias: the recorded calls hold it, per key
)  # fmt: skip


def unsupported(model: Model, frame: Frame) -> str | None:
    """Why this model's blocks cannot be run packed, or None."""
    for layer, call in frame.calls.items():
        if not call.causal:
            return f"layer {layer} is not causal (bidirectional, or behind a custom mask)"
        if call.bias is not None and call.bias.shape[-2] != 1:
            return f"layer {layer} adds a bias that depends on the query's position"
    if len(frame.calls) < model.n_layers or len(frame.kwargs) < model.n_layers:
        return "not every layer was seen by the recorder"
    for layer, kwargs in enumerate(frame.kwargs):
        for name, value in kwargs.items():
            known = name.startswith(ROWWISE_KWARGS) or name in DROPPED_KWARGS
            if not known and isinstance(value, Tensor | tuple | list | dict):
                return f"block {layer} takes {name!r}, which the packed path does not know how to slice"
    if not hasattr(model.bridge, "ln_final") or not hasattr(model.bridge, "unembed"):
        return "the model has no final norm and unembedding under their TransformerLens names"
    return None


@dataclass
class Group:
    """Cells of one run that start at one position: they share the base run's prefix keys and values."""

    run: Run
    start: int
    cells: list[int] = field(default_factory=list)  # numbers within the batch, in order of entry

    @property
    def rows(self) -> int:
        """Rows that each cell computes."""
        return len(self.run) - self.start


@dataclass
class Piece:
    """The rows of one group's active cells in the packed hidden state."""

    group: Group
    cells: list[int]
    offset: int


class PackedForward:
    """One batch of cells, advanced block by block."""

    def __init__(self, model: Model, runs: Sequence[Run], cells: Sequence[Cell], frame: Frame):
        self.model, self.runs, self.cells, self.frame = model, runs, cells, frame
        by_start: dict[tuple[int, int], Group] = {}
        for i in sorted(range(len(cells)), key=lambda i: cells[i].first_layer):
            cell = cells[i]
            key = (cell.run, cell.first_row)
            by_start.setdefault(key, Group(runs[cell.run], cell.first_row)).cells.append(i)
        self.groups = list(by_start.values())
        self.writes: dict[tuple[int, str], list[tuple[int, Write]]] = defaultdict(list)
        for i, cell in enumerate(cells):
            for write in cell.writes:
                site = write.site
                layer, component = site.layer or 0, site.component
                if component == "resid_post":  # the same residual, named from the other side of the block
                    layer, component = layer + 1, "resid_pre"
                self.writes[layer, component].append((i, write))
        self.hidden: dict[int, Tensor] = {}  # group number → [active cells, rows, d_model]

    def logits(self) -> Float[Tensor, "cells vocab"]:
        """Last-position logits of every cell, in the order of ``cells``."""
        entered = [0] * len(self.groups)
        for layer in range(self.model.n_layers):
            self._enter(layer, entered)
            pieces = self._pieces(entered)
            if pieces:
                self._block(layer, pieces)
        self._enter(self.model.n_layers, entered)
        last = [h[:, -1] for _, h in sorted(self.hidden.items())]
        order = [i for g in self.groups for i in g.cells]
        logits = final_logits(self.model, torch.cat(last))
        return logits[torch.argsort(torch.tensor(order, device=logits.device))]

    def _enter(self, layer: int, entered: list[int]) -> None:
        """Add the cells whose first changed block is ``layer``, then apply residual writes."""
        for g, group in enumerate(self.groups):
            new = 0
            while entered[g] + new < len(group.cells) and self._starts(group, entered[g] + new) <= layer:
                new += 1
            if new:
                fresh = group.run.resid[layer][group.start :].expand(new, -1, -1)
                old = self.hidden.get(g)
                self.hidden[g] = fresh.clone() if old is None else torch.cat([old, fresh])
                entered[g] += new
        where = self._where(entered)
        for i, write in self.writes.get((layer, "resid_pre"), ()):
            g, row = where[i]
            start = self.groups[g].start
            self.hidden[g][row, write.start - start : write.stop - start] = write.value

    def _starts(self, group: Group, number: int) -> int:
        return self.cells[group.cells[number]].first_layer

    def _where(self, entered: list[int]) -> dict[int, tuple[int, int]]:
        return {i: (g, row) for g, group in enumerate(self.groups) for row, i in enumerate(group.cells[: entered[g]])}

    def _pieces(self, entered: list[int]) -> list[Piece]:
        pieces, offset = [], 0
        for g, group in enumerate(self.groups):
            if entered[g]:
                pieces.append(Piece(group, group.cells[: entered[g]], offset))
                offset += entered[g] * group.rows
        return pieces

    def _block(self, layer: int, pieces: list[Piece]) -> None:
        """Run one block on the packed rows of all active cells."""
        groups = [g for g in range(len(self.groups)) if g in self.hidden]
        packed = torch.cat([self.hidden[g].flatten(0, 1) for g in groups])[None]
        kwargs = self._kwargs(layer, pieces)
        with ExitStack() as stack:
            stack.enter_context(hooks(self.model, *self._write_hooks(layer, pieces, packed)))
            stack.enter_context(self.model.instrument.handled_by(lambda call: self._attend(call, pieces)))
            out = self.model.bridge.blocks[layer](packed, **kwargs)
        rows = (out[0] if isinstance(out, tuple) else out)[0]
        for g, piece in zip(groups, pieces, strict=True):
            n = len(piece.cells) * piece.group.rows
            self.hidden[g] = rows[piece.offset : piece.offset + n].unflatten(0, (len(piece.cells), piece.group.rows))

    def _positions(self, pieces: list[Piece]) -> Tensor:
        parts = [
            torch.arange(p.group.start, len(p.group.run), device=self.model.device).repeat(len(p.cells)) for p in pieces
        ]
        return torch.cat(parts)

    def _kwargs(self, layer: int, pieces: list[Piece]) -> dict[str, Any]:
        """The block's keyword arguments for packed rows: per-position ones gathered, masks and caches dropped."""
        positions = self._positions(pieces)

        def gather(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(gather(v) for v in value)
            return value[:1, positions] if isinstance(value, Tensor) else value

        kwargs: dict[str, Any] = {}
        for name, value in self.frame.kwargs[layer].items():
            if name == "position_ids":
                kwargs[name] = positions[None]
            elif name.startswith("position_embeddings"):
                kwargs[name] = gather(value)
            elif name == "alibi" and isinstance(value, Tensor):  # [batch · heads, 1, keys]; blocks insist on having it
                kwargs[name] = value[: self.model.n_heads, :, positions]
            elif name == "use_cache":
                kwargs[name] = False
            else:
                kwargs[name] = None if name in DROPPED_KWARGS else value
        return kwargs

    def _write_hooks(self, layer: int, pieces: list[Piece], packed: Tensor) -> Iterator[tuple[str, Any]]:
        """Hooks that apply this layer's writes inside the block (all components but the residual inputs)."""
        at = {i: p.offset + n * p.group.rows - p.group.start for p in pieces for n, i in enumerate(p.cells)}
        for (where, component), writes in self.writes.items():
            if where != layer or component in ("resid_pre", "embed"):
                continue
            rows, heads, values = index_rows([(at[i] + w.start, w) for i, w in writes], packed.device)
            headed = writes[0][1].site.head is not None
            site = writes[0][1].site
            name = site.hook_name
            if component == "resid_mid":  # see naive._hooks_for: the residual itself, not the MLP branch
                name, values = f"blocks.{layer}.hook_attn_out", values - packed[0, rows]

            def put(
                x: Tensor, hook: Any, rows: Tensor = rows, heads: Tensor = heads, values: Tensor = values,
                headed: bool = headed,
            ) -> Tensor:  # fmt: skip
                changed = x.clone()
                if headed:
                    changed[0, rows, heads] = values.to(x.dtype)
                else:
                    changed[0, rows] = values.to(x.dtype)
                return changed

            yield name, put

    def _attend(self, packed: AttentionCall, pieces: list[Piece]) -> Tensor:
        """Attention of packed rows: each group's own suffix after the base run's shared prefix."""
        like = self.frame.calls[packed.layer]
        out = packed.q.new_empty(*packed.q.shape[:3], packed.v.shape[-1])
        for piece in pieces:
            cells, rows, start = len(piece.cells), piece.group.rows, piece.group.start
            span = slice(piece.offset, piece.offset + cells * rows)
            q, k, v = (
                x[0, :, span].unflatten(1, (cells, rows)).transpose(0, 1) for x in (packed.q, packed.k, packed.v)
            )
            if start:
                prefix = (piece.group.run.keys[packed.layer], piece.group.run.values[packed.layer])
                k, v = (
                    torch.cat([x[:, :start].expand(cells, -1, -1, -1), own], dim=2)
                    for x, own in zip(prefix, (k, v), strict=True)
                )
            bias = None if like.bias is None else like.bias[:1, ..., : k.shape[2]]  # per key: the same for every run
            call = replace(like, q=q, k=k, v=v, key_padding=None, bias=bias)
            result = attend(call, backend=self.model.instrument.backend)
            out[0, :, span] = result.out.transpose(0, 1).flatten(1, 2)
        return out


def final_logits(model: Model, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
    """Final norm and unembedding of some residual rows, with the scalings that some architectures apply after."""
    bridge, config = model.bridge, getattr(model.bridge.original_model, "config", None)
    logits = bridge.unembed(bridge.ln_final(rows[None]))[0]
    divide = getattr(config, "logits_scaling", None)  # Granite
    multiply = getattr(config, "logit_scale", None)  # Cohere
    cap = getattr(config, "final_logit_softcapping", None) or getattr(bridge.cfg, "output_logits_soft_cap", None)
    if isinstance(divide, int | float):
        logits = logits / divide
    if isinstance(multiply, int | float):
        logits = logits * multiply
    if isinstance(cap, int | float) and cap > 0:
        logits = cap * torch.tanh(logits / cap)
    return logits
