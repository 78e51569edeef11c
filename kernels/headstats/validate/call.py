"""Checks of the arguments of `attend`.

Each message names the argument, its value and what is allowed.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from headstats.call import Call
from headstats.edit import TABLES, Edit
from headstats.spec import StatSpec
from headstats.stats import ARGUMENT
from headstats.validate import plain as plain_tensors
from headstats.validate.edit import edit_fields
from headstats.validate.keys import (
    Sizes,
    check_bool_table,
    check_key_features,
    check_segments,
    check_targets,
    check_tensor,
    resolve_spec,
    widen,
)

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make_call(
    q, k, v, *, causal=True, window=None, softcap=None, scale=None, bias=None, alibi=None, sinks=None,
    q_segments=None, k_segments=None, segment_mask=None, segment_open=None, key_padding=None, query_padding=None,
    prefix=None, targets=None, key_features=None, spec=None, edit=None,
) -> Call:  # fmt: skip
    """Turn the arguments of `attend` into a `Call`, or raise TypeError or ValueError."""
    plain = plain_tensors.materialise_all({
        "q": q, "k": k, "v": v, "bias": bias, "alibi": alibi, "sinks": sinks, "q_segments": q_segments,
        "k_segments": k_segments, "segment_mask": segment_mask, "segment_open": segment_open,
        "key_padding": key_padding, "query_padding": query_padding, "prefix": prefix, "targets": targets,
        "key_features": key_features,
    })  # fmt: skip
    q, k, v, bias, alibi, sinks, q_segments, k_segments, segment_mask, segment_open, key_padding, query_padding, \
        prefix, targets, key_features = plain.values()  # fmt: skip
    _check_tensors(q, k, v)
    b, h, m, d = q.shape
    prefix_k, prefix_v = _check_prefix(prefix, k, v)
    n = k.shape[2] + (0 if prefix_k is None else prefix_k.shape[2])
    if not isinstance(causal, bool):
        raise TypeError(f"causal={causal!r}: True or False expected")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window={window!r}: an int >= 1 expected (it counts the query's own position), or None")
    if window is not None and window >= max(n, 1 if causal else m):
        window = None  # wider than any distance
    if softcap is not None and not (_is_finite(softcap) and softcap > 0):
        raise ValueError(f"softcap={softcap!r}: a finite number > 0 expected, or None")
    if scale is None:
        scale = d**-0.5
    elif not _is_finite(scale):
        raise ValueError(f"scale={scale!r}: a finite number expected, or None for D**-0.5")
    spec = StatSpec() if spec is None else spec
    if not isinstance(spec, StatSpec):
        raise TypeError(f"spec={spec!r}: a headstats.StatSpec expected, e.g. StatSpec(entropy=True, sink=4)")
    if edit is not None and not isinstance(edit, Edit):
        raise TypeError(f"edit={edit!r}: a headstats.Edit expected, e.g. Edit(gate=...), or None")
    if edit is not None:
        edit = plain_tensors.materialise_edit(edit, q)
    spec = resolve_spec(spec, {"k_segments": k_segments, "targets": targets, "key_features": key_features})
    key_padding = _check_padding("key_padding", key_padding, (b, n), q)
    query_padding = _check_padding("query_padding", query_padding, (b, m), q)
    if query_padding is None and key_padding is not None:
        query_padding = _query_padding_from_keys(key_padding, m, causal)
    tables = {"segment_mask": segment_mask, "segment_open": segment_open}
    if edit is not None:
        tables |= {f"Edit.{name}": getattr(edit, name) for name in TABLES}
    q_segments, k_segments, n_segments = check_segments(q_segments, k_segments, tables, (b, m, n), q)
    reports_mass = edit is not None and edit.report_mass
    statistic_reads = any(getattr(spec, name) for name, argument in ARGUMENT.items() if argument == "k_segments")
    if k_segments is not None and not (statistic_reads or reports_mass or any(t is not None for t in tables.values())):
        raise ValueError("k_segments is given, but StatSpec(segments=False) and no table over segments leave it unread")
    sizes = Sizes(b, h, m, n, v.shape[3], prefix=prefix_k is not None)
    return Call(
        q=q, k=k, v=v, causal=causal, window=window, softcap=None if softcap is None else float(softcap),
        scale=float(scale), spec=spec, bias=_check_bias(bias, (b, h, m, n), q),
        sinks=check_per_head("sinks", sinks, h, q, "learned logit"),
        alibi=check_per_head("alibi", alibi, h, q, "slope"),
        prefix_k=prefix_k, prefix_v=prefix_v, key_padding=key_padding, query_padding=query_padding,
        q_segments=q_segments, k_segments=k_segments, n_segments=n_segments,
        segment_mask=check_bool_table("segment_mask", segment_mask, (b, h), q, neutral=True),
        segment_open=check_bool_table("segment_open", segment_open, (b, h), q, neutral=False),
        targets=check_targets(targets, (b, m), n, q), key_features=check_key_features(key_features, (b, n), q),
        **({} if edit is None else edit_fields(edit, sizes, q, k, q_segments, k_segments)),
    )  # fmt: skip


def _check_tensors(q: Any, k: Any, v: Any) -> None:
    for name, t, shape in (("q", q, "[B, H, M, D]"), ("k", k, "[B, Hk, N, D]"), ("v", v, "[B, Hk, N, Dv]")):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a {type(t).__name__}: a torch.Tensor of shape {shape} expected")
        if t.dim() != 4:
            raise ValueError(f"{name} has shape {list(t.shape)}: four dimensions {shape} expected")
        if t.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {t.dtype}: float32, bfloat16, float16 or float64 expected")
        if t.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {t.dtype} but q has {q.dtype}: one dtype expected for q, k and v")
        if t.device != q.device:
            raise ValueError(f"{name} is on {t.device} but q is on {q.device}: one device expected")
        if t.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch size {t.shape[0]} but q has {q.shape[0]}")
        if 0 in t.shape:
            raise ValueError(f"{name} has shape {list(t.shape)}: every size must be at least 1")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k is {list(k.shape)} and v is {list(v.shape)}: batch, heads and keys must agree")
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head size {q.shape[3]} but k has {k.shape[3]}: they must agree (v's may differ)")
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads and k has {k.shape[1]}: q's must be a multiple of k's (grouped-query attention)"
        )


def _is_finite(x: Any) -> bool:
    """Whether x is a number that a float can hold."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return False
    return abs(x) <= sys.float_info.max


def _check_padding(name: str, t: Any, shape: tuple[int, int], q: Tensor) -> Tensor | None:
    if t is None:
        return None
    check_tensor(name, t, q, floating=False)
    if t.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {t.dtype}: bool expected, True = real token (attention_mask.bool())")
    if tuple(t.shape) != shape:
        raise ValueError(f"{name} has shape {list(t.shape)}: {list(shape)} expected")
    return t


def _query_padding_from_keys(key_padding: Tensor, m: int, causal: bool) -> Tensor | None:
    n = key_padding.shape[1]
    if n == m:
        return key_padding
    if not causal:
        return None  # cross-attention: the keys' padding says nothing about the queries
    if n > m:
        return key_padding[:, n - m :]
    return torch.nn.functional.pad(key_padding, (m - n, 0), value=True)


def _check_bias(t: Any, shape: tuple[int, ...], q: Tensor) -> Tensor | None:
    if t is None:
        return None
    if isinstance(t, Tensor) and t.dtype == torch.bool:
        raise TypeError("bias has dtype torch.bool: an additive floating bias expected (0 = keep, -inf = hide)")
    check_tensor("bias", t, q)
    if t.dim() > 4 or any(s not in (1, w) for s, w in zip(t.shape, shape[4 - t.dim() :], strict=True)):
        raise ValueError(f"bias has shape {list(t.shape)}: broadcastable to [B, H, M, N] = {list(shape)} expected")
    return t.reshape((1,) * (4 - t.dim()) + tuple(t.shape))


def check_per_head(name: str, t: Any, h: int, q: Tensor, what: str) -> Tensor | None:
    """Check one number for each query head."""
    if t is None:
        return None
    check_tensor(name, t, q)
    if tuple(t.shape) != (h,):
        raise ValueError(f"{name} has shape {list(t.shape)}: one {what} for each query head, [{h}], expected")
    return widen(t, q)


def _check_prefix(prefix: Any, k: Tensor, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
    if prefix is None:
        return None, None
    if not isinstance(prefix, tuple | list) or len(prefix) != 2 or not all(isinstance(x, Tensor) for x in prefix):
        raise TypeError(f"prefix is {type(prefix).__name__}: a pair of tensors (k0, v0) expected, or None")
    b, hk = k.shape[:2]
    for name, x, own in (("k0", prefix[0], k), ("v0", prefix[1], v)):
        if x.dtype != own.dtype or x.device != own.device:
            raise TypeError(
                f"prefix {name} is {x.dtype} on {x.device}: {own.dtype} on {own.device} expected, as k and v"
            )
        if x.dim() != 4 or x.shape[1] != hk or x.shape[3] != own.shape[3] or 0 in x.shape or b % x.shape[0]:
            raise ValueError(
                f"prefix {name} has shape {list(x.shape)}: [G, Hk, P, D] = [G, {hk}, P, {own.shape[3]}] expected, with "
                f"P >= 1 and G = 1 or another divisor of the batch size {b} (G equal runs of batch rows)"
            )
    if prefix[0].shape[:3] != prefix[1].shape[:3]:
        raise ValueError(f"prefix k0 is {list(prefix[0].shape)} and v0 is {list(prefix[1].shape)}: G, Hk, P must agree")
    return prefix[0], prefix[1]
