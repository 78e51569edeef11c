"""Gradients of a metric at every receiver's input.

Layers are processed from the last to the first. A forward pass stores the input of each block, and no graph. Then each
block is computed again, alone and with a graph, and the gradient at its output is carried back to its input. All q, k,
v and MLP inputs take one backward pass, at the price of a second forward. Besides residual streams, only one block's
activations exist at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.fitting import without_weight_gradients
from interp.circuits.wiring import Wiring, tolerance
from interp.errors import InterpError, ModelError
from interp.metrics import Metric, Readout
from interp.model.hooks import hooks

Override = tuple[str, Any]  # a hook that sets an activation


@dataclass
class LayerGradients:
    """Gradients at one layer's receivers, with the streams that its norms read.

    ``grads``: "q", "k", "v" [batch, position, heads, d_head] and "mlp" [batch, position, d_model], after the norms.
    ``streams``: "attn" and "mlp" [batch, position, d_model]. The logits count as a separate layer after the last one,
    whose only gradient is "logits" [batch, position, d_model].
    """

    layer: int
    grads: dict[str, Tensor]
    streams: dict[str, Tensor]

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return sum(t.numel() * t.element_size() for t in (*self.grads.values(), *self.streams.values()))


def stream_gradients(
    wiring: Wiring,
    ids: Sequence[Sequence[int]],
    metric: Metric,
    read: Readout,
    override: Override | None,
    receive: Callable[[LayerGradients], None],
) -> None:
    """Pass each layer's gradients of the metric to ``receive``.

    Gradients are summed over prompts of one length. The logits come first, then the layers from the last to the first.
    ``override`` is a hook that sets an activation in both passes. Raises InterpError for a metric without a gradient.
    """
    with without_weight_gradients(wiring.model), torch.enable_grad():
        _Backward(wiring, override)(ids, metric, read, receive)


class _Backward:
    """One forward and the block-by-block backward pass.

    Attributes hold the state of the current block.
    """

    def __init__(self, wiring: Wiring, override: Override | None):
        self.wiring, self.model, self.graph, self.override = wiring, wiring.model, wiring.graph, override
        self.recomputing = False  # True in the second pass, block by block
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []  # arguments of each block
        self.final: Tensor | None = None  # the stream after the last block, with a gradient
        self.leaf: Tensor | None = None  # the current block's input
        self.copies: dict[str, Tensor] = {}  # by receiver: its input, read by that receiver alone
        self.streams: dict[str, Tensor] = {}  # residual streams that the current block's norms read

    def __call__(
        self,
        ids: Sequence[Sequence[int]],
        metric: Metric,
        read: Readout,
        receive: Callable[[LayerGradients], None],
    ) -> None:
        n = self.graph.n_layers
        with ExitStack() as stack:
            stack.enter_context(hooks(self.model, *self._hooks()))
            for block in self.model.bridge.blocks:
                stack.callback(block.register_forward_pre_hook(self._keep_call, with_kwargs=True).remove)
            logits = self.model.last_logits(ids)
            total = metric(logits, read).sum()
            if not total.requires_grad:
                raise InterpError(f"metric {metric.name!r} has no gradient: attribution needs one")
            if not total.isfinite():
                raise InterpError(f"metric {metric.name!r} returned NaN or infinity: attribution needs a number")
            assert self.final is not None and len(self.calls) == n, "some blocks were not run"
            (leaving,) = torch.autograd.grad(total, self.final)
            del logits, total
            receive(LayerGradients(n, {"logits": leaving}, {}))
            self.recomputing, after = True, self.final.detach()
            self.final = None
            if (edited := self.model.instrument.edited) is not None:
                stack.enter_context(edited.repeating())
            for layer in reversed(range(n)):
                leaving, after = self._back(layer, leaving, after, receive)

    def _back(
        self, layer: int, leaving: Tensor, after: Tensor, receive: Callable[[LayerGradients], None]
    ) -> tuple[Tensor, Tensor]:
        """Carry the gradient at a block's output back to its input; return both."""
        args, kwargs = self.calls.pop()
        out = self.model.bridge.blocks[layer](*args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        self._check_recomputed(out.detach(), after, layer)
        assert self.leaf is not None
        names, copies = list(self.copies), list(self.copies.values())
        inputs = [self.leaf, *copies]
        # None: no gradient passes an activation that was set
        maybe_grads = torch.autograd.grad(out, inputs, leaving, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, maybe_grads, strict=True)]
        entered, streams = _hidden(args, kwargs), self.streams
        self.leaf, self.copies, self.streams = None, {}, {}
        del out, copies, inputs, maybe_grads
        receive(LayerGradients(layer, dict(zip(names, grads[1:], strict=True)), streams))
        return grads[0], entered

    def _check_recomputed(self, got: Tensor, want: Tensor, layer: int) -> None:
        gap = (got - want).abs().max().item()
        if not gap <= tolerance(want.dtype) * max(1.0, want.abs().max().item()):
            raise ModelError(
                f"{self.model.name}, layer {layer}: computed again, its output differs by {gap:.1e}, so gradients "
                "cannot be taken block by block. Is the model in evaluation mode (model.eval()), without a cache?"
            )

    # ------------------------------------------------------------ hooks

    def _hooks(self) -> Iterator[Override]:
        if self.override is not None:
            yield self.override  # first, so that the other hooks see the value it sets
        for layer in range(self.graph.n_layers):
            at = f"blocks.{layer}."
            yield at + "hook_resid_pre", self._enter
            for c in "qkv":
                yield f"{at}attn.hook_{c}", self._branch(c)
            if self.graph.mlps:
                if not self.graph.parallel:
                    yield at + "hook_resid_mid", self._store_mlp_stream
                yield at + "mlp.hook_in", self._branch("mlp")
        yield f"blocks.{self.graph.n_layers - 1}.hook_resid_post", self._leave

    def _keep_call(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.recomputing:
            self.calls.append((args, kwargs))

    def _enter(self, x: Tensor, hook: Any) -> Tensor | None:
        if not self.recomputing:
            return None
        self.leaf = x.detach().requires_grad_()
        self.streams["attn"] = x.detach()
        if self.graph.parallel:
            self.streams["mlp"] = x.detach()
        return self.leaf.clone()  # a block may write into its input in place

    def _store_mlp_stream(self, x: Tensor, hook: Any) -> None:
        if self.recomputing:
            self.streams["mlp"] = x.detach()

    def _branch(self, name: str) -> Any:
        """A hook that passes on a copy, whose gradient is that of its reader alone."""

        def hook(x: Tensor, hook: Any) -> Tensor | None:
            if not self.recomputing:
                return None
            self.copies[name] = x.clone()
            return self.copies[name]

        return hook

    def _leave(self, x: Tensor, hook: Any) -> Tensor | None:
        if self.recomputing:
            return None
        self.final = x.detach().requires_grad_()
        return self.final


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among a block's arguments."""
    return args[0] if args else kwargs["hidden_states"]


def through_norm(
    norm: Any, x: Float[Tensor, "*rows d_model"], grads: Float[Tensor, "receivers *rows d_model"]
) -> Float[Tensor, "receivers *rows d_model"]:
    """Vector–Jacobian products of a norm at ``x``, one for each receiver."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        normed = norm(leaf)
        if normed is leaf:  # an identity: the model has no norm here
            return grads
        return torch.autograd.grad(normed, leaf, grads, is_grads_batched=True)[0]
