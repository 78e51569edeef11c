"""The fast path: a batch's cells run together, computing only what can change.

It is exact for causal decoders, for these reasons:

* Blocks before the first change see the base run's input: a cell enters at its first changed block.
* Under causal attention, positions before the first changed one never change: only rows from there on are
  computed, and their attention reads the base run's keys and values for the rest.
* In its first block, a change that comes after the keys and values (z, attn_out, mlp_out, q, an edit of attention)
  stays in its own rows: no other rows are computed there.
* Everything except attention acts on each token separately: rows of all cells are packed into one [1, rows, d]
  hidden state, so that short prompts still fill the matrix products.
* The metric reads some rows, mostly the last one alone: rows after the last one that is read are not computed, the
  last block computes everything but keys and values for rows from the first one that is read, and only rows that are
  read are unembedded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from interp.engine.cells import Cell
from interp.engine.final_logits import compute_final_logits
from interp.engine.matmul import choose_products, redirect_products
from interp.engine.packed_attention import EditsByRow, packed_attention
from interp.engine.packing import Changes, Group, Piece, lay_out, positions, unpack
from interp.engine.plain_blocks import PlainBlock, WriterOf, rotation
from interp.engine.runs import Frame, Run
from interp.model.attention_call import AttentionCall
from interp.model.hooks import hooks
from interp.model.layer_edits import LayerEdit
from interp.model.layer_masks import LayerMask
from interp.model.model import Model
from interp.sites import COMPONENTS

ROWWISE_KWARGS = ("position_embeddings", "position_ids", "alibi")
DROPPED_KWARGS = (
    "attention_mask", "past_key_values", "layer_past", "use_cache", "cache_position", "encoder_attention_mask",
    "position_bias",  # a linear bias: the recorded calls hold it, per key
)  # fmt: skip
MIXERS = (torch.nn.Conv1d, torch.nn.RNNBase)  # modules of state-space branches and the like


def find_other_mixer(model: Model, layer: int) -> str | None:
    """Class name of a module besides softmax attention that mixes positions.

    Returns None if the block has none.
    """
    return next((type(m).__name__ for m in model.bridge.blocks[layer].modules() if isinstance(m, MIXERS)), None)


def why_not_packed(model: Model, frame: Frame) -> str | None:
    """Why this model's blocks cannot be run packed; None if they can."""
    if len(model.attention_layers) < model.n_layers:
        return "layers without softmax attention mix positions in ways of their own"
    for layer in range(model.n_layers):
        if (other := find_other_mixer(model, layer)) is not None:
            return f"block {layer} mixes positions beside attention, by a {other}"
    for layer, call in frame.calls.items():
        if not call.causal:
            return f"layer {layer} is not causal (bidirectional, or behind a custom mask)"
        if call.bias is not None and call.bias.shape[-2] != 1:
            return f"layer {layer} adds a bias that depends on the query's position"
    if frame.positions_differ:
        return "rotary positions differ between prompts, with their length or with where and how large their images are"
    if len(frame.calls) < model.n_layers or len(frame.kwargs) < model.n_layers:
        return "not every layer was seen by the recorder"
    for layer, kwargs in enumerate(frame.kwargs):
        for name, value in kwargs.items():
            is_handled = name.startswith(ROWWISE_KWARGS) or name in DROPPED_KWARGS
            if not is_handled and isinstance(value, Tensor | tuple | list | dict):
                return f"block {layer} takes {name!r}, which the packed path does not know how to slice"
    if not hasattr(model.bridge, "ln_final") or not hasattr(model.bridge, "unembed"):
        return "the model has no final norm and unembedding under their TransformerLens names"
    return None


class StopForward(Exception):
    """Raised to leave a block once everything needed has been computed."""


class PackedForward:
    """One batch of cells, run block by block.

    With ``plain_blocks``, these run instead of the model's own blocks.
    """

    def __init__(
        self,
        model: Model,
        runs: Sequence[Run],
        cells: Sequence[Cell],
        frame: Frame,
        plain_blocks: Sequence[PlainBlock] | None = None,
    ):
        self.model, self.cells, self.frame, self.plain_blocks = model, cells, frame, plain_blocks
        self.table: tuple[Tensor, Tensor] | None = None  # the cosines of the frame, and the rotary table made of them
        self.rotated: tuple[list[Piece], Tensor] | None = None  # pieces, and the rotary table of their rows
        # plain blocks take rows padded to a suitable number; the model's own blocks take the rows as they are
        self.layout = int if plain_blocks is None else choose_products(model.dtype, model.device).rows
        self.changes = Changes(cells)
        groups: dict[tuple[int, int], Group] = {}
        for i in sorted(range(len(cells)), key=lambda i: cells[i].first_layer):
            run = runs[cells[i].run]
            start = min(cells[i].first_row, run.read_rows[-1])
            groups.setdefault((cells[i].run, start), Group(run, start)).waiting.append(i)
        self.groups = list(groups.values())

    def logits(
        self, columns: Int[Tensor, "cells k"] | None = None, done: Callable[[float], None] | None = None
    ) -> Float[Tensor, "cells vocab"]:
        """Compute the logits of every cell's last row, or of its run's rows that are read, cell after cell.

        With ``columns``, only the logits of these token ids [cells, k] are computed. ``done`` is called before each
        layer with the share of the layers that are finished.
        """
        n = self.model.n_layers
        for layer in range(n):
            if done is not None:
                done(layer / n)
            pieces = self._enter(layer)
            if pieces and layer < n - 1:
                self._block(layer, pieces)
            elif pieces:
                self._last_block(layer, pieces)
        for group in self.groups:  # cells that change only the last block's output
            if group.waiting:
                last = group.run.resid[n][group.first_read : group.stop]
                group.admit(group.waiting, last.expand(len(group.waiting), -1, -1))
        final = [Piece(g, g.active, g.first_read, g.stop, g.parts) for g in self.groups]
        rows = lay_out(final)
        self._write_residual(n, final, rows)
        if any(g.run.read is not None for g in self.groups):
            return self._read_logits(final, rows, columns)
        order = torch.argsort(torch.tensor([i for piece in final for i in piece.cells], device=rows.device))
        return compute_final_logits(self.model, rows[order], columns)

    def _read_logits(self, final: list[Piece], rows: Tensor, columns: Tensor | None) -> Float[Tensor, "reads vocab"]:
        """Compute the logits of the rows that are read; those that a cell cannot change are the base run's."""
        n, piece_of_cell = self.model.n_layers, {i: (p, k) for p in final for k, i in enumerate(p.cells)}
        base: list[Tensor] = []
        changed: list[int] = []  # numbers among all logits
        computed: list[int] = []  # packed rows
        owners: list[int] = []  # cells
        n_read = 0
        for i, cell in enumerate(self.cells):
            piece, k = piece_of_cell[i]
            run = piece.group.run
            of_run = run.logits.view(-1, run.logits.shape[-1])
            base.append(of_run if columns is None else of_run[:, columns[i]])
            for number, row in enumerate(run.read_rows):
                if cell.reaches(row, n, len(run)):
                    changed.append(n_read + number)
                    computed.append(piece.offset + k * piece.rows + row - piece.start)
                    owners.append(i)
            n_read += len(run.read_rows)
        logits = torch.cat(base)
        if changed:
            of_cells = None if columns is None else columns[owners]
            logits[changed] = compute_final_logits(self.model, rows[computed], of_cells).to(logits.dtype)
        return logits

    # ------------------------------------------------------------ which rows

    def _enter(self, layer: int) -> list[Piece]:
        """The pieces that go through a block.

        These are pieces of earlier blocks, and the cells whose first block it is.
        """
        pieces = []
        for group in self.groups:
            n, resid = group.stop, group.run.resid[layer]
            edits = self._edits_of_run(layer, group.run)
            counts_keys = any(isinstance(e, LayerEdit) and e.counts_keys for e in edits)
            narrow: dict[int, list[int]] = {}
            while group.waiting and self.cells[group.waiting[0]].first_layer <= layer:
                i = group.waiting.pop(0)
                stop = n if counts_keys else min(n, self.cells[i].entry_stop(len(group.run)))
                narrow.setdefault(stop, []).append(i)
            wide = narrow.pop(n, [])
            if wide:
                group.admit(wide, resid[group.start : n].expand(len(wide), -1, -1))
            if group.parts:
                pieces.append(Piece(group, group.active, group.start, n, group.parts))
            for stop, cells in narrow.items():
                fresh = resid[group.start : stop].expand(len(cells), -1, -1)
                pieces.append(Piece(group, cells, group.start, stop, [fresh], narrow=True))
        return pieces

    def _write_residual(self, layer: int, pieces: Sequence[Piece], packed: Tensor) -> None:
        rows = self.changes.rows(layer, "resid_pre", pieces, packed.device)
        if rows is not None:
            rows.put_(packed, headed=False)

    # ------------------------------------------------------------ one block

    def _block(self, layer: int, pieces: list[Piece], since: Callable[[Group], int] | None = None) -> None:
        """Run one block on the packed rows of all cells that have entered.

        ``since``: the first row of a group that goes on; default its first row.
        """
        packed = lay_out(pieces, self.layout)
        self._write_residual(layer, pieces, packed)
        if self.plain_blocks is None:
            packed = self.run_block(layer, pieces, packed, lambda call: self.attend(call, pieces))
        else:
            rows = self._writer_of(layer, pieces, packed.device)
            q, k, v = self.plain_blocks[layer].project(packed, "qkv", self.rotation(layer, pieces), rows)
            self.plain_blocks[layer].finish(packed, self.attention(layer, q, k, v, pieces, pieces), rows)
        unpack(packed, pieces)
        for piece in pieces:
            if piece.narrow:  # from the next block on with all rows: those not computed are the base run's
                group = piece.group
                first = group.start if since is None else since(group)
                whole = group.run.resid[layer + 1][first : group.stop].repeat(len(piece.cells), 1, 1)
                whole[:, : piece.stop - first] = piece.parts[0][:, first - piece.start :]
                group.admit(piece.cells, whole)

    def _last_block(self, layer: int, pieces: list[Piece]) -> None:
        """Run the last block, with everything but keys and values for the rows that are read only."""
        unpack(packed := lay_out(pieces), pieces)
        self._write_residual(layer, pieces, packed)
        wide = [p for p in pieces if not p.narrow]
        if wide:
            last = [p.read_rows() for p in wide]
            compute = self._last_rows if self.plain_blocks is None else self._plain_last_rows
            rows = compute(layer, wide, last)
            for piece in last:
                piece.group.parts = [piece.by_cell(rows)]
        narrow = [p for p in pieces if p.narrow]
        if read := [p for p in narrow if p.group.first_read < p.stop]:
            self._block(layer, read, lambda group: group.first_read)
        for piece in narrow:
            if piece.group.first_read >= piece.stop:  # its changed rows are not read by anything later
                base = piece.group.run.resid[layer + 1][piece.group.first_read : piece.group.stop]
                piece.group.admit(piece.cells, base.expand(len(piece.cells), -1, -1))

    def _last_rows(self, layer: int, wide: list[Piece], last: list[Piece]) -> Tensor:
        """Compute the block's output in each cell's rows that are read, by the model's own block."""
        kv: dict[str, Tensor] = {}

        def keep(call: AttentionCall) -> Tensor:
            kv.update(k=rows_first(call.k), v=rows_first(call.v))
            raise StopForward

        with suppress(StopForward):
            self.run_block(layer, wide, lay_out(wide), keep)

        def handler(call: AttentionCall) -> Tensor:
            return heads_first(self.attention(layer, rows_first(call.q), kv["k"], kv["v"], last, wide))

        return self.run_block(layer, last, lay_out(last), handler)

    def _plain_last_rows(self, layer: int, wide: list[Piece], last: list[Piece]) -> Tensor:
        """Compute the block's output in the rows of every cell that are read, by a plain block."""
        assert self.plain_blocks is not None
        block, packed = self.plain_blocks[layer], lay_out(wide, self.layout)
        rows = self._writer_of(layer, wide, packed.device)
        k, v = block.project(packed, "kv", self.rotation(layer, wide), rows)
        packed = lay_out(last, self.layout)
        rows = self._writer_of(layer, last, packed.device)
        (q,) = block.project(packed, "q", self.rotation(layer, last), rows)
        block.finish(packed, self.attention(layer, q, k, v, last, wide), rows)
        return packed

    def _writer_of(self, layer: int, pieces: list[Piece], device: torch.device) -> WriterOf:
        return lambda component: self.changes.rows(layer, component, pieces, device)

    def rotation(self, layer: int, pieces: list[Piece]) -> Float[Tensor, "rows 2 d_head"]:
        """Rotary tables of all rows, padding included."""
        cos, sin = self.frame.kwargs[layer]["position_embeddings"]
        if self.table is None or self.table[0] is not cos:  # layers share their tables
            self.table = cos, rotation(cos, sin)
            self.rotated = None
        if self.rotated is None or self.rotated[0] is not pieces:
            row_positions = positions(pieces, self.model.device)
            row_positions = F.pad(row_positions, (0, self.layout(len(row_positions)) - len(row_positions)))
            self.rotated = pieces, self.table[1].index_select(0, row_positions)
        return self.rotated[1]

    def run_block(
        self, layer: int, pieces: list[Piece], packed: Tensor, handler: Callable[[AttentionCall], Tensor]
    ) -> Tensor:
        """Run the model's own block, including its hooks, on packed rows [rows, d_model]."""
        packed = packed[None]
        kwargs = self._kwargs(layer, pieces)
        with ExitStack() as stack:
            stack.enter_context(hooks(self.model, *self._write_hooks(layer, pieces, packed)))
            stack.enter_context(self.model.instrument.handled_by(handler, packed=True))
            stack.enter_context(redirect_products(packed.dtype, packed.device))
            out = self.model.bridge.blocks[layer](packed, **kwargs)
        return (out[0] if isinstance(out, tuple) else out)[0]

    def _kwargs(self, layer: int, pieces: list[Piece]) -> dict[str, Any]:
        """The block's keyword arguments for packed rows.

        Per-position tensors are gathered, masks and caches dropped.
        """
        row_positions = positions(pieces, self.model.device)

        def gather(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(gather(v) for v in value)
            return value[:1, row_positions] if isinstance(value, Tensor) else value

        kwargs: dict[str, Any] = {}
        for name, value in self.frame.kwargs[layer].items():
            if name == "position_ids":
                kwargs[name] = row_positions[None]
            elif name.startswith("position_embeddings"):
                kwargs[name] = gather(value)
            elif name == "alibi" and isinstance(value, Tensor):  # [batch · heads, 1, keys]; blocks require it
                kwargs[name] = value[: self.model.n_heads, :, row_positions]
            elif name == "use_cache":
                kwargs[name] = False
            else:
                kwargs[name] = None if name in DROPPED_KWARGS else value
        return kwargs

    def _write_hooks(self, layer: int, pieces: list[Piece], packed: Tensor) -> Iterator[tuple[str, Any]]:
        """Hooks that apply this layer's writes inside the block.

        These are the writes to all components except the residual inputs.
        """
        # resid_mid last, since it replaces the output of attention
        for component in sorted(self.changes.components(layer), key=lambda c: c == "resid_mid"):
            rows = self.changes.rows(layer, component, pieces, packed.device)
            if rows is None:
                continue
            spec = COMPONENTS[component]
            name = spec.hook.format(layer=layer)
            if component == "resid_mid":  # see naive._write_hooks: the residual itself, not the MLP branch
                name = f"blocks.{layer}.hook_attn_out"
                assert rows.value is not None  # means are of heads
                relative = rows.value - packed[0, rows.at]
                rows.value = relative if rows.add is None else torch.where(rows.add, rows.value, relative)
            yield name, lambda x, hook, rows=rows, headed=spec.heads is not None: rows.put(x, headed)

    def attend(self, call: AttentionCall, pieces: list[Piece]) -> Tensor:
        """Compute `attention` as the handler of the model's own blocks."""
        q, k, v = (rows_first(x) for x in (call.q, call.k, call.v))
        return heads_first(self.attention(call.layer, q, k, v, pieces, pieces))

    def attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, queries: list[Piece], keys: list[Piece]
    ) -> Float[Tensor, "rows heads d_value"]:
        """Compute attention of packed rows, each after its base run's shared prefix."""
        like, instrument = self.frame.calls[layer], self.model.instrument
        return packed_attention(like, instrument, q, k, v, queries, keys, lambda piece: self._edits(layer, piece))

    def _edits(self, layer: int, piece: Piece) -> EditsByRow:
        """The edits of a piece's cells in a layer; empty if there are none."""
        by_number, base = self.changes.edits.get(layer, {}), self._edits_of_run(layer, piece.group.run)
        edits = tuple((*base, *by_number.get(i, ())) for i in piece.cells)
        return edits if any(edits) else ()

    def _edits_of_run(self, layer: int, run: Run) -> tuple[LayerEdit | LayerMask, ...]:
        """The edits and masks of `Model.edited` in a base run."""
        edited = self.model.instrument.edited
        return () if edited is None else edited.of_prompt(run.ids).get(layer, ())


def rows_first(x: Tensor) -> Tensor:
    """Rearrange [1, heads, rows, d] to [rows, heads, d]."""
    return x[0].transpose(0, 1)


def heads_first(x: Tensor) -> Tensor:
    """Rearrange [rows, heads, d] to [1, heads, rows, d]."""
    return x.transpose(0, 1)[None]
