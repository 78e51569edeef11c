"""AttentionCall, one layer's attention as arguments, and its dense computation.

The dense path builds one layer's n×n scores so that user hooks can read and edit them. It is used only for a layer
whose ``hook_attn_scores`` or ``hook_pattern`` has hooks; every other layer stays on the kernel. `Model.backend_report`
names the layers that took the dense path.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model.dense_edits import DenseEdits
from interp.model.layer_edits import LayerEdit
from interp.model.layer_masks import LayerMask
from interp.model.segment_masks import SegmentMasks

UNKNOWN = -1  # as a call's first key: a sliding cache has dropped keys, some of which were padding
UNALIGNED = -2  # the last query does not stand at the last key, as in a cache of fixed size


@dataclass(frozen=True)
class AttentionCall:
    """One layer's attention after projection and rotation, as headstats takes it.

    q [B, H, M, D]; k [B, Hk, N, D]; v [B, Hk, N, Dv]; ``causal`` is aligned bottom-right; ``window`` counts the query
    itself; ``key_padding`` [B, N] is True at real keys; ``bias`` is added to the scores and broadcastable to
    [B, H, M, N] (−inf or the dtype's minimum where hidden); ``sinks`` [H]. ``first_key``: the position of the first of
    the N keys, not 0 where a sliding cache has dropped earlier ones; below 0 (`UNKNOWN`, `UNALIGNED`) where rows of
    the prompt cannot be told.
    ``edits``: edits and masks of each batch row, or none. ``masks``: what `interp.model.apply_masks` has made of the
    masks among them; ``own_mask`` is then the causality, window and bias of the model.
    """

    layer: int
    q: Float[Tensor, "batch heads query dim"]
    k: Float[Tensor, "batch kv_heads key dim"]
    v: Float[Tensor, "batch kv_heads key dim_v"]
    scale: float
    causal: bool = True
    window: int | None = None
    key_padding: Bool[Tensor, "batch key"] | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None
    first_key: int = 0
    edits: tuple[tuple[LayerEdit | LayerMask, ...], ...] = ()
    masks: SegmentMasks | None = None
    own_mask: tuple[bool, int | None, Tensor | None] | None = None

    def without_masks(self) -> tuple[tuple[LayerEdit, ...], ...]:
        """The edits of each batch row, without masks; empty if there are none."""
        edits = tuple(tuple(e for e in row if isinstance(e, LayerEdit)) for row in self.edits)
        return edits if any(edits) else ()

    def unmasked(self) -> AttentionCall:
        """The call before masks were applied, without edits."""
        causal, window, bias = self.own_mask or (self.causal, self.window, self.bias)
        return replace(self, causal=causal, window=window, bias=bias, masks=None, own_mask=None, edits=())

    def edits_by_row(self) -> tuple[tuple[LayerEdit | LayerMask, ...], ...]:
        """The edits of each batch row; empty ones if there are none."""
        return self.edits or ((),) * self.q.shape[0]

    def visible(self) -> Bool[Tensor, "#batch 1 query key"] | None:
        """Which keys each query may see, without regard to the bias; None if all."""
        m, n = self.q.shape[2], self.k.shape[2]
        visible: Tensor | None = None
        if self.causal or self.window is not None:
            distance = torch.arange(m, device=self.q.device)[:, None] + (n - m)
            distance = distance - torch.arange(n, device=self.q.device)
            visible = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
            if self.window is not None:
                visible = visible & (distance.abs() < self.window)
            visible = visible[None, None]
        if self.masks is not None:
            every = torch.ones(m, n, dtype=torch.bool, device=self.q.device)
            visible = self.masks.visible(every if visible is None else visible[0, 0])
        if self.key_padding is not None:
            is_real = self.key_padding[:, None, None, :]
            visible = is_real if visible is None else visible & is_real
        return visible


def rows_unknown(call: AttentionCall, what: str) -> str:
    """Say why the rows of a call's keys are not known, so that ``what`` cannot be computed."""
    if call.first_key == UNALIGNED:
        return (
            f"layer {call.layer}: its cache of keys has a fixed size, so that the last query does not stand at the "
            f"last key, and {what} cannot tell which tokens are meant. Decode with the default cache, not a static one"
        )
    return (
        f"layer {call.layer}: its sliding cache has dropped padded keys, so {what} cannot tell which tokens are left. "
        "Decode prompts of one length together"
    )


def is_hidden(bias: Tensor) -> Tensor:
    """Which cells a bias hides, as headstats reads it."""
    return bias <= max(torch.finfo(bias.dtype).min, -1e30)


Hook = Callable[[Tensor], Tensor]


def dense_attention(
    call: AttentionCall, hook_scores: Hook = lambda x: x, hook_pattern: Hook = lambda x: x
) -> Float[Tensor, "batch heads query dim_v"]:
    """Compute softmax(q kᵀ · scale + masks) v with TransformerLens' hooks.

    One hook is before the softmax, one after it. When the hook sees them, masked scores hold the dtype's minimum
    (TransformerLens' convention). A query that sees no key (padding) gives a zero row, as in the kernel. Softmax runs
    in at least float32.
    """
    groups = call.q.shape[1] // call.k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (call.k, call.v))
    scores = call.q @ k.transpose(-2, -1) * call.scale
    edits = DenseEdits.of_rows(call.without_masks(), call.q, k.shape[2], call.key_padding)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    scores = _each_row(edits, DenseEdits.change_logits, scores)
    if call.bias is not None:
        scores = scores + call.bias.to(scores.dtype)
    sinks = None if call.sinks is None else call.sinks.to(scores).reshape(1, -1, 1, 1)
    if edits:
        temperature = _each_row(edits, DenseEdits.temperatures, scores)
        scores = _each_row(edits, DenseEdits.change_scores, scores / temperature)
        sinks = None if sinks is None else sinks / temperature
    visible = call.visible()
    if edits or (call.bias is not None and bool(is_hidden(call.bias).any())):
        hidden = scores <= torch.finfo(scores.dtype).min
        visible = ~hidden if visible is None else visible & ~hidden
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    scores = hook_scores(scores)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        wide = torch.cat([wide, sinks.to(wide).expand(*wide.shape[:-1], 1)], dim=-1)
    pattern = wide.softmax(-1)[..., : scores.shape[-1]]
    if visible is not None:
        pattern = pattern.masked_fill(~visible.any(-1, keepdim=True), 0.0)
    if edits:
        assert visible is not None
        seen = visible.expand_as(pattern)
        rows = zip(edits, pattern, seen, strict=True)
        pattern = torch.stack([edit.change_pattern(p, s) for edit, p, s in rows])
    pattern = hook_pattern(pattern.to(call.q.dtype))
    return _each_row(edits, DenseEdits.change_output, pattern @ v)


def _each_row(edits: Sequence[DenseEdits], change: Callable[[DenseEdits, Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a step of every batch row's edits to x [batch, ...]."""
    return x if not edits else torch.stack([change(edit, row) for edit, row in zip(edits, x, strict=True)])
