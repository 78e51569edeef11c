"""The fast path: all cells of a batch advance through the blocks together, re-running only what can change.

Exact for causal decoders, by these facts:

* blocks before the first change see the base run's input: a cell enters at its first changed block;
* under causal attention positions before the first changed one never change: only rows from there on are
  computed, and their attention reads the base run's keys and values for the rest;
* in its first block a change that comes after the keys and values (z, attn_out, mlp_out, q, a cut) stays in its
  own rows: no others are computed there;
* everything but attention acts on tokens one by one: rows of all cells are packed into one [1, rows, d]
  hidden state, so that short prompts still fill the matrix products;
* the metric reads the last position: the last block computes keys and values for all rows, and the rest for
  that row alone, which alone meets the unembedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import headstats
import torch
from jaxtyping import Float
from torch import Tensor

from interp.dense import AttentionCall
from interp.engine.cells import Cell, cut_table
from interp.engine.pieces import Changes, Group, Piece, place, positions
from interp.engine.runs import Frame, Run, hooks
from interp.instrument import attend
from interp.model import Model
from interp.sites import COMPONENTS

ROWWISE_KWARGS = ("position_embeddings", "position_ids", "alibi")
DROPPED_KWARGS = (
    "attention_mask", "past_key_values", "layer_past", "use_cache", "cache_position", "encoder_attention_mask",
    "position_bias",  # a linear bias: the recorded calls hold it, per key
)  # fmt: skip
SHARED_KEYS = 2048  # prefix keys × cells from which reading the prefix once beats writing it out for every cell


def unsupported(model: Model, frame: Frame) -> str | None:
    """Why this model's blocks cannot be run packed, or None."""
    if len(model.attention_layers) < model.n_layers:
        return "layers without softmax attention mix positions in ways of their own"
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


class Enough(Exception):
    """Leaves a block once its keys and values are known."""


class PackedForward:
    """One batch of cells, advanced block by block."""

    def __init__(self, model: Model, runs: Sequence[Run], cells: Sequence[Cell], frame: Frame):
        self.model, self.cells, self.frame = model, cells, frame
        self.changes = Changes(cells)
        groups: dict[tuple[int, int], Group] = {}
        for i in sorted(range(len(cells)), key=lambda i: cells[i].first_layer):
            key = (cells[i].run, cells[i].first_row)
            groups.setdefault(key, Group(runs[cells[i].run], cells[i].first_row)).waiting.append(i)
        self.groups = list(groups.values())

    def logits(self) -> Float[Tensor, "cells vocab"]:
        """Last-position logits of every cell, in the order of ``cells``."""
        n = self.model.n_layers
        for layer in range(n):
            pieces = self._enter(layer)
            if pieces and layer < n - 1:
                self._block(layer, pieces)
            elif pieces:
                self._last_block(layer, pieces)
        for group in self.groups:  # what changes the last block's output alone
            if group.waiting:
                group.admit(group.waiting, group.run.resid[n][-1:].expand(len(group.waiting), -1, -1))
        final = [Piece(g, g.active, len(g.run) - 1, len(g.run), hidden(g)) for g in self.groups]
        self._write_residual(n, final)
        logits = final_logits(self.model, torch.cat([p.hidden[:, -1] for p in final]))
        order = torch.tensor([i for piece in final for i in piece.cells], device=logits.device)
        return logits[torch.argsort(order)]

    # ------------------------------------------------------------ which rows

    def _enter(self, layer: int) -> list[Piece]:
        """The pieces that go through a block: those that are in already, and the cells whose first block it is."""
        pieces = []
        for group in self.groups:
            n, resid = len(group.run), group.run.resid[layer]
            narrow: dict[int, list[int]] = {}
            while group.waiting and self.cells[group.waiting[0]].first_layer <= layer:
                i = group.waiting.pop(0)
                narrow.setdefault(self.cells[i].entry_stop(n), []).append(i)
            wide = narrow.pop(n, [])
            if wide:
                group.admit(wide, resid[group.start :].expand(len(wide), -1, -1))
            if group.hidden is not None:
                pieces.append(Piece(group, group.active, group.start, n, group.hidden))
            for stop, cells in narrow.items():
                fresh = resid[group.start : stop].expand(len(cells), -1, -1)
                pieces.append(Piece(group, cells, group.start, stop, fresh, narrow=True))
        self._write_residual(layer, pieces)
        return pieces

    def _write_residual(self, layer: int, pieces: list[Piece]) -> None:
        if not self.changes.writes.get((layer, "resid_pre")):
            return
        packed = place(pieces)
        rows = self.changes.rows(layer, "resid_pre", pieces, packed.device)
        if rows is not None:
            self._unpack(rows.put(packed, headed=False)[0], pieces)

    def _unpack(self, packed: Tensor, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            piece.hidden = packed[piece.span].unflatten(0, (len(piece.cells), piece.rows))
            if not piece.narrow:
                piece.group.hidden = piece.hidden

    # ------------------------------------------------------------ one block

    def _block(self, layer: int, pieces: list[Piece]) -> None:
        """Runs one block on the packed rows of all cells that are in."""
        self._unpack(self.run_block(layer, pieces, lambda call: self.attend(call, pieces)), pieces)
        for piece in pieces:
            if piece.narrow:  # from the next block on with all its rows: the others are the base run's
                group = piece.group
                whole = group.run.resid[layer + 1][group.start :].repeat(len(piece.cells), 1, 1)
                whole[:, : piece.rows] = piece.hidden
                group.admit(piece.cells, whole)

    def _last_block(self, layer: int, pieces: list[Piece]) -> None:
        """The same, but only keys and values are computed for all rows, and the rest for the last one."""
        wide = [p for p in pieces if not p.narrow]
        keys = self._keys_and_values(layer, wide) if any(p.rows > 1 for p in wide) else None
        last = [p.last_rows() for p in wide]
        if last:
            rows = self.run_block(layer, last, lambda call: self.attend(call, last, keys))
            for piece in last:
                piece.group.hidden = rows[piece.span][:, None]
        for piece in pieces:
            if piece.narrow:  # rows that nothing reads any more
                base = piece.group.run.resid[layer + 1][-1:]
                piece.group.admit(piece.cells, base.expand(len(piece.cells), -1, -1))

    def _keys_and_values(self, layer: int, pieces: list[Piece]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of every piece, by a run of the block that ends where attention begins."""
        found: list[tuple[Tensor, Tensor]] = []

        def keep(call: AttentionCall) -> Tensor:
            found.extend((by_cell(call.k, p), by_cell(call.v, p)) for p in pieces)
            raise Enough

        with suppress(Enough):
            self.run_block(layer, pieces, keep)
        return found

    def run_block(self, layer: int, pieces: list[Piece], handler: Callable[[AttentionCall], Tensor]) -> Tensor:
        """The block's output for packed rows [rows, d_model]."""
        packed = place(pieces)
        kwargs = self._kwargs(layer, pieces)
        with ExitStack() as stack:
            stack.enter_context(hooks(self.model, *self._write_hooks(layer, pieces, packed)))
            stack.enter_context(self.model.instrument.handled_by(handler))
            out = self.model.bridge.blocks[layer](packed, **kwargs)
        return (out[0] if isinstance(out, tuple) else out)[0]

    def _kwargs(self, layer: int, pieces: list[Piece]) -> dict[str, Any]:
        """The block's keyword arguments for packed rows: per-position ones gathered, masks and caches dropped."""
        where = positions(pieces, self.model.device)

        def gather(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(gather(v) for v in value)
            return value[:1, where] if isinstance(value, Tensor) else value

        kwargs: dict[str, Any] = {}
        for name, value in self.frame.kwargs[layer].items():
            if name == "position_ids":
                kwargs[name] = where[None]
            elif name.startswith("position_embeddings"):
                kwargs[name] = gather(value)
            elif name == "alibi" and isinstance(value, Tensor):  # [batch · heads, 1, keys]; blocks insist on having it
                kwargs[name] = value[: self.model.n_heads, :, where]
            elif name == "use_cache":
                kwargs[name] = False
            else:
                kwargs[name] = None if name in DROPPED_KWARGS else value
        return kwargs

    def _write_hooks(self, layer: int, pieces: list[Piece], packed: Tensor) -> Iterator[tuple[str, Any]]:
        """Hooks that apply this layer's writes inside the block (all components but the residual inputs)."""
        for component in self.changes.components(layer):
            rows = self.changes.rows(layer, component, pieces, packed.device)
            if rows is None:
                continue
            spec = COMPONENTS[component]
            name = spec.hook.format(layer=layer)
            if component == "resid_mid":  # see naive._hooks_for: the residual itself, not the MLP branch
                name = f"blocks.{layer}.hook_attn_out"
                rows.value = torch.where(rows.add, rows.value, rows.value - packed[0, rows.at])
            yield name, lambda x, hook, rows=rows, headed=spec.heads is not None: rows.put(x, headed)

    def attend(
        self, packed: AttentionCall, pieces: list[Piece], keys: list[tuple[Tensor, Tensor]] | None = None
    ) -> Tensor:
        """Attention of packed rows: each group's own rows after the base run's shared prefix.

        keys: each piece's own keys and values, where they have more rows than its queries.
        """
        like, layer = self.frame.calls[packed.layer], packed.layer
        out = packed.q.new_empty(*packed.q.shape[:3], packed.v.shape[-1])
        for n, piece in enumerate(pieces):
            k, v = (by_cell(packed.k, piece), by_cell(packed.v, piece)) if keys is None else keys[n]
            start, run = piece.group.start, piece.group.run
            more = self._cuts(layer, piece)
            if start:
                prefix = tuple(x[layer][None, :, :start] for x in (run.keys, run.values))
                if start * len(piece.cells) >= SHARED_KEYS:
                    more["prefix"] = prefix
                else:
                    k, v = (
                        torch.cat([x.expand(len(piece.cells), -1, -1, -1), own], dim=2)
                        for x, own in zip(prefix, (k, v), strict=True)
                    )
            bias = None if like.bias is None else like.bias[:1, ..., : piece.stop]  # per key: the same for every run
            call = replace(like, q=by_cell(packed.q, piece), k=k, v=v, key_padding=None, bias=bias)
            result = attend(call, backend=self.model.instrument.backend, **more)
            out[0, :, piece.span] = result.out.transpose(0, 1).flatten(1, 2)
        return out

    def _cuts(self, layer: int, piece: Piece) -> dict[str, Any]:
        """The piece's cuts in a layer as arguments of headstats."""
        by_number = self.changes.cuts.get(layer, {})
        cuts = [by_number.get(i, []) for i in piece.cells]
        if not any(cuts):
            return {}
        table = cut_table(cuts, self.model.n_heads, (piece.start, piece.stop), piece.stop)
        moved = {name: x.to(self.model.device) for name, x in table.items()}
        return {"edit": headstats.Edit(knockout=moved.pop("knockout")), **moved}


def by_cell(x: Tensor, piece: Piece) -> Tensor:
    """A piece's part of [1, heads, packed rows, d] as [cells, heads, rows, d]."""
    return x[0, :, piece.span].unflatten(1, (len(piece.cells), piece.rows)).transpose(0, 1)


def hidden(group: Group) -> Tensor:
    """The last rows of all the group's cells."""
    assert group.hidden is not None  # every group has a cell
    return group.hidden


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
