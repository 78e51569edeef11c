"""Memory that a context length needs.

It covers weights, key/value cache, activations, and dense attention for comparison.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interp.model.attention_call import AttentionCall
from interp.model.model import Model

SHORT, LONG = 128, 256  # lengths in tokens at which a forward's peak is measured, then extrapolated linearly
PATTERN_BYTES = 4  # softmax is taken in float32


class PeakMemory(TorchDispatchMode):
    """Count the bytes of tensors that are new inside the block and still alive.

    ``peak`` is the maximum. Memory that a compiled kernel allocates outside PyTorch tensors is not counted.
    """

    def __init__(self, before: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._counted = {t.untyped_storage()._cdata for t in before}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._counted:
            return
        self._counted.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self.now -= size


@torch.no_grad()
def forward_peak(model: Model, length: int) -> int:
    """Peak bytes of one forward of ``length`` tokens, besides the weights."""
    tokens = torch.arange(length, device=model.device).remainder(int(model.bridge.cfg.d_vocab))[None]
    present = [*model.bridge.parameters(), *model.bridge.buffers(), tokens]
    with PeakMemory(present) as meter:
        model.forward(tokens)
    return meter.peak


def memory_needs(model: Model, calls: list[AttentionCall], context: int) -> dict[str, tuple[int, str]]:
    """Bytes by purpose, and how they were determined.

    They are for one prompt of ``context`` tokens; ``calls`` has one call per layer.
    """
    tensors = {id(t): t for t in [*model.bridge.parameters(), *model.bridge.buffers()]}
    weights = sum(t.numel() * t.element_size() for t in tensors.values())
    cache = dense = 0
    for call in calls:
        cached_tokens = min(context, call.window or context)
        width = call.k.shape[1] * (call.k.shape[-1] + call.v.shape[-1])
        cache += cached_tokens * width * call.k.element_size()
        dense += call.q.shape[1] * context**2 * PATTERN_BYTES
    short, long = min(SHORT, model.n_ctx // 2), min(LONG, model.n_ctx)
    low, high = forward_peak(model, short), forward_peak(model, long)
    slope = (high - low) / (long - short)
    head = int(model.bridge.cfg.d_vocab) * calls[0].q.element_size()
    one_layer = dense // len(calls)
    return {
        "weights": (weights, "parameters and buffers"),
        "key/value cache": (cache, "while generating; layers with a window keep only the window"),
        "activations": (
            max(int(high + slope * (context - long)), high),
            f"one forward, logits of the last position; measured at {short} and {long} tokens, extrapolated linearly",
        ),
        "all positions' logits": (context * head, "if a forward returns all of them"),
        "dense attention, one layer": (2 * one_layer, "scores and pattern in float32: this model does not need them"),
        "dense attention, all layers": (dense, "all patterns kept, as in a cache of hook_pattern"),
    }
