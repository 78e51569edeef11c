"""Gradients by recomputation: from q, k, v, lse and out, tile by tile, whatever backend ran forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import once_differentiable

from headstats.call import Call
from headstats.stats import Result, TopK, tensors
from headstats.tiles import LOG2E, flat, heads_apart, logits, tiles

if TYPE_CHECKING:
    from torch import Tensor

Forward = Callable[[Call], "tuple[Tensor, Tensor, dict[str, Result]]"]


def with_gradients(call: Call, forward: Forward) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Runs `forward` so that out and lse carry gradients to q, k, v and the gate. Statistics carry none."""
    out, lse, *stats = _Attend.apply(call.q, call.k, call.v, call.gate, call, forward)
    rest = iter(stats)  # flat, since autograd passes tensors alone
    found = {name: TopK(next(rest), next(rest)) if name == "topk" else next(rest) for name in call.spec.requested()}
    return out, lse, found


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gate, call: Call, forward: Forward):
        # Out is kept without its gate: the gate's own gradient needs it, and a zero gate cannot be divided out.
        bare = replace(call, q=q.detach(), k=k.detach(), v=v.detach(), gate=None)
        out, lse, stats = forward(bare)
        # Only saved tensors are watched for changes in place and freed after backward.
        nothing = q.new_empty(0)
        ctx.call = replace(bare, q=nothing, k=nothing, v=nothing)
        saved = (q, k, v, out, lse) if gate is None else (q, k, v, out, lse, gate)
        ctx.save_for_backward(*saved)
        stats = tuple(x for name in call.spec.requested() for x in tensors(stats[name]))
        ctx.mark_non_differentiable(*stats)
        gated = out if gate is None else (out.to(call.dtype) * gate[..., None].to(call.dtype)).to(out.dtype)
        return (gated, lse, *stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse, *_):
        q, k, v, out, lse, *gate = ctx.saved_tensors
        call: Call = replace(ctx.call, q=q, k=k, v=v)
        grad_out = grad_out.to(call.dtype)
        grad_gate = None
        if gate:
            if ctx.needs_input_grad[3]:
                grad_gate = (grad_out * out).sum(-1).sum_to_size(gate[0].shape).to(gate[0].dtype)
            grad_out = grad_out * gate[0][..., None].to(call.dtype)
        grads = (None, None, None)
        if any(ctx.needs_input_grad[:3]):
            # Sum_j p_ij dL/dp_ij = dout_i . out_i, less what comes in through lse (d lse / d score = p).
            delta = (grad_out * out).sum(-1) - grad_lse
            grads = qkv_gradients(call, lse, delta, grad_out)
        return (*grads, grad_gate, None, None)


def qkv_gradients(call: Call, lse: Tensor, delta: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d (q, k, v), given d loss / d out before the gate."""
    q, go = heads_apart(call, call.q), heads_apart(call, grad_out)
    # In an empty row all cells are at -1e30, so that any finite lse gives exp() = 0.
    lse = heads_apart(call, lse.masked_fill(lse == -torch.inf, 0) * LOG2E)
    delta = heads_apart(call, delta)
    k, v = call.k.to(call.dtype).contiguous(), call.v.to(call.dtype).contiguous()
    dq = k.new_zeros(q.shape)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for t in tiles(call):
        rows, keys = (t.b, t.h, slice(None), t.i), (t.b, t.h, t.j)
        q_t, go_t = flat(q[rows].to(k.dtype).flatten(2, 3)), flat(go[rows].flatten(2, 3))
        k_t, v_t = flat(k[keys]), flat(v[keys])
        s, tanh = logits(call, t, q_t, k_t)
        shape = s.shape
        p = s.sub_(lse[rows][..., None]).exp2_()
        ds = torch.bmm(go_t, v_t.transpose(1, 2)).view(shape).sub_(delta[rows][..., None]).mul_(p)
        if tanh is not None:
            ds.mul_(1 - tanh.square_())
        p, ds = flat(p.flatten(2, 3)), flat(ds.flatten(2, 3)).mul_(call.scale)
        dq[rows] = torch.bmm(ds, k_t).view(*shape[:-1], -1)
        dk[keys] += torch.bmm(ds.transpose(1, 2), q_t).view(dk[keys].shape)
        dv[keys] += torch.bmm(p.transpose(1, 2), go_t).view(dv[keys].shape)
    return dq.flatten(1, 2).to(call.q.dtype), dk.to(call.k.dtype), dv.to(call.v.dtype)
