"""Launch of the Triton backward kernels, for the gradients that they compute."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch

from headstats.call import LN2, LOG2E, Call
from headstats.triton import kernel_arguments as arguments

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

COMPUTED = ("q", "k", "v", "prefix_k", "prefix_v", "temperature", "sinks", "alibi")
# Fields of a call that the kernels read, and fields that do not act on weights.
READ = (
    "q", "k", "v", "causal", "window", "softcap", "scale", "bias", "alibi", "sinks", "prefix_k", "prefix_v",
    "key_padding", "q_segments", "k_segments", "segment_mask", "segment_open", "temperature", "edit_bias", "knockout",
    "gain", "edit_q_segments", "spec", "query_padding", "n_segments", "targets", "key_features", "gate", "replacement",
)  # fmt: skip
OF_KEYS = {"k", "v", "prefix_k", "prefix_v"}
# Queries, keys and pipeline stages, for head sizes up to 64, 128 and 256.
HALF_TILES = ((64, 64, 2), (32, 64, 2), (32, 32, 1))
FLOAT32_TILES = ((32, 32, 1), (16, 32, 1), (16, 16, 1))


def unsupported(call: Call, leaf_names: set[str]) -> list[str]:
    """Return what the kernels do not support in a call.

    These are requested gradients that they do not compute, and fields of the call that they do not read.
    """
    unread = [f.name for f in fields(call) if f.name not in READ and getattr(call, f.name) is not f.default]
    return [*sorted(leaf_names - set(COMPUTED)), *unread]


def backward(
    call: Call, leaf_names: set[str], out: Tensor, norm: Tensor, grad_out: Tensor, grad_lse: Tensor
) -> dict[str, Tensor]:
    """Return d loss / d leaf by name for the requested leaves.

    Given are out, norm (see `call.lse_of`) and d loss / d (out, lse).

    `unsupported` must be empty for the call and the requested leaves.
    """
    empty = norm[1] == -torch.inf
    grad_lse = grad_lse.masked_fill(empty, 0)
    delta = ((grad_out.float() * out).sum(-1) - grad_lse).masked_fill(empty, 0)
    rows = (
        arguments.unit_stride(call.q),
        arguments.unit_stride(grad_out.to(call.q.dtype)),
        norm.contiguous(),
        delta,
    )
    grads = gradients_of_keys(call, *rows) if leaf_names & OF_KEYS else {}
    if leaf_names - OF_KEYS:
        per_row = {name: torch.empty_like(delta) for name in ("temperature", "alibi") if name in leaf_names}
        grads["q"] = gradient_of_queries(call, *rows, per_row)
        grads |= _row_gradients(call, leaf_names, norm, delta, grad_lse, per_row)
    return grads


def _row_gradients(
    call: Call, leaf_names: set[str], norm: Tensor, delta: Tensor, grad_lse: Tensor, per_row: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Return the gradients of arguments that act on whole rows and heads.

    per_row: the kernel's sums over keys.
    """
    grads = {}
    temperature = None if call.temperature is None else call.temperature.float()
    if "alibi" in leaf_names:
        grads["alibi"] = -per_row["alibi"].sum((0, 2))
    total = per_row.get("temperature", torch.zeros(()))  # sum of ds (logit - shift), including the learned sink
    if call.sinks is not None:
        sink = call.sinks.float()[None, :, None]
        sink = sink if temperature is None else sink / temperature
        d_sink = -torch.exp2((sink * LOG2E - norm[0]) - norm[1]).masked_fill(norm[1] == -torch.inf, 0) * delta
        if "sinks" in leaf_names:
            grads["sinks"] = (d_sink if temperature is None else d_sink / temperature).sum((0, 2))
        if "temperature" in leaf_names:
            total = total + d_sink * (sink - norm[0] * LN2)
    if "temperature" in leaf_names:
        assert temperature is not None  # it requires a gradient
        total = total + grad_lse * norm[0] * LN2  # the sum of ds is d loss / d lse
        grads["temperature"] = (-total / temperature).sum_to_size(temperature.shape)
    return grads


def gradients_of_keys(
    call: Call, q: Tensor, go: Tensor, norm: Tensor, delta: Tensor
) -> dict[str, Float[Tensor, "... D"]]:
    """Return the gradients of k, v and the prefix."""
    from headstats.triton import backward, forward

    kernel: Any = backward.keys_gradient_kernel
    meta, grads = constants(call, forward.INTERPRETED), {}
    prefix, run = arguments.prefix(call)
    regions: list[Any] = [("k", "v", arguments.keys(call.k, call.v), call.n - call.k.shape[2], 1)]
    if prefix is not None:
        regions.append(("prefix_k", "prefix_v", prefix, 0, run))
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        for k, v, region, first, share in regions:
            grads[k], grads[v] = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in region[:2])
            blocks = region.k.shape[0] * region.k.shape[1] * -(-region.n // meta["BN"])
            kernel[(blocks,)](
                q, q.stride()[:3], region, go, go.stride()[:3], norm[0], norm[1], delta, grads[k], grads[v],
                arguments.cells(call), q.shape[1], q.shape[2], call.n, first, share, **meta,
            )  # fmt: skip
    return grads


def gradient_of_queries(
    call: Call, q: Tensor, go: Tensor, norm: Tensor, delta: Tensor, per_row: dict[str, Tensor]
) -> Float[Tensor, "B H M D"]:
    """Return the gradient of q.

    per_row is filled with sum_j ds (logit - shift) (temperature) and sum_j dx distance (alibi).
    """
    from headstats.triton import backward, forward

    b, h, m, _ = q.shape
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    meta = constants(call, forward.INTERPRETED)
    prefix, run = arguments.prefix(call)
    kernel: Any = backward.queries_gradient_kernel
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        kernel[(b * h * -(-m // meta["BM"]),)](
            q, q.stride()[:3], arguments.keys(call.k, call.v), prefix, go, go.stride()[:3], norm[0], norm[1], delta, dq,
            per_row.get("temperature"), per_row.get("alibi"), arguments.cells(call), h, m, call.n, run, **meta,
        )  # fmt: skip
    return dq


def constants(call: Call, interpreted: bool = False) -> dict[str, Any]:
    """Return the compile-time arguments of both kernels.

    They are sizes, precision and tile shape.
    """
    d, dv = call.q.shape[3], call.v.shape[3]
    full = call.q.dtype == torch.float32
    sizes = {
        "G": call.groups,
        "D": d,
        "DV": dv,
        "BD": arguments.power_of_two(d),
        "BDV": arguments.power_of_two(dv),
    }
    switches = {"UPCAST": interpreted and not full, "PRECISION": "ieee" if full else "tf32"}
    if interpreted:
        return sizes | switches | {"BM": 16, "BN": 16}
    size = 0 if max(d, dv) <= 64 else 1 if max(d, dv) <= 128 else 2
    bm, bn, stages = (FLOAT32_TILES if full else HALF_TILES)[size]
    return sizes | switches | {"BM": bm, "BN": bn, "num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}
