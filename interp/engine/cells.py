"""Cells: what a run's answer would be if some activations were different."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import PromptError
from interp.prompts.coder import Encoded
from interp.sites import Site

# A change of these reaches other positions only in later blocks: they come after the keys and values of their block.
AFTER_KEYS = frozenset({"q", "z", "result", "attn_out", "resid_mid", "mlp_post", "mlp_out"})


@dataclass(frozen=True, eq=False)
class Write:
    """Set the activation at ``site`` to ``value``, or add ``value`` to it.

    It acts on token rows [start, stop). ``value`` is broadcast over rows; it is None only in cells that are planned and
    not run. ``site.position`` is ignored: `rows_of` has resolved it to rows.
    """

    site: Site
    start: int
    stop: int
    value: Float[Tensor, "#rows width"] | None
    how: Literal["set", "add"] = "set"

    @property
    def layer(self) -> int:
        """The first block whose computation this can change."""
        return entry_layer(self.site)


@dataclass(frozen=True)
class Cut:
    """Hide keys from queries in one layer's attention, before the softmax.

    ``keys``: token rows, hidden from queries in rows [start, stop). ``heads``: the query heads that are cut; None for
    all.
    """

    layer: int
    start: int
    stop: int
    keys: tuple[int, int]
    heads: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Cell:
    """Run number ``run`` with all ``writes`` and ``cuts`` applied in one forward."""

    run: int
    writes: tuple[Write, ...] = ()
    cuts: tuple[Cut, ...] = ()

    @property
    def changes(self) -> tuple[Write | Cut, ...]:
        """All writes and cuts."""
        return (*self.writes, *self.cuts)

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
        if all(isinstance(c, Cut) or c.site.component in AFTER_KEYS for c in entering):
            return max(c.stop for c in entering)
        return length

    def cannot_reach_logits(self, n_layers: int, length: int) -> bool:
        """Whether the last position's logits cannot depend on this cell.

        This is so if nothing reads the rows that it changes.
        """
        if self.first_layer >= n_layers:
            return max(c.stop for c in self.changes) < length
        return self.first_layer == n_layers - 1 and self._late_stop(n_layers, length) < length

    def _late_stop(self, n_layers: int, length: int) -> int:
        beyond = [c.stop for c in self.changes if c.layer >= n_layers]
        return max([self.entry_stop(length), *beyond])


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
    position, n = site.position, len(prompt)
    if position is None:
        return 0, n
    if isinstance(position, str):
        name, colon, end = position.rpartition(":")
        if colon and position not in prompt.spans and end in ("first", "last") and name in prompt.spans:
            start, stop = prompt.spans[name]
            return (start, start + 1) if end == "first" else (stop - 1, stop)
        if position not in prompt.spans:
            names = ", ".join(map(repr, prompt.spans)) or "none"
            raise PromptError(f"site {site} names the span {position!r}, but the prompt's spans are: {names}")
        return prompt.spans[position]
    if not -n <= position < n:
        raise PromptError(f"site {site}: position {position} is outside a prompt of {n} tokens {list(prompt.tokens)}")
    return position % n, position % n + 1


def write_into(activation: Tensor, write: Write, value: Tensor | None = None) -> Tensor:
    """Return a copy of ``activation`` with the write applied.

    ``activation``: [1, position, (head,) width]. ``value``: used in place of the write's own.
    """
    value = write.value if value is None else value
    assert value is not None  # the cell is being run
    changed = activation.clone()
    whole = changed[0].unsqueeze(-1) if write.site.spec.heads == "neuron" else changed[0]
    target = whole if write.site.head is None else whole[:, write.site.head]
    rows = slice(write.start, write.stop)
    value = value.to(changed.dtype)
    target[rows] = value if write.how == "set" else target[rows] + value
    return changed


def cut_table(cuts: list[list[Cut]], n_heads: int, rows: tuple[int, int], keys: int) -> dict[str, Tensor]:
    """Express the cuts of several cells in one layer as headstats arguments.

    Queries that the same cuts name share a segment, and so do keys. A pair of segments is cut where some cut names
    both.  ``rows``: [start, stop) of the queries.

    Returns q_segments [cells, rows], k_segments [cells, keys], knockout [cells, heads, Sq, Sk].
    """
    parts = [_segments(of_cell, n_heads, rows, keys) for of_cell in cuts]
    size = [max(table.shape[i] for *_, table in parts) for i in (1, 2)]
    whole = torch.zeros(len(cuts), n_heads, *size, dtype=torch.bool)
    for cell, (*_, table) in enumerate(parts):
        whole[cell, :, : table.shape[1], : table.shape[2]] = table
    q, k = (torch.stack([p[i] for p in parts]) for i in (0, 1))
    return {"q_segments": q, "k_segments": k, "knockout": whole}


def _segments(cuts: list[Cut], n_heads: int, rows: tuple[int, int], keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return one cell's query and key segments, and the cut pairs [heads, Sq, Sk]."""
    columns = max(1, len(cuts))
    query_in_cut, key_in_cut = torch.zeros(rows[1] - rows[0], columns), torch.zeros(keys, columns)
    head_in_cut = torch.zeros(n_heads, columns)
    for i_cut, cut in enumerate(cuts):
        query_in_cut[max(cut.start - rows[0], 0) : max(cut.stop - rows[0], 0), i_cut] = 1
        key_in_cut[slice(*cut.keys), i_cut] = 1
        head_in_cut[slice(None) if cut.heads is None else list(cut.heads), i_cut] = 1
    query_segments, q = torch.unique(query_in_cut, dim=0, return_inverse=True)
    key_segments, k = torch.unique(key_in_cut, dim=0, return_inverse=True)
    return q, k, torch.einsum("he,qe,ke->hqk", head_in_cut, query_segments, key_segments) > 0


def cut_mask(cuts: list[Cut], n_heads: int, length: int) -> Bool[Tensor, "heads length length"]:
    """Express one cell's cuts in one layer as a mask: True where attention is cut."""
    mask = torch.zeros(n_heads, length, length, dtype=torch.bool)
    for cut in cuts:
        heads = range(n_heads) if cut.heads is None else cut.heads
        for head in heads:
            mask[head, cut.start : cut.stop, slice(*cut.keys)] = True
    return mask
