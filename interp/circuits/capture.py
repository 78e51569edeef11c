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
from interp.model.edited_attention import attend
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.model.session import in_session


@in_session
def capture(model: Model, prompts: Sequence[Sequence[int]], names: Sequence[str]) -> dict[str, Tensor]:
    """Run prompts of one length, and return activations by hook name.

    The key ``"logits"`` holds the logits [batch, vocab]. Raises ModelError if the model lacks a hook or the hook did
    not fire.
    """
    acts: dict[str, Tensor] = {}

    def recorder(name: str) -> tuple[str, Any]:
        def record(x: Tensor, hook: object) -> None:
            acts[name] = x.detach()

        return name, record

    hook_names = model.bridge.hook_dict
    missing = next((n for n in names if n not in hook_names), None)
    if missing is None:
        with torch.no_grad(), hooks(model, *map(recorder, names)):
            acts["logits"] = model.last_logits(prompts)
        missing = next((n for n in names if n not in acts), None)
    if missing is not None:
        raise ModelError(f"{model.name} has no {missing}: its edges cannot be told apart")
    return acts


@contextmanager
def capture_calls(model: Model) -> Iterator[dict[int, AttentionCall]]:
    """Inside the block, store the latest attention call of each layer, by layer.

    Tensors are stored without gradients.
    """
    calls: dict[int, AttentionCall] = {}

    def record(call: AttentionCall) -> Tensor:
        result = attend(call, backend=model.instrument.backend)
        calls[call.layer] = replace(call, q=call.q.detach(), k=call.k.detach(), v=call.v.detach())
        return result.out

    with model.instrument.handled_by(record):
        yield calls
