"""The Triton backend: what it can do, its tile sizes, and its launches.

Imports triton only before it runs.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from headstats import probes
from headstats.call import Call
from headstats.edits import lowering
from headstats.spec import StatSpec
from headstats.stats import Result, Value
from headstats.triton import kernel_arguments as arguments
from headstats.triton import per_key_values

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Results = tuple[Tensor, Tensor, dict[str, Result]]

IN_KERNEL = (
    "entropy", "entropy_normalised", "max_prob", "argmax", "participation", "effective_keys", "distance",
    "distance_var", "waad", "local", "value_norm",
)  # fmt: skip
COLUMNS = ("received", "received_max", "column_norm", "fai")  # a second pass
PER_KEY = ("segments", "key_features", "segment_value_norms", "segment_outputs")
FEATURES_IN_PASS = 16  # features averaged in the main pass; further ones take additional passes
MAX_HEAD = 256
AMD = torch.version.hip is not None
PROBE_ROWS = 32  # queries of one program
# Queries, keys and pipeline stages, for head sizes up to 64, 128 and 256: shapes that spill no register on sm_80
# and sm_90 with every statistic and option on. float32 runs without tensor cores and needs twice the bytes.
HALF_TILES = ((128, 64, 3), (128, 32, 3), (64, 32, 2))
FLOAT32_TILES = ((64, 32, 1), (32, 32, 1), (16, 32, 1))


def unsupported(call: Call) -> str | None:
    """Return why this backend cannot do the call, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not call.q.is_cuda and not _interpreted():
        return f"it needs CUDA tensors, and q is on {call.q.device} (for tests, set TRITON_INTERPRET=1 before start)"
    if call.q.dtype == torch.float64:
        return "it computes in float32, and the inputs are float64"
    if max(call.q.shape[3], call.v.shape[3]) > MAX_HEAD:
        return f"head sizes up to {MAX_HEAD} fit, given D={call.q.shape[3]}, Dv={call.v.shape[3]}"
    if (reason := lowering.unsupported(call, MAX_HEAD)) is not None:
        return reason
    if missing := set(call.spec.requested()) - {*IN_KERNEL, *PER_KEY, *COLUMNS, *probes.PROBED, "topk"}:
        return f"it does not compute {', '.join(sorted(missing))}"
    return None


def _interpreted() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from headstats.triton import forward

    return forward.INTERPRETED


def forward(call: Call) -> Results:
    """Return out [B,H,M,Dv], norm [2,B,H,M] (see `call.lse_of`) and the requested statistics by name."""
    call = per_key_values.separate_prefixes(lowering.lower(call, lambda part: forward_pass(part, None), MAX_HEAD))
    requested, features = call.spec.requested(), per_key_values.features(call)
    out, norm, stats = forward_pass(call, None if features is None else features[..., :FEATURES_IN_PASS])
    for name, value in requested.items():
        if name in probes.PROBED:
            stats[name] = probe(call, norm, name, value)
    if set(COLUMNS) & set(requested):
        from headstats.triton import columns

        stats |= columns.statistics(call, norm)
    if call.spec.topk:
        from headstats.triton import topk

        stats["topk"] = topk.topk(call, norm)
    if features is not None:
        more_features = features[..., FEATURES_IN_PASS:]
        per_key = stats["per_key"]
        if more_features.shape[2]:
            per_key = torch.cat([per_key, average(call, *per_key_values.of_heads(call, more_features))], -1)
        s = call.n_segments if call.spec.segments else 0
        stats |= {"segments": per_key[..., :s], "key_features": per_key[..., s:]}
    if call.spec.segment_value_norms:
        stats["segment_value_norms"] = average(call, *per_key_values.segment_value_norms(call))
    if call.spec.segment_outputs:
        each = [average(call, *per_key_values.values_of_segment(call, s)) for s in range(call.n_segments)]
        stats["segment_outputs"] = torch.stack(each, 3)
    return out, norm, {name: stats[name] for name in requested}


def average(
    call: Call, own: Float[Tensor, "#B #Hk n F"], shared: Float[Tensor, "#G #Hk P F"] | None
) -> Float[Tensor, "B H M F"]:
    """Sum numbers of keys under p, by passes with these numbers in place of values.

    There is one pass for every MAX_HEAD numbers.
    """
    plain = replace(call, gate=None, replacement=None, spec=StatSpec.none())
    sums = []
    for at in range(0, own.shape[3], MAX_HEAD):
        columns = slice(at, at + MAX_HEAD)
        first = None
        if shared is not None and call.prefix_k is not None:
            first = shared[..., columns].expand(*call.prefix_k.shape[:3], -1)
        sums.append(
            forward_pass(replace(plain, v=own[..., columns].expand(*call.k.shape[:3], -1), prefix_v=first), None)[0]
        )
    return torch.cat(sums, -1)


def forward_pass(call: Call, features: Float[Tensor, "#B N F"] | None) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Run the main kernel.

    Returns out, norm, and by name the statistics of IN_KERNEL and `per_key` (sums of features).
    """
    from headstats.triton import forward

    kernel: Any = forward.attend_kernel
    blocks, arrays, meta, results = prepare(call, features, forward.INTERPRETED)
    with torch.cuda.device(call.q.device) if call.q.is_cuda else nullcontext():
        kernel[(blocks,)](*arrays, **meta)
    return results


def prepare(
    call: Call, features: Float[Tensor, "#B N F"] | None, interpreted: bool = False, amd: bool = AMD
) -> tuple[int, tuple[Any, ...], dict[str, Any], tuple[Tensor, Tensor, dict[str, Any]]]:
    """Return the number of programs, the arguments and the results of the kernel.

    The third item holds the compile-time arguments. The results are the tensors that the kernel fills.
    """
    b, h, m, _ = call.q.shape
    q = arguments.unit_stride(call.q)
    out = torch.empty(b, h, m, call.v.shape[3], dtype=call.v.dtype, device=q.device)
    norm = torch.empty(2, b, h, m, dtype=torch.float32, device=q.device)
    requested, spec = call.spec.requested(), call.spec
    stats: dict[str, Any] = {
        name: torch.empty_like(norm[0], dtype=torch.int64 if name == "argmax" else None)
        for name in IN_KERNEL if name in requested
    }  # fmt: skip
    numbers: dict[str, Any] = {"waad_window": spec.waad or None, "local_window": spec.local or None}
    numbers["reach"] = max(spec.waad, spec.local) or None
    if features is not None:
        features = features.contiguous()
        stats["per_key"] = norm.new_empty(b, h, m, features.shape[2])
        numbers |= {"features": features, "n_features": features.shape[2]}
        numbers["features_stride"] = arguments.batch_stride(features)
    prefix, run = arguments.prefix(call)
    meta = constants(call, interpreted, amd)
    arrays = (
        q, q.stride()[:3], arguments.keys(call.k, call.v), prefix, out, norm[0], norm[1], arguments.cells(call),
        arguments.Outputs(**stats, **numbers), arguments.ends(call), h, m, call.n, run,
    )  # fmt: skip
    rows = m * (run or 1)
    return b // (run or 1) * h * -(-rows // meta["BM"]), arrays, meta, (out, norm, stats)


def probe(call: Call, norm: Float[Tensor, "2 B H M"], name: str, value: Value) -> Tensor:
    """Compute a statistic of keys known in advance, in a separate kernel.

    In the main kernel it would cost registers.
    """
    from headstats.triton import probe_kernel

    b, h, m, d = call.q.shape
    keys, total = probes.keys_of(call, name, value).contiguous(), name != "targets"
    t = keys.shape[2]
    q = arguments.unit_stride(call.q)
    out = norm.new_empty((b, h, m) if total else (b, h, m, t))
    kernel: Any = probe_kernel.weigh_cells_kernel
    prefix, run = arguments.prefix(call)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        kernel[(b * h * -(-m // PROBE_ROWS),)](
            q, q.stride()[:3], arguments.keys(call.k, call.v), prefix, keys, arguments.strides(keys, 2),
            norm[0], norm[1], out, arguments.cells(call), h, m, call.n, t, run,
            G=call.groups, D=d, BD=arguments.power_of_two(d), BM=PROBE_ROWS, SUM=total,
            num_warps=4, num_stages=1, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def constants(call: Call, interpreted: bool = False, amd: bool = AMD) -> dict[str, Any]:
    """Return the kernel's compile-time arguments: sizes, precision, tile shape."""
    d, dv = call.q.shape[3], call.v.shape[3]
    full = call.q.dtype == torch.float32
    exact = "ieee" if amd else "tf32x3"  # three products instead of one keep float32 accuracy
    precision = "ieee" if full else "tf32"
    per_cell = call.bias is not None or call.q_segments is not None
    return {
        "G": call.groups, "D": d, "DV": dv, "BD": arguments.power_of_two(d), "BDV": arguments.power_of_two(dv),
        "BF": FEATURES_IN_PASS, "UPCAST": interpreted and not full, "PRECISION": precision,
        "MIX_PRECISION": exact if call.v.dtype != call.q.dtype else precision, "EXACT": exact,
        **tile_shape(max(d, dv), full, interpreted, amd, per_cell),
    }  # fmt: skip


def tile_shape(
    d: int, full: bool, interpreted: bool = False, amd: bool = AMD, per_cell: bool = False
) -> dict[str, Any]:
    """Return queries and keys of a tile, warps and pipeline stages.

    They come from a fixed table, because autotuning needs a driver.

    per_cell: whether each cell reads numbers (bias or tables), which takes registers and memory.
    """
    if interpreted:
        return {"BM": 16, "BN": 16}
    size = 0 if d <= 64 else 1 if d <= 128 else 2
    bm, bn, stages = (FLOAT32_TILES if full else HALF_TILES)[size]
    if amd:
        bn, stages = 32, min(stages, 2)
    if per_cell:
        bm, bn, stages = min(bm, 64), 32, 1
    return {"BM": bm, "BN": bn, "num_warps": 8, "num_stages": stages, "enable_fp_fusion": True}
