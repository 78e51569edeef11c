"""Check edits that overwrite rows of attention weights: no weight lies on a key that the query does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from interp.model.attention_call import AttentionCall, is_hidden
from interp.model.layer_edits import LayerEdit, hidden_weight


def check_seen(call: AttentionCall, n_keys: int) -> None:
    """Raise InterpError for weights on keys that a query does not see.

    ``n_keys``: the number of keys, those of a shared prefix included.
    """
    first = n_keys - call.q.shape[2]
    for i, edits in enumerate(call.without_masks()):
        for e in edits:
            if not e.targets:
                continue
            queries = [q for q in range(first, n_keys) if e.queries is None or q in e.queries]
            seen = _seen(call, e, i, queries, n_keys)
            if not bool(seen.all()):
                row, column = (~seen).nonzero()[0].tolist()
                raise hidden_weight(e, queries[row], e.targets[column])


def _seen(call: AttentionCall, e: LayerEdit, batch_row: int, queries: list[int], n_keys: int) -> Tensor:
    """Whether each query sees each key that gets weight, [queries, targets]."""
    keys = torch.tensor(list(e.targets))
    distance = torch.tensor(queries, dtype=torch.long)[:, None] - keys
    inside = (keys >= 0) & (keys < n_keys)
    seen = inside.expand_as(distance)
    if call.causal:
        seen = seen & (distance >= 0)
    if call.window is not None:
        seen = seen & (distance.abs() < call.window)
    held = keys.clamp(0, n_keys - 1).to(call.q.device)
    if call.masks is not None:
        rows = torch.tensor(queries, dtype=torch.long, device=held.device) - (n_keys - call.q.shape[2])
        seen = inside & call.masks.visible_in_row(batch_row, seen.to(held.device), rows, held).cpu()
    if call.key_padding is not None:
        seen = seen & call.key_padding[batch_row, held].cpu()
    if call.bias is not None and queries:
        rows = torch.tensor(queries, device=held.device) - (n_keys - call.q.shape[2])
        bias = call.bias[batch_row if call.bias.shape[0] > 1 else 0]
        bias = bias[:, rows if bias.shape[1] > 1 else slice(0, 1)]
        bias = bias[..., held] if bias.shape[-1] > 1 else bias
        of_heads = slice(None) if e.heads is None or bias.shape[0] == 1 else list(e.heads)
        seen = seen & ~is_hidden(bias[of_heads]).any(0).cpu()
    return seen
