"""Cells: what a run's answer would be if some activations were different."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from interp.model.layer_edits import LayerEdit
from interp.model.layer_masks import LayerMask
from interp.prompts.coder import Encoded
from interp.prompts.positions import row_range
from interp.sites import Site

# A change of these reaches other positions only in later blocks: they come after the keys and values of their block.
AFTER_KEYS = frozenset({"q", "z", "result", "attn_out", "resid_mid", "mlp_post", "mlp_out"})


@dataclass(frozen=True, eq=False)
class CellWrite:
    """Set the activation at ``site`` to ``value``, add ``value`` to it, or set it to the mean of ``others``.

    It acts on token rows [start, stop). ``value`` is broadcast over rows; it is None for a mean, and in cells that are
    planned and not run. ``others``: heads of the layer, of which the mean is taken in the same rows of the same
    forward, after everything that is set or added there. ``site.position`` is ignored: `rows_of` has resolved it to
    rows.
    """

    site: Site
    start: int
    stop: int
    value: Float[Tensor, "#rows width"] | None
    how: Literal["set", "add", "mean"] = "set"
    others: tuple[int, ...] = ()

    @property
    def layer(self) -> int:
        """The first block whose computation this can change."""
        return entry_layer(self.site)


@dataclass(frozen=True, eq=False)
class Cell:
    """Run number ``run`` with all ``writes`` and attention ``edits`` applied in one forward."""

    run: int
    writes: tuple[CellWrite, ...] = ()
    edits: tuple[LayerEdit | LayerMask, ...] = ()

    @property
    def changes(self) -> tuple[CellWrite | LayerEdit | LayerMask, ...]:
        """All writes and edits."""
        return (*self.writes, *self.edits)

    @property
    def first_row(self) -> int:
        """The first changed position.

        Under causal attention nothing before it can change.
        """
        return min(c.start for c in self.changes)

    @property
    def first_layer(self) -> int:
        """The first block that must run.

        resid_post of layer l is the input of block l + 1.
        """
        return min(c.layer for c in self.changes)

    def entry_stop(self, length: int) -> int:
        """The row before which all changes of the first block end.

        Where all changes there come after the keys and values, only the changed rows differ. Where keys or values
        change too, every later row can differ and the result is ``length``, the length of the run.
        """
        entering = [c for c in self.changes if c.layer == self.first_layer]
        return max(c.stop for c in entering) if all(map(_comes_after_keys, entering)) else length

    def cannot_reach_logits(self, n_layers: int, length: int, read: Sequence[int] | None = None) -> bool:
        """Whether the logits of the rows in ``read`` (default: the last row) cannot depend on this cell.

        This is so if nothing reads the rows that it changes. A mask may let earlier rows read them.
        """
        if any(isinstance(e, LayerMask) and e.opens_later for e in self.edits):
            return False
        if self.first_layer < n_layers - 1:  # it reaches every row from its first one on
            return (length - 1 if read is None else read[-1]) < self.first_row
        return not any(self.reaches(row, n_layers, length) for row in ((length - 1,) if read is None else read))

    def reaches(self, row: int, n_layers: int, length: int) -> bool:
        """Whether the logits of a row can depend on this cell, under causal attention."""
        if row < self.first_row:
            return False
        if self.first_layer >= n_layers:
            return row < max(c.stop for c in self.changes)
        return self.first_layer < n_layers - 1 or row < self._late_stop(n_layers, length)

    def _late_stop(self, n_layers: int, length: int) -> int:
        beyond = [c.stop for c in self.changes if c.layer >= n_layers]
        return max([self.entry_stop(length), *beyond])


def _comes_after_keys(change: CellWrite | LayerEdit | LayerMask) -> bool:
    """Whether a change leaves the keys and values of its block alone, and what other queries read of them."""
    if isinstance(change, CellWrite):
        return change.site.component in AFTER_KEYS
    return isinstance(change, LayerMask) or not change.counts_keys


def entry_layer(site: Site) -> int:
    """The first block whose computation a write at this site can change."""
    if site.layer is None:
        return 0
    return site.layer + 1 if site.component == "resid_post" else site.layer


def rows_of(site: Site, prompt: Encoded) -> tuple[int, int]:
    """Token rows [start, stop) of a site's position in one prompt.

    Raises PromptError if the prompt lacks it. ``"name:first"`` and ``"name:last"`` are the first and last token of the
    span ``name``.
    """
    if site.position is None:
        return 0, len(prompt)
    return row_range(site.position, prompt, f"site {site}")


def write_into(activation: Tensor, write: CellWrite, value: Tensor | None = None) -> Tensor:
    """Return a copy of ``activation`` with the write applied.

    ``activation``: [1, position, (head,) width]. ``value``: used in place of the write's own.
    """
    changed = activation.clone()
    whole = changed[0].unsqueeze(-1) if write.site.spec.heads == "neuron" else changed[0]
    target = whole if write.site.head is None else whole[:, write.site.head]
    rows = slice(write.start, write.stop)
    if write.how == "mean":
        target[rows] = whole[rows, list(write.others)].mean(1)
        return changed
    value = write.value if value is None else value
    assert value is not None  # the cell is being run
    value = value.to(changed.dtype)
    target[rows] = value if write.how == "set" else target[rows] + value
    return changed
