"""Triton backend: what it can do, tile sizes, and the launch. Imports triton only when it is about to run."""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from headstats import probes, recompute
from headstats.call import Call
from headstats.stats import Result

if TYPE_CHECKING:
    from torch import Tensor

IN_KERNEL = ("entropy", "max_prob", "argmax", "distance", "participation")
MAX_HEAD = 256
UNKNOWN = {"bias": "bias", "alibi": "alibi", "segment_mask": "segment_mask", "segment_open": "segment_open",
           "prefix_k": "prefix", "replacement": "Edit.replacement", "temperature": "Edit.temperature",
           "edit_bias": "Edit.bias", "knockout": "Edit.knockout"}  # fmt: skip
# Queries, keys and pipeline stages, for head sizes up to 64, 128 and 256: shapes that spill no register on sm_80
# and sm_90 with every statistic and option on. float32 runs on the plain cores and holds twice the bytes.
HALF_TILES = ((128, 64, 3), (128, 32, 3), (64, 32, 2))
FLOAT32_TILES = ((64, 32, 2), (32, 32, 1), (16, 32, 1))


def unsupported(call: Call) -> str | None:
    """Why this backend cannot do the call, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not call.q.is_cuda and not _interpreted():
        return f"it needs CUDA tensors, and q is on {call.q.device} (for tests, set TRITON_INTERPRET=1 before start)"
    if call.q.dtype == torch.float64:
        return "it computes in float32, and the inputs are float64"
    if max(call.q.shape[3], call.v.shape[3]) > MAX_HEAD:
        return f"head sizes up to {MAX_HEAD} fit, given D={call.q.shape[3]}, Dv={call.v.shape[3]}"
    if unknown := [label for name, label in UNKNOWN.items() if getattr(call, name) is not None]:
        return f"it takes no {', '.join(unknown)}"
    if missing := set(call.spec.requested()) - {*IN_KERNEL, *probes.PROBED}:
        return f"it does not compute {', '.join(sorted(missing))}"
    return None


def _interpreted() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from headstats import forward

    return forward.INTERPRETED


def run(call: Call) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Returns out [B,H,M,Dv], lse [B,H,M] and the requested statistics by name."""
    return recompute.with_gradients(call, launch) if call.trainable else launch(call)


def launch(call: Call) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """The same without gradients."""
    from headstats import forward

    b, h, m, _ = call.q.shape
    asked = call.spec.requested()
    # The kernel walks the head axis with stride 1; other axes may have any stride.
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.q, call.k, call.v))
    out = torch.empty(b, h, m, v.shape[3], dtype=q.dtype, device=q.device)
    rows: dict[str, Any] = {"lse": torch.empty(b, h, m, dtype=torch.float32, device=q.device)}
    for name in IN_KERNEL:
        if name in asked:
            rows[name] = torch.empty_like(rows["lse"], dtype=torch.int64 if name == "argmax" else None)
    gate = None if call.gate is None else call.gate.expand(b, h, m)
    pad = None if call.key_padding is None else call.key_padding.contiguous().view(torch.uint8)
    kernel: Any = forward.attend_kernel
    meta = constants(call, forward.INTERPRETED)
    grid = (b * h * ((m + meta["BM"] - 1) // meta["BM"]),)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        kernel[grid](
            q, k, v, out, rows["lse"], None if call.sinks is None else call.sinks.contiguous(), pad, gate,
            *(rows.get(name) for name in IN_KERNEL),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *(gate.stride() if gate is not None else (0, 0, 0)),
            h, m, k.shape[2], call.window or 0, call.softcap or 0.0, call.scale, **meta,
        )  # fmt: skip
    lse = rows.pop("lse")
    for name in asked:
        if name in probes.PROBED:
            rows[name] = probes.statistic(call, lse, name, asked[name])
    return out, lse, {name: rows[name] for name in asked}


def constants(call: Call, interpreted: bool = False) -> dict[str, Any]:
    """Compile-time arguments of the kernel: sizes, switches and tile shape."""
    asked = call.spec.requested()
    d, dv = call.q.shape[3], call.v.shape[3]
    full = call.q.dtype == torch.float32
    return {
        "G": call.groups, "D": d, "DV": dv, "BD": _power_of_two(d), "BDV": _power_of_two(dv),
        "CAUSAL": call.causal, "WINDOW": call.window is not None, "SOFTCAP": call.softcap is not None,
        "SINKS": call.sinks is not None, "PADDING": call.key_padding is not None, "GATE": call.gate is not None,
        **{name.upper(): name in asked for name in IN_KERNEL},
        "UPCAST": interpreted and not full, "PRECISION": "ieee" if full else "tf32",
        **tile_shape(max(d, dv), full, interpreted),
    }  # fmt: skip


def tile_shape(d: int, full: bool, interpreted: bool = False) -> dict[str, Any]:
    """Queries and keys of a tile, warps and pipeline stages. A fixed table: autotuning needs a driver."""
    if interpreted:
        return {"BM": 16, "BN": 16}
    size = 0 if d <= 64 else 1 if d <= 128 else 2
    bm, bn, stages = (FLOAT32_TILES if full else HALF_TILES)[size]
    return {"BM": bm, "BN": bn, "num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}


def _power_of_two(d: int) -> int:
    return max(16, 1 << (d - 1).bit_length())  # tensor cores want at least 16
