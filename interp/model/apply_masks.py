"""Apply the masks of a call: as segments that the kernel reads, or as an n×n bias where that cannot be done.

A mask is a table over classes of queries and keys (`interp.model.mask_rules`). The kernel reads such tables by segment
number. A call becomes dense where a table would be about as large as the pattern, as for a stride next to a window,
whose classes are the tokens themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from interp.errors import InterpError
from interp.model.attention_call import UNALIGNED, AttentionCall, is_hidden, rows_unknown
from interp.model.layer_masks import LayerMask, MaskTables, masks_of, window_of
from interp.model.segment_masks import SegmentMasks

SMALL_TABLE = 64 * 64  # a table of so many cells goes to the kernel, however short the prompt
LARGEST_SHARE = 1 / 3  # of a pattern's cells: larger tables gain little over a bias


@dataclass(frozen=True, eq=False)
class _RowMasks:
    """The masks of one batch row that change something."""

    masks: Sequence[LayerMask]
    tables: MaskTables
    window: int | None


def apply_masks(call: AttentionCall, keys: int | None = None) -> tuple[AttentionCall, str]:
    """Return the call without `LayerMask`s, and why it then holds an n×n bias; empty if it does not.

    ``keys``: number of keys, those of a shared prefix included; None: those that the call holds. A mask that shows
    exactly what the model itself shows is left out, so that no bit changes. Raises InterpError where a cache does not
    tell which rows its keys are, or has dropped keys that a mask shows.
    """
    keys = call.k.shape[2] if keys is None else keys
    if call.first_key:
        _check_held_keys(call, keys)
    rows = _by_row(call, lambda masks: _needed(call, masks, keys))
    own = call.causal, call.window, call.bias
    call = replace(call, edits=call.without_masks())
    needed = [row for row in rows if row is not None]
    if not needed:
        return call, ""
    call = replace(call, own_mask=own)
    if why := _why_dense(call, rows, keys):
        masks = "; ".join(dict.fromkeys(str(m.mask) for row in needed for m in row.masks))
        return _dense(call, rows, keys), f"attention mask: {masks} ({why})"
    masks = _segments(rows, call.q.device)
    return replace(call, window=needed[0].window, masks=masks), ""


def dense_masks(call: AttentionCall) -> AttentionCall:
    """Return the call with its masks as an n×n bias: the plain form that segments are compared with."""
    keys = call.k.shape[2]
    rows = _by_row(call, lambda masks: _row_masks(call, masks, keys))
    return _dense(replace(call, edits=call.without_masks()), rows, keys)


def visible_keys(call: AttentionCall, masks: Sequence[LayerMask], row: int, length: int) -> Bool[Tensor, " key"]:
    """Return which tokens of a prompt of ``length`` tokens the query at ``row`` sees in some head.

    ``call``: a layer's call without masks; its bias counts where it reaches as far.
    """
    keys, bias = torch.arange(length), call.bias
    query = keys[row : row + 1]
    tables = MaskTables(masks, query, keys)
    seen = _seen(call.causal, window_of(masks, call.window), query, keys)
    if bias is not None and bias.shape[-2] > row and bias.shape[-1] >= length:
        seen = seen & ~is_hidden(bias[0, :, row, :length]).all(0).cpu()
    return ((seen | tables.cells(tables.opened)) & ~tables.cells(tables.hidden))[0]


def _by_row(call: AttentionCall, resolve: Callable[[Sequence[LayerMask]], _RowMasks | None]) -> list[_RowMasks | None]:
    """The masks of each batch row; rows of the same masks share their tables."""
    resolved: dict[tuple[int, ...], _RowMasks | None] = {(): None}
    rows = []
    for edits in call.edits:
        masks = masks_of(edits)
        key = tuple(map(id, masks))
        if key not in resolved:
            resolved[key] = resolve(masks)
        rows.append(resolved[key])
    return rows


def _row_masks(call: AttentionCall, masks: Sequence[LayerMask], keys: int) -> _RowMasks:
    held = torch.arange(keys) + max(call.first_key, 0)
    return _RowMasks(masks, MaskTables(masks, held[keys - call.q.shape[2] :], held), window_of(masks, call.window))


def _needed(call: AttentionCall, masks: Sequence[LayerMask], keys: int) -> _RowMasks | None:
    """The masks of a batch row; None if they show what causality, the window and the call's bias show."""
    row = _row_masks(call, masks, keys)
    reaches_all = row.window is None or row.window >= keys
    is_own = row.window == call.window or (reaches_all and (call.window is None or call.window >= keys))
    if not is_own or any(row.tables.changing(call.causal, row.window)):
        return row
    opens_bias = bool(row.tables.opened.any()) and _hides(call.bias)  # the mask of the model or of the caller
    return row if opens_bias else None


def _check_held_keys(call: AttentionCall, keys: int) -> None:
    """Raise InterpError for masks that need rows which a call's cache does not tell, or keys that it has dropped."""
    for masks in filter(None, map(masks_of, call.edits)):
        has_rules = any(m.rules for m in masks)
        if call.first_key == UNALIGNED or (call.first_key < 0 and has_rules):
            raise InterpError(rows_unknown(call, "attention masks"))
        if call.first_key < 0:
            continue
        first = call.first_key + keys - call.q.shape[2]  # the row of the first query
        dropped = torch.arange(call.first_key)
        tables = MaskTables(masks, torch.arange(first, call.first_key + keys), dropped)
        window = window_of(masks, call.window)
        reaches = window is not None and first - window + 1 < call.first_key
        if reaches or bool(tables.opened.any()):
            raise InterpError(
                f"layer {call.layer}: its sliding cache has dropped the keys before {call.first_key}, and an attention "
                f"mask shows some of them ({'; '.join(str(m.mask) for m in masks)}). Decode without a cache "
                "(use_cache=False)"
            )


def _why_dense(call: AttentionCall, rows: Sequence[_RowMasks | None], keys: int) -> str:
    """Why the masks of a call cannot be segments; empty if they can."""
    if len({call.window if row is None else row.window for row in rows}) > 1:
        return "prompts of one batch have different windows"
    needed = [row for row in rows if row is not None]
    if any(bool(row.tables.opened.any()) for row in needed) and _hides(call.bias):
        return "it opens what an n×n mask of the model or of the caller hides"
    sizes = [row.tables.opened.shape for row in needed]
    queries, seen = (max(size[axis] for size in sizes) for axis in (0, 1))
    if queries * seen > max(SMALL_TABLE, LARGEST_SHARE * call.q.shape[2] * keys):
        return f"it treats {queries} queries and {seen} keys each in their own way"
    return ""


def _segments(rows: Sequence[_RowMasks | None], device: torch.device) -> SegmentMasks | None:
    """Masks as segments; None if there are only windows. Rows without masks are one segment, in which all is shown."""
    if all(row is rows[0] for row in rows):
        rows = rows[:1]
    like = next(row.tables for row in rows if row is not None)
    shapes = [row.tables.opened.shape for row in rows if row is not None]
    opened, hidden = torch.zeros(2, len(rows), 1, *(max(s[axis] for s in shapes) for axis in (0, 1)), dtype=torch.bool)
    q_segments, k_segments = (torch.zeros(len(rows), len(x), dtype=torch.long) for x in (like.queries, like.keys))
    for i, row in enumerate(rows):
        if row is not None:
            of_row = row.tables
            q_segments[i], k_segments[i] = of_row.queries, of_row.keys
            sq, sk = of_row.opened.shape
            opened[i, 0, :sq, :sk], hidden[i, 0, :sq, :sk] = of_row.opened, of_row.hidden
    if not opened.any() and not hidden.any():
        return None
    tables = (t.to(device) if is_used else None for t, is_used in ((opened, opened.any()), (~hidden, hidden.any())))
    return SegmentMasks(q_segments.to(device), k_segments.to(device), *tables)


def _dense(call: AttentionCall, rows: Sequence[_RowMasks | None], keys: int) -> AttentionCall:
    """Return the call with masks, causality and windows as a bias [batch, #heads, query, key]."""
    held = torch.arange(keys)
    queries = held[keys - call.q.shape[2] :]
    biases = [_bias_of_row(call, i, row, queries, held) for i, row in enumerate(rows)]
    return replace(call, causal=False, window=None, bias=torch.stack(biases))


def _seen(
    causal: bool, window: int | None, queries: Int[Tensor, " query"], keys: Int[Tensor, " key"]
) -> Bool[Tensor, "query key"]:
    """Return which keys causality and a window show."""
    distance = queries[:, None] - keys
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)


def _bias_of_row(
    call: AttentionCall, i: int, row: _RowMasks | None, queries: Int[Tensor, " query"], keys: Int[Tensor, " key"]
) -> Tensor:
    """The bias [#heads, query, key] of one batch row."""
    device = call.q.device
    seen = _seen(call.causal, call.window if row is None else row.window, queries, keys)
    opened = hidden = torch.zeros_like(seen)
    if row is not None:
        opened, hidden = (row.tables.cells(t) for t in (row.tables.opened, row.tables.hidden))
    seen, opened, hidden = (x.to(device) for x in (seen, opened, hidden))
    bias = torch.zeros(1, 1, 1, device=device, dtype=call.q.dtype)
    if call.bias is None:
        return bias.masked_fill(~((seen | opened) & ~hidden), -torch.inf)
    bias = call.bias[i if call.bias.shape[0] > 1 else 0].to(call.q.dtype)
    shut = is_hidden(bias)
    padded = shut.all(-2, keepdim=True)  # keys that no query sees
    seen = (seen & ~shut | opened) & ~padded
    return bias.masked_fill(shut, 0).masked_fill(~(seen & ~hidden), -torch.inf)


def _hides(bias: Tensor | None) -> bool:
    return bias is not None and bool(is_hidden(bias).any())
