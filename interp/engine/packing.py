"""How the cells of a batch lie in one packed hidden state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.engine.cells import Cell, Cut, Write
from interp.engine.runs import Run


@dataclass
class Group:
    """Cells of one run that start at one position: they share the base run's prefix keys and values.

    ``parts``, each [cells, rows from ``start``, d_model], hold the rows of those that have entered, in the order of
    ``active``. A part may be a view of a base run: `lay_out` copies, and only its copy is ever written to.
    """

    run: Run
    start: int
    waiting: list[int] = field(default_factory=list)  # numbers within the batch, in order of entry
    active: list[int] = field(default_factory=list)
    parts: list[Tensor] = field(default_factory=list)

    def admit(self, cells: list[int], hidden: Tensor) -> None:
        """Takes cells in, with their hidden rows."""
        self.active += cells
        self.parts.append(hidden)


@dataclass
class Piece:
    """Rows [start, stop) of some cells of one group, as they stand in the packed hidden state from ``offset`` on.

    ``narrow``: the cells' first block, in which only these rows change; the rest is the base run's.
    """

    group: Group
    cells: list[int]
    start: int
    stop: int
    parts: list[Tensor]  # [some of the cells, rows, d_model], one after the other
    narrow: bool = False
    offset: int = 0

    @property
    def rows(self) -> int:
        """Rows of each cell."""
        return self.stop - self.start

    @property
    def span(self) -> slice:
        """Where the piece stands among packed rows."""
        return slice(self.offset, self.offset + len(self.cells) * self.rows)

    def by_cell(self, packed: Tensor) -> Tensor:
        """The piece's part of [packed rows, ...] as [cells, rows, ...]."""
        return packed[self.span].unflatten(0, (len(self.cells), self.rows))

    def last_rows(self) -> Piece:
        """The same cells' last rows alone."""
        return Piece(self.group, self.cells, self.stop - 1, self.stop, [part[:, -1:] for part in self.parts])


def lay_out(pieces: Sequence[Piece], layout: Callable[[int], int] = int) -> Float[Tensor, "rows d_model"]:
    """Sets the offsets and returns the packed hidden state, a copy that may be written to.

    ``layout``: how many rows to lay out for so many; those beyond are zero and belong to no piece.
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
    """Hands every piece its rows, as a view."""
    for piece in pieces:
        piece.parts = [piece.by_cell(packed)]
        if not piece.narrow:
            piece.group.parts = piece.parts


def positions(pieces: Sequence[Piece], device: torch.device) -> Int[Tensor, " rows"]:
    """Position in its prompt of every packed row."""
    return torch.cat([torch.arange(p.start, p.stop, device=device).repeat(len(p.cells)) for p in pieces])


@dataclass
class RowWrites:
    """Some writes as rows of a packed state: what to put where."""

    at: Int[Tensor, " R"]
    head: Int[Tensor, " R"]
    value: Tensor  # [R, width]
    add: Tensor | None  # bool [R, 1]; None if all are set

    def put(self, x: Tensor, headed: bool) -> Tensor:
        """A copy of x [1, rows, (heads,) width] with the writes applied; neurons are heads that are one number wide."""
        changed = x.clone()
        self.put_(changed[0, ..., None] if headed and x.ndim == 3 else changed[0], headed)
        return changed

    def put_(self, x: Tensor, headed: bool) -> None:
        """Applies the writes to x [rows, (heads,) width]."""
        where = (self.at, self.head) if headed else (self.at,)
        value = self.value.to(x.dtype)
        x[where] = value if self.add is None else torch.where(self.add, x[where] + value, value)


class Changes:
    """All writes and cuts of a batch, by the block and component where they act."""

    def __init__(self, cells: Sequence[Cell]):
        self.writes: dict[tuple[int, str], list[tuple[int, Write]]] = defaultdict(list)
        self.cuts: dict[int, dict[int, list[Cut]]] = defaultdict(lambda: defaultdict(list))
        for i, cell in enumerate(cells):
            for write in cell.writes:
                layer, component = write.site.layer or 0, write.site.component
                if component == "resid_post":  # the same residual, named from the other side of the block
                    layer, component = layer + 1, "resid_pre"
                self.writes[layer, component].append((i, write))
            for cut in cell.cuts:
                self.cuts[cut.layer][i].append(cut)

    def components(self, layer: int) -> list[str]:
        """Components written inside a block."""
        return [c for where, c in self.writes if where == layer and c not in ("resid_pre", "embed")]

    def rows(self, layer: int, component: str, pieces: Iterable[Piece], device: torch.device) -> RowWrites | None:
        """The writes of one component that fall on the pieces' rows, or None."""
        writes = self.writes.get((layer, component))
        if not writes:
            return None
        home = {i: (piece, n) for piece in pieces for n, i in enumerate(piece.cells)}
        at: list[int] = []
        heads: list[int] = []
        add: list[bool] = []
        values: list[Tensor] = []
        for i, write in writes:
            if i not in home:
                continue
            piece, n = home[i]
            low, high = max(write.start, piece.start), min(write.stop, piece.stop)
            if low >= high:
                continue
            assert write.value is not None  # the cell is being run
            first = piece.offset + n * piece.rows - piece.start
            at += range(first + low, first + high)
            heads += [write.site.head or 0] * (high - low)
            add += [write.how == "add"] * (high - low)
            value = write.value.expand(write.stop - write.start, -1)
            values.append(value[low - write.start : high - write.start])
        if not at:
            return None
        added = torch.tensor(add, device=device)[:, None] if any(add) else None
        where, head = (torch.tensor(x, device=device) for x in (at, heads))
        widths = {v.shape[-1] for v in values}
        if len(widths) > 1:  # zero ablation writes one number for all
            values = [v.expand(-1, max(widths)) for v in values]
        return RowWrites(where, head, torch.cat(values), added)
