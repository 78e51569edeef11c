"""One autograd function for every backend.

It saves q, k, v, out and norm, and the backward recomputes the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable

from headstats.call import LEAVES, Call, grad_lse_of
from headstats.stats import Result, from_tensors, tensors

if TYPE_CHECKING:
    from torch import Tensor

Forward = Callable[[Call], "tuple[Tensor, Tensor, dict[str, Result]]"]
Backward = Callable[[Call, set[str], "Tensor", "Tensor", "Tensor", "Tensor"], "dict[str, Tensor]"]


def with_gradients(call: Call, forward: Forward, backward: Backward) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Run `forward` so that out and norm have gradients.

    `backward` computes those of LEAVES, autograd those of gate and replacement.

    Statistics have no gradients.
    """
    # The saved out has no gate applied: the gate's own gradient needs it, and a zero gate cannot be divided out.
    bare = replace(call, gate=None, replacement=None)
    if set(LEAVES) & set(call.trainable):
        out, norm, *stats = _Attend.apply(bare, forward, backward, *(getattr(call, name) for name in LEAVES))
        results = from_tensors(call.spec.requested(), stats)  # autograd passes only tensors
    else:
        out, norm, results = forward(bare)
    return call.apply_gate(out), norm, results


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, forward: Forward, backward: Backward, *leaves):
        bare = replace(call, **{n: None if x is None else x.detach() for n, x in zip(LEAVES, leaves, strict=True)})
        out, norm, stats = forward(bare)
        # Only saved tensors are checked for in-place changes and freed after the backward.
        ctx.call = replace(bare, **dict.fromkeys(LEAVES, norm.new_empty(0)))
        ctx.backward = backward
        ctx.save_for_backward(*leaves, out, norm)
        stats = tuple(x for name in call.spec.requested() for x in tensors(stats[name]))
        ctx.mark_non_differentiable(*stats)
        return (out, norm, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_norm, *_):
        *leaves, out, norm = ctx.saved_tensors
        call: Call = replace(ctx.call, **dict(zip(LEAVES, leaves, strict=True)))
        leaf_names = {name for name, need in zip(LEAVES, ctx.needs_input_grad[3:], strict=True) if need}
        grads = ctx.backward(call, leaf_names, out, norm, grad_out, grad_lse_of(grad_norm))
        in_order = (grads[n].to(x.dtype) if n in leaf_names else None for n, x in zip(LEAVES, leaves, strict=True))
        return (None, None, None, *in_order)
