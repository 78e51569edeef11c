"""Record activations and attention calls of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from interp.errors import ModelError
from interp.model.attention_call import AttentionCall
from interp.model.hooks import hooks
from interp.model.instrument import attend
from interp.model.model import Model


def capture(model: Model, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, Tensor]:
    """One forward of prompts of one length: activations by hook name, and ``"logits"`` [batch, vocab].

    ModelError if a hook is not there or did not fire.
    """
    found: dict[str, Tensor] = {}
    known = model.bridge.hook_dict

    def keep(name: str) -> tuple[str, Any]:
        return name, lambda x, hook: found.__setitem__(name, x.detach())

    absent = next((n for n in names if n not in known), None)
    if absent is None:
        with torch.no_grad(), hooks(model, *map(keep, names)):
            found["logits"] = model.last_logits(torch.tensor([list(p) for p in prompts], device=model.device))
        absent = next((n for n in names if n not in found), None)
    if absent is not None:
        raise ModelError(f"{model.name} has no {absent}: its edges cannot be told apart")
    return found


@contextmanager
def capture_calls(model: Model) -> Iterator[dict[int, AttentionCall]]:
    """Inside, the attention calls of a forward are kept, by layer."""
    kept: dict[int, AttentionCall] = {}

    def keep(call: AttentionCall) -> Tensor:
        result = attend(call, backend=model.instrument.backend)
        kept[call.layer] = replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach())
        return result.out

    with model.instrument.handled_by(keep):
        yield kept
