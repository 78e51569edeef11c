"""Gradients by recomputation: from q, k, v, lse and out, tile by tile, whatever backend ran forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable

from headstats.call import Call
from headstats.stats import Result, TopK, tensors
from headstats.tiles import LOG2E, Keys, collect, heads_apart, keys_and_values, logits, mixed, scores, tiles

if TYPE_CHECKING:
    from torch import Tensor

LEAVES = ("q", "k", "v", "prefix_k", "prefix_v")  # what recomputation differentiates
Forward = Callable[[Call], "tuple[Tensor, Tensor, dict[str, Result]]"]


def with_gradients(call: Call, forward: Forward) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Runs `forward` so that out and lse carry gradients to LEAVES and the gate. Statistics carry none."""
    # Out is kept without its gate: the gate's own gradient needs it, and a zero gate cannot be divided out.
    bare = replace(call, gate=None)
    if set(LEAVES) & set(call.trainable):
        out, lse, *stats = _Attend.apply(bare, forward, *(getattr(call, name) for name in LEAVES))
        rest = iter(stats)  # flat, since autograd passes tensors alone
        asked = call.spec.requested()
        found = {name: TopK(next(rest), next(rest)) if name == "topk" else next(rest) for name in asked}
    else:
        out, lse, found = forward(bare)
    if call.gate is not None:
        out = (out.to(call.dtype) * call.gate[..., None].to(call.dtype)).to(out.dtype)
    return out, lse, found


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: Call, forward: Forward, *leaves):
        bare = replace(call, **{n: None if x is None else x.detach() for n, x in zip(LEAVES, leaves, strict=True)})
        out, lse, stats = forward(bare)
        # Only saved tensors are watched for changes in place and freed after backward.
        ctx.call = replace(bare, **dict.fromkeys(LEAVES, lse.new_empty(0)))
        ctx.save_for_backward(*leaves, out, lse)
        stats = tuple(x for name in call.spec.requested() for x in tensors(stats[name]))
        ctx.mark_non_differentiable(*stats)
        return (out, lse, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse, *_):
        *leaves, out, lse = ctx.saved_tensors
        call: Call = replace(ctx.call, **dict(zip(LEAVES, leaves, strict=True)))
        grad_out = grad_out.to(call.dtype)
        # Sum_j p_ij dL/dp_ij = dout_i . out_i, less what comes in through lse (d lse / d score = p).
        delta = (grad_out * out).sum(-1) - grad_lse
        found = gradients(call, lse, delta, grad_out)
        grads = (None if x is None else found[n].to(x.dtype) for n, x in zip(LEAVES, leaves, strict=True))
        return (None, None, *grads)


def gradients(call: Call, lse: Tensor, delta: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """d loss / d each of LEAVES that there is, given d loss / d out before the gate."""
    q, go = heads_apart(call, call.q), heads_apart(call, grad_out)
    # In an empty row all cells are at -1e30, so that any finite lse gives exp() = 0.
    lse = heads_apart(call, lse.masked_fill(lse == -torch.inf, 0) * LOG2E)
    delta = heads_apart(call, delta)
    k, v = keys_and_values(call)
    dq = k.own.new_zeros(q.shape)
    dk, dv = (Keys(torch.zeros_like(x.own), None if x.shared is None else torch.zeros_like(x.shared)) for x in (k, v))
    for t in tiles(call):
        rows = (t.b, t.h, slice(None), t.i)
        q_t, go_t = q[rows].to(call.dtype), go[rows]
        s, tanh = logits(call, t, q_t, k)
        p = s.sub_(lse[rows][..., None]).exp2_()
        ds = scores(go_t, v, t).sub_(delta[rows][..., None]).mul_(p)
        if tanh is not None:
            ds.mul_(1 - tanh.square_())
        ds.mul_(call.scale)
        dq[rows] = mixed(ds, k, t)
        collect(dk, t, ds, q_t)
        collect(dv, t, p, go_t)
    found = {"q": dq.flatten(1, 2), "k": dk.own, "v": dv.own}
    return found | {name: x.shared for name, x in (("prefix_k", dk), ("prefix_v", dv)) if x.shared is not None}
