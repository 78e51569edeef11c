"""Gradients by recomputation: from q, k, v, lse and out, tile by tile, whatever backend ran forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable

from headstats.call import LEAVES, Call
from headstats.shaping import Shaping
from headstats.stats import Result, TopK, tensors
from headstats.tiles import LOG2E, Keys, collect, heads_apart, keys_and_values, logits, mixed, of_cells, scores, tiles

if TYPE_CHECKING:
    from torch import Tensor

Forward = Callable[[Call], "tuple[Tensor, Tensor, dict[str, Result]]"]


def with_gradients(call: Call, forward: Forward) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Runs `forward` so that out and lse carry gradients to LEAVES, gate and replacement. Statistics carry none."""
    # Out is kept without its gate: the gate's own gradient needs it, and a zero gate cannot be divided out.
    bare = replace(call, gate=None, replacement=None)
    if set(LEAVES) & set(call.trainable):
        out, lse, *stats = _Attend.apply(bare, forward, *(getattr(call, name) for name in LEAVES))
        rest = iter(stats)  # flat, since autograd passes tensors alone
        asked = call.spec.requested()
        found = {name: TopK(next(rest), next(rest)) if name == "topk" else next(rest) for name in asked}
    else:
        out, lse, found = forward(bare)
    return call.gated(out), lse, found


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
        wanted = {name for name, need in zip(LEAVES, ctx.needs_input_grad[2:], strict=True) if need}
        found = gradients(call, wanted, lse, delta, grad_out)
        grads = (found[n].to(x.dtype) if n in wanted else None for n, x in zip(LEAVES, leaves, strict=True))
        return (None, None, *grads)


def gradients(call: Call, wanted: set[str], lse: Tensor, delta: Tensor, grad_out: Tensor) -> dict[str, Tensor]:
    """d loss / d (q, k, v, prefix) and what else of LEAVES is wanted, given d loss / d out before the gate."""
    q, go = heads_apart(call, call.q), heads_apart(call, grad_out)
    # In an empty row all cells are at -1e30, so that any finite lse gives exp() = 0.
    empty = lse == -torch.inf
    lse = heads_apart(call, lse.masked_fill(empty, 0) * LOG2E)
    delta = heads_apart(call, delta.masked_fill(empty, 0))
    k, v = keys_and_values(call)
    dq = k.own.new_zeros(q.shape)
    dk, dv = (Keys(torch.zeros_like(x.own), None if x.shared is None else torch.zeros_like(x.shared)) for x in (k, v))
    shaping = Shaping(call, wanted)
    for t in tiles(call):
        rows = (t.b, t.h, slice(None), t.i)
        q_t, go_t, delta_t = q[rows].to(call.dtype), go[rows], delta[rows][..., None]
        s, tanh = logits(call, t, q_t, k)
        kept = s.clone() if "temperature" in shaping.grads else None
        p = s.sub_(lse[rows][..., None]).exp2_()
        ds = scores(go_t, v, t)
        cut = None if call.knockout is None or call.renormalise else of_cells(call, t, call.knockout)
        if cut is not None:
            ds.masked_fill_(cut, 0)
        ds.sub_(delta_t).mul_(p)
        shaping.back(t, ds, kept, delta_t[..., 0], lse[rows])
        if tanh is not None:
            ds.mul_(1 - tanh.square_())
        ds.mul_(call.scale)
        dq[rows] = mixed(ds, k, t)
        collect(dk, t, ds, q_t)
        collect(dv, t, p if cut is None else p.masked_fill_(cut, 0), go_t)
    found = {"q": dq.flatten(1, 2), "k": dk.own, "v": dv.own, **shaping.grads}
    return found | {name: x.shared for name, x in (("prefix_k", dk), ("prefix_v", dv)) if x.shared is not None}
