"""The layout of a batch's cells in one packed hidden state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.engine.cells import Cell, CellWrite
from interp.engine.runs import Run
from interp.model.layer_edits import LayerEdit
from interp.model.layer_masks import LayerMask


@dataclass
class Group:
    """Cells of one run whose first changed position is the same.

    They share the prefix keys and values of the run. ``parts``, each [cells, rows from ``start``, d_model], hold the
    rows of the cells that have entered, in the order of ``active``. A part may be a view of a base run: `lay_out` makes
    a copy, and only that copy is ever written to. Only rows before ``stop`` are computed: none after it is read.
    """

    run: Run
    start: int
    waiting: list[int] = field(default_factory=list)  # numbers within the batch, in order of entry
    active: list[int] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)

    @property
    def stop(self) -> int:
        """The row after the last one that is read."""
        return self.run.read_rows[-1] + 1

    @property
    def first_read(self) -> int:
        """The first row that is computed and read."""
        return next(row for row in self.run.read_rows if row >= self.start)

    def admit(self, cells: list[int], hidden: Tensor) -> None:
        """Let cells enter, with their hidden rows."""
        self.active += cells
        self.parts.append(hidden)


@dataclass
class Piece:
    """Rows [start, stop) of some cells of one group.

    They are stored in the packed state from ``offset`` on. ``narrow``: this is the cells' first block, in which only
    these rows change; the other rows are the base run's.
    """

    group: Group
    cells: list[int]
    start: int
    stop: int
    parts: list[Tensor]  # each [some of the cells, rows, d_model], in the order of ``cells``
    narrow: bool = False
    offset: int = 0

    @property
    def rows(self) -> int:
        """Number of rows of each cell."""
        return self.stop - self.start

    @property
    def span(self) -> slice:
        """The piece's packed rows."""
        return slice(self.offset, self.offset + len(self.cells) * self.rows)

    def by_cell(self, packed: Tensor) -> Tensor:
        """View the piece's rows of ``packed`` [packed rows, ...] as [cells, rows, ...]."""
        return packed[self.span].unflatten(0, (len(self.cells), self.rows))

    def read_rows(self) -> Piece:
        """The piece of the same cells with only their rows from the first one that is read."""
        first = self.group.first_read
        return Piece(self.group, self.cells, first, self.stop, [part[:, first - self.start :] for part in self.parts])


def lay_out(pieces: Sequence[Piece], layout: Callable[[int], int] = int) -> Float[Tensor, "rows d_model"]:
    """Set the pieces' offsets and return the packed hidden state.

    It is a copy that may be written to. ``layout``: maps the number of rows to the number to allocate; additional rows
    are zero and belong to no piece.
    """
    like = pieces[0].parts[0]
    used = sum(len(p.cells) * p.rows for p in pieces)
    packed = like.new_empty(layout(used), like.shape[-1])
    packed[used:] = 0
    offset = 0
    for piece in pieces:
        piece.offset = offset
        for part in piece.parts:
            stop = offset + part.shape[0] * part.shape[1]
            packed[offset:stop].view(part.shape).copy_(part)
            offset = stop
    return packed


def unpack(packed: Tensor, pieces: Sequence[Piece]) -> None:
    """Give every piece its rows of ``packed``, as a view."""
    for piece in pieces:
        piece.parts = [piece.by_cell(packed)]
        if not piece.narrow:
            piece.group.parts = piece.parts


def positions(pieces: Sequence[Piece], device: torch.device) -> Int[Tensor, " rows"]:
    """The position of every packed row in its prompt."""
    return torch.cat([torch.arange(p.start, p.stop, device=device).repeat(len(p.cells)) for p in pieces])


@dataclass(frozen=True)
class HeadMean:
    """A write that sets a head to the mean of ``others``, in packed rows."""

    rows: range
    head: int
    others: tuple[int, ...]


@dataclass
class RowWrites:
    """Writes expressed as rows of a packed state."""

    at: Int[Tensor, " R"]  # numbers of the rows
    head: Int[Tensor, " R"]
    value: Tensor | None  # [R, width]; None if R is 0
    add: Tensor | None  # bool [R, 1]; None if all are set
    means: Sequence[HeadMean] = ()

    def put(self, x: Tensor, headed: bool) -> Tensor:
        """Return a copy of x [1, rows, (heads,) width] with the writes applied.

        Neurons are heads of width 1.
        """
        changed = x.clone()
        self.put_(changed[0, ..., None] if headed and x.ndim == 3 else changed[0], headed)
        return changed

    def put_(self, x: Tensor, headed: bool) -> None:
        """Apply the writes in place to x [rows, (heads,) width]."""
        if self.value is not None:
            index = (self.at, self.head) if headed else (self.at,)
            value = self.value.to(x.dtype)
            x[index] = value if self.add is None else torch.where(self.add, x[index] + value, value)
        if self.means:
            self._put_means_(x)

    def _put_means_(self, x: Float[Tensor, "rows heads width"]) -> None:
        """Set heads to means of others, which no mean of the same row changes."""
        n = sum(len(m.rows) for m in self.means)
        share = torch.zeros(n, x.shape[1], dtype=x.dtype)
        first = 0
        for m in self.means:
            share[first : first + len(m.rows), list(m.others)] = 1 / len(m.others)
            first += len(m.rows)
        at = torch.tensor([row for m in self.means for row in m.rows], device=x.device)
        head = torch.tensor([m.head for m in self.means for _ in m.rows], device=x.device)
        x[at, head] = (share.to(x.device)[:, None] @ x[at])[:, 0]


class Changes:
    """All writes and edits of a batch, by the block and component on which they act."""

    def __init__(self, cells: Sequence[Cell]):
        self.writes: dict[tuple[int, str], list[tuple[int, CellWrite]]] = defaultdict(list)
        self.edits: dict[int, dict[int, tuple[LayerEdit | LayerMask, ...]]] = defaultdict(dict)
        for i, cell in enumerate(cells):
            for write in cell.writes:
                layer, component = write.site.layer or 0, write.site.component
                if component == "resid_post":  # the same activation as the next block's resid_pre
                    layer, component = layer + 1, "resid_pre"
                self.writes[layer, component].append((i, write))
            for edit in cell.edits:
                self.edits[edit.layer][i] = (*self.edits[edit.layer].get(i, ()), edit)

    def components(self, layer: int) -> list[str]:
        """Components written inside a block."""
        return [c for at, c in self.writes if at == layer and c not in ("resid_pre", "embed")]

    def rows(self, layer: int, component: str, pieces: Iterable[Piece], device: torch.device) -> RowWrites | None:
        """The writes of one component to the pieces' rows; None if there are none."""
        writes = self.writes.get((layer, component))
        if not writes:
            return None
        piece_of_cell = {i: (piece, n) for piece in pieces for n, i in enumerate(piece.cells)}
        at: list[int] = []
        heads: list[int] = []
        add: list[bool] = []
        values: list[Tensor] = []
        means: list[HeadMean] = []
        for i, write in writes:
            if i not in piece_of_cell:
                continue
            piece, n = piece_of_cell[i]
            low, high = max(write.start, piece.start), min(write.stop, piece.stop)
            if low >= high:
                continue
            first = piece.offset + n * piece.rows - piece.start
            if write.how == "mean":
                means.append(HeadMean(range(first + low, first + high), write.site.head or 0, write.others))
                continue
            assert write.value is not None  # the cell is being run
            at += range(first + low, first + high)
            heads += [write.site.head or 0] * (high - low)
            add += [write.how == "add"] * (high - low)
            value = write.value.expand(write.stop - write.start, -1)
            values.append(value[low - write.start : high - write.start])
        if not at and not means:
            return None
        is_added = torch.tensor(add, device=device)[:, None] if any(add) else None
        widths = {v.shape[-1] for v in values}
        if len(widths) > 1:  # zero ablation writes one scalar to the whole width
            values = [v.expand(-1, max(widths)) for v in values]
        rows, head = (torch.tensor(x, device=device) for x in (at, heads))
        return RowWrites(rows, head, torch.cat(values) if values else None, is_added, means)
