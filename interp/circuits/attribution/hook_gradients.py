"""Gradients of a metric at chosen hooks, by one forward pass with a graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from interp.circuits.attribution.qk_fix import Secants
from interp.circuits.fitting import without_weight_gradients
from interp.errors import InterpError, ModelError
from interp.metrics import Metric, Readout
from interp.model.hooks import hooks
from interp.model.model import Model

Override = tuple[str, Any]  # a hook name, and a function that sets the activation there


def first_hook(model: Model) -> str:
    """The hook at which token embeddings enter the model."""
    return "hook_embed" if "hook_embed" in model.bridge.hook_dict else "blocks.0.hook_resid_pre"


def hook_gradients(
    model: Model,
    ids: Sequence[Sequence[int]],
    names: Sequence[str],
    metric: Metric,
    read: Readout,
    *,
    override: Override | None = None,
    drops: Sequence[int] = (),
    secants: Secants | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Yield gradients of the metric by hook name.

    They are summed over a batch of prompts of one length. The plain gradients come first. Then, for each layer in
    ``drops``, come the gradients without the part that flows through the layer's attention and MLP outputs.
    ``override`` is a hook that sets an activation; ``secants`` replaces slopes by secants during the backward pass.
    Raises InterpError for a metric without a gradient.
    """
    inputs: dict[str, Tensor] = {}
    dropped: list[int] = []
    pairs: list[tuple[str, Any]] = [(first_hook(model), lambda x, hook: x.detach().requires_grad_())]
    if override is not None:
        pairs.append(override)
    pairs += [(name, _copy_into(inputs, name)) for name in names]
    if secants is not None:
        pairs += secants.hooks()
    for layer in drops:
        gate = _gradient_gate(layer, dropped)
        pairs += [(name, gate) for name in _output_hooks(model, layer)]
    with without_weight_gradients(model), torch.enable_grad(), hooks(model, *pairs):
        total = metric(model.last_logits(ids), read).sum()
    if not total.requires_grad:
        raise InterpError(f"metric {metric.name!r} has no gradient: attribution needs one")
    for layers in ([], *([x] for x in drops)):
        dropped[:] = layers
        is_last = not drops or layers == [drops[-1]]
        grads = torch.autograd.grad(total, list(inputs.values()), materialize_grads=True, retain_graph=not is_last)
        yield dict(zip(inputs, grads, strict=True))


def _copy_into(copies: dict[str, Tensor], name: str) -> Any:
    """A hook that replaces the activation by a copy, for gradients at the copy.

    The copy is stored in ``copies`` under ``name``.
    """

    def hook(x: Tensor, hook: Any) -> Tensor:
        copies[name] = x.clone()
        return copies[name]

    return hook


def _gradient_gate(layer: int, dropped: Sequence[int]) -> Any:
    """A hook whose gradient is zero while ``dropped`` contains the layer."""

    def hook(x: Tensor, hook: Any) -> Tensor | None:
        if not x.requires_grad:
            return None
        x = x.clone()
        x.register_hook(lambda g: torch.zeros_like(g) if layer in dropped else g)
        return x

    return hook


def _output_hooks(model: Model, layer: int) -> list[str]:
    """The hooks of a layer's attention and MLP outputs.

    Raises ModelError if it has neither.
    """
    names = [f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"]
    names = [name for name in names if name in model.bridge.hook_dict]
    if not names:
        raise ModelError(f"{model.name}: the outputs of layer {layer} have no hook: use grad_drop=False")
    return names
