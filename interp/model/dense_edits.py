"""Edits of attention applied to one layer's whole pattern: the slow, obvious form of `layer_edits`.

The naive engine uses it, and so does a layer whose scores or pattern are hooked while it is edited. It holds the
[heads, queries, keys] pattern of every batch row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from headstats.edits import hash_noise
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model.edit_tables import CallSize, gate_numbers
from interp.model.layer_edits import LayerEdit, hidden_weight

Pattern = Float[Tensor, "heads query key"]
Masks = Bool[Tensor, "heads query key"]


def real_keys(padding: Bool[Tensor, " key"]) -> tuple[int, int]:
    """The range of keys from the first to the last that is no padding; that of the last key if all are padding."""
    real = padding.nonzero()[:, 0].tolist() or [len(padding) - 1]
    return real[0], real[-1] + 1


def cells_of(e: LayerEdit, rows: Any, heads: int, first: int, stop: int, keys: int) -> Masks:
    """The pairs of a query and a key, of the edit's heads, with the key in ``rows`` (None: all keys)."""
    mask = torch.zeros(heads, stop - first, keys, dtype=torch.bool)
    query_rows = range(first, stop) if e.queries is None else [q for q in range(first, stop) if q in e.queries]
    key_rows = list(range(keys)) if rows is None else [k for k in range(keys) if k in rows]
    for head in range(heads) if e.heads is None else e.heads:
        for query in query_rows:
            mask[head, query - first, key_rows] = True
    return mask


class DenseEdits:
    """The edits of one batch row, applied step by step to a pattern of [heads, queries, keys].

    The methods are called in the order in which headstats' Edit acts.
    """

    def __init__(
        self, edits: Sequence[LayerEdit], heads: int, first: int, stop: int, keys: int, device: torch.device,
        real: tuple[int, int] | None = None,
    ):  # fmt: skip
        self.edits, self.first, self.device = edits, first, device
        self.real = (0, keys) if real is None else real  # keys [start, stop) that are not padding
        self.cells = [cells_of(e, e.keys, heads, first, stop, keys).to(device) for e in edits]
        # [heads, query, 1]: which rows of the pattern each edit changes
        self.rows = [cells_of(e, None, heads, first, stop, keys).to(device)[..., :1] for e in edits]
        self.size = heads, first, stop, keys

    @classmethod
    def of_rows(
        cls, by_row: Sequence[Sequence[LayerEdit]], q: Tensor, keys: int, key_padding: Bool[Tensor, "batch key"] | None
    ) -> list[DenseEdits]:
        """The edits of each batch row of queries q [batch, heads, queries, d]; empty if there are none."""
        if not any(by_row):
            return []
        first = keys - q.shape[2]
        real = [None] * len(by_row) if key_padding is None else [real_keys(padding) for padding in key_padding]
        return [cls(e, q.shape[1], first, keys, keys, q.device, r) for e, r in zip(by_row, real, strict=True)]

    def change_logits(self, z: Pattern) -> Pattern:
        """Apply logit_factor and logit_raise, before biases and masks."""
        factor, raised = torch.ones_like(z), torch.zeros_like(z)
        for e, cells in zip(self.edits, self.cells, strict=True):
            if e.edit.logit_factor is not None:
                factor = torch.where(cells, factor * e.edit.logit_factor, factor)
            if e.edit.logit_raise is not None:
                raised = torch.where(cells, raised + e.edit.logit_raise, raised)
        z = z * factor
        return z + raised * z.abs()

    def temperatures(self, z: Pattern) -> Float[Tensor, "heads query 1"]:
        """The number by which each row's logits and learned sink are divided."""
        divide = torch.ones_like(z[..., :1])
        for e, rows in zip(self.edits, self.rows, strict=True):
            if e.edit.temperature is not None:
                divide = torch.where(rows, divide * e.edit.temperature, divide)
        return divide

    def change_scores(self, z: Pattern) -> Pattern:
        """Add biases and, where the row is renormalised, the logarithm of gains; 0 becomes −inf."""
        for e, cells in zip(self.edits, self.cells, strict=True):
            if e.edit.bias is not None:
                z = torch.where(cells, z + e.edit.bias, z)
            if e.edit.renormalise and e.edit.gain is not None:
                z = torch.where(cells, z + torch.tensor(e.edit.gain, dtype=z.dtype).log(), z)
            if e.edit.renormalise and e.edit.knockout:
                z = z.masked_fill(cells, -torch.inf)
        return z

    def change_pattern(self, p: Pattern, visible: Masks) -> Pattern:
        """Apply counterfactuals and given weights, then gains and knock-outs of weights, then redistribution."""
        for e, rows in zip(self.edits, self.rows, strict=True):
            if e.edit.counterfactual is not None:
                p = torch.where(rows, self._lay_out(e, p, visible), p)
            if e.targets:
                p = torch.where(rows, self._distribution(e, p, rows & ~visible), p)
        for e, cells in zip(self.edits, self.cells, strict=True):
            if not e.edit.renormalise and e.edit.gain is not None:
                p = torch.where(cells, p * e.edit.gain, p)
            if not e.edit.renormalise and e.edit.knockout:
                p = p.masked_fill(cells, 0)
        for e in self.edits:
            if e.edit.keep_fraction is not None:
                take, give = (cells_of(e, x, *self.size).to(self.device) for x in (e.take, e.give))
                p = _redistribute(p, take & visible, give & visible & ~take, e.edit.keep_fraction)
        return p

    def change_output(self, z: Float[Tensor, "heads query d_v"]) -> Float[Tensor, "heads query d_v"]:
        """Apply gates and replacements."""
        for e, rows in zip(self.edits, self.rows, strict=True):
            if e.edit.gate is None and e.edit.replacement is None:
                continue
            gate: Any = 0.0 if e.edit.gate is None else e.edit.gate
            if e.edit.has_gates:
                gate = gate_numbers(e, CallSize(*self.size)).to(z)[..., None]
            changed = gate * z
            if e.edit.replacement is not None:
                value = e.edit.replacement.to(z)
                changed = changed + (1 - gate) * (value[:, None] if value.ndim == 2 else value)
            z = torch.where(rows, changed, z)
        return z

    def _distribution(self, e: LayerEdit, p: Pattern, hidden: Masks) -> Pattern:
        """The weights that an edit gives to every row. Raises InterpError for weight on ``hidden`` keys."""
        new = torch.zeros_like(p)
        for key, share in zip(e.targets, e.shares, strict=True):
            blind = hidden.any(0)[:, key].nonzero()[:, 0].tolist() if 0 <= key < p.shape[-1] else [0]
            if blind:
                raise hidden_weight(e, self.first + blind[0], key)
            new[..., key] = share
        return new

    def _lay_out(self, e: LayerEdit, p: Pattern, visible: Masks) -> Pattern:
        """Another distribution over the visible keys; see the table in headstats' Edit.

        Hashes count tokens without padding, and know nothing of other batch rows.
        """
        kind, keeps, mass = e.edit.counterfactual, e.edit.renormalise, p.sum(-1, keepdim=True)
        seen = visible.to(p.dtype)
        heads, first, stop, keys = self.size
        (start, end) = self.real
        if kind == "uniform":
            return seen * (mass / seen.sum(-1, keepdim=True).clamp_min(1) if keeps else 1 / (end - start))
        if kind == "identity":
            own = torch.arange(first, stop)[:, None] == torch.arange(keys)
            return own.to(p) * seen * (mass if keeps else 1.0)
        if kind == "reversed":
            new = (p.amax(-1, keepdim=True) - p) * seen
            total = new.sum(-1, keepdim=True)
            return torch.where(total > 0, new * mass / total.where(total > 0, 1.0), p) if keeps else new
        words = hash_noise.words(
            e.edit.seed, torch.tensor([0]), torch.arange(heads),
            torch.arange(first, stop) - start, torch.arange(keys) - start,
        )[0].to(self.device)  # fmt: skip
        if kind == "random":
            u = hash_noise.uniform(words, p.dtype)
            return (
                seen
                * u
                * (mass / (seen * u).sum(-1, keepdim=True) if keeps else 1 / u[..., start:end].sum(-1, keepdim=True))
            )
        return _shuffle(p, visible.expand_as(p), words)


def _shuffle(p: Pattern, visible: Masks, words: Tensor) -> Pattern:
    """Of the visible keys, the k-th from the left gets the weight of the key with the k-th smallest hash."""
    out = torch.zeros_like(p)
    for head in range(p.shape[0]):
        for row in range(p.shape[1]):
            keys = visible[head, row].nonzero()[:, 0]
            out[head, row, keys] = p[head, row, keys[words[head, row, keys].argsort()]]
    return out


def _redistribute(p: Pattern, take: Masks, give: Masks, keep: float) -> Pattern:
    """Move weight from ``take`` to ``give`` within each row, in proportion to the weights of ``give``."""
    lost = (p * take).sum(-1, keepdim=True) * (1 - keep)
    received = (p * give).sum(-1, keepdim=True)
    moved = torch.where(take, p * keep, p) + torch.where(give, p * lost / received.where(received > 0, 1.0), 0.0)
    return torch.where(received > 0, moved, p)
