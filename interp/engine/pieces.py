"""How the cells of a batch lie in one packed hidden state."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from interp.engine.cells import Cell, Cut, Write
from interp.engine.runs import Run


@dataclass
class Group:
    """Cells of one run that start at one position: they share the base run's prefix keys and values.

    ``hidden`` [active cells, rows from ``start``, d_model] holds those that have entered, in the order of ``active``.
    """

    run: Run
    start: int
    waiting: list[int] = field(default_factory=list)  # numbers within the batch, in order of entry
    active: list[int] = field(default_factory=list)
    hidden: Tensor | None = None

    def admit(self, cells: list[int], hidden: Tensor) -> None:
        """Takes cells in, with their hidden rows."""
        self.active += cells
        self.hidden = hidden.clone() if self.hidden is None else torch.cat([self.hidden, hidden])


@dataclass
class Piece:
    """Rows [start, stop) of some cells of one group, as they stand in the packed hidden state from ``offset`` on.

    ``narrow``: the cells' first block, in which only these rows change; the rest is the base run's.
    """

    group: Group
    cells: list[int]
    start: int
    stop: int
    hidden: Tensor
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

    def last_rows(self) -> Piece:
        """The same cells' last rows alone."""
        return Piece(self.group, self.cells, self.stop - 1, self.stop, self.hidden[:, -1:])


def place(pieces: Sequence[Piece]) -> Tensor:
    """Sets the offsets and returns the packed hidden state [1, rows, d_model]."""
    offset = 0
    for piece in pieces:
        piece.offset = offset
        offset += len(piece.cells) * piece.rows
    return torch.cat([p.hidden.flatten(0, 1) for p in pieces])[None]


def positions(pieces: Sequence[Piece], device: torch.device) -> Int[Tensor, " rows"]:
    """Position in its prompt of every packed row."""
    return torch.cat([torch.arange(p.start, p.stop, device=device).repeat(len(p.cells)) for p in pieces])


@dataclass
class Rows:
    """Some writes as rows of a packed state: what to put where."""

    at: Int[Tensor, " R"]
    head: Int[Tensor, " R"]
    value: Tensor  # [R, width]
    add: Tensor  # bool [R, 1]

    def put(self, x: Tensor, headed: bool) -> Tensor:
        """A copy of x [1, rows, (heads,) width] with the writes applied."""
        changed = x.clone()
        where = (0, self.at, self.head) if headed else (0, self.at)
        value = self.value.to(x.dtype)
        changed[where] = torch.where(self.add, changed[where] + value, value)
        return changed


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

    def rows(self, layer: int, component: str, pieces: Iterable[Piece], device: torch.device) -> Rows | None:
        """The writes of one component that fall on the pieces' rows, or None."""
        home = {i: (piece, n) for piece in pieces for n, i in enumerate(piece.cells)}
        at, heads, values, add = [], [], [], []
        for i, write in self.writes.get((layer, component), ()):
            if i not in home:
                continue
            piece, n = home[i]
            low, high = max(write.start, piece.start), min(write.stop, piece.stop)
            if low >= high:
                continue
            assert write.value is not None  # the cell is being run
            first = piece.offset + n * piece.rows - piece.start
            at.append(torch.arange(first + low, first + high, device=device))
            heads.append(torch.full((high - low,), write.site.head or 0, device=device))
            value = write.value.expand(write.stop - write.start, -1)
            values.append(value[low - write.start : high - write.start])
            add.append(torch.full((high - low, 1), write.how == "add", device=device))
        return Rows(torch.cat(at), torch.cat(heads), torch.cat(values), torch.cat(add)) if at else None
