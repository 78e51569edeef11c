"""`attend`, the entry point of the package.

It validates the arguments once, picks a backend, runs it, and reports which one ran.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from headstats import torch_ops
from headstats.backends import BACKENDS, Backend
from headstats.call import lse_of
from headstats.edits.lowering import LargeLogits
from headstats.spec import AttentionStats, StatSpec
from headstats.validate import finite
from headstats.validate.call import make_call
from headstats.validate.plain import transform_of
from headstats.validate.values import is_tracing

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Bool, Float, Int
    from torch import Tensor

    from headstats.call import Call
    from headstats.edit import Edit

    Run = Callable[[Call], tuple[Tensor, Tensor, dict[str, Any]]]

DEFAULT_SPEC = StatSpec()


@dataclass(eq=False)
class Attended:
    """Result of `attend`.

    out: in the inputs' dtype.
    lse: natural log of the softmax denominator (with the learned sink, if any); -inf for a query that sees no key.
        float32, or float64 for float64 inputs.
    stats: the requested statistics.  backend: the name of the backend that ran.
    mass_before, mass_after: mass on each key segment before and after the edits, with Edit(report_mass=True).
    """

    out: Float[Tensor, "B H M Dv"]
    lse: Float[Tensor, "B H M"]
    stats: AttentionStats
    backend: str
    mass_before: Float[Tensor, "B H M S"] | None = None
    mass_after: Float[Tensor, "B H M S"] | None = None


def attend(
    q: Float[Tensor, "B H M D"],
    k: Float[Tensor, "B Hk N D"],
    v: Float[Tensor, "B Hk N Dv"],
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    bias: Float[Tensor, "#B #H #M #N"] | None = None,
    alibi: Float[Tensor, " H"] | None = None,
    sinks: Float[Tensor, " H"] | None = None,
    q_segments: Int[Tensor, "#B M"] | None = None,
    k_segments: Int[Tensor, "#B N"] | None = None,
    segment_mask: Bool[Tensor, "#B #H Sq Sk"] | None = None,
    segment_open: Bool[Tensor, "#B #H Sq Sk"] | None = None,
    key_padding: Bool[Tensor, "B N"] | None = None,
    query_padding: Bool[Tensor, "B M"] | None = None,
    prefix: tuple[Float[Tensor, "G Hk P D"], Float[Tensor, "G Hk P Dv"]] | None = None,
    targets: Int[Tensor, "#B M T"] | None = None,
    key_features: Float[Tensor, "#B N F"] | None = None,
    spec: StatSpec = DEFAULT_SPEC,
    edit: Edit | None = None,
    backend: str = "auto",
    check_finite: bool = False,
) -> Attended:
    """Compute attention and statistics of every head and query.

    p = softmax over visible keys of softcap(scale q.k) - alibi distance + bias; out = sum_j p_ij v_j,
    unless `edit` changes this (see Edit for the order in which its fields act).

        r = headstats.attend(q, k, v, window=4096, spec=headstats.StatSpec(topk=8))
        r.out, r.lse  # [B, H, M, Dv], [B, H, M]
        r.stats.entropy, r.stats.topk.indices  # [B, H, M], [B, H, M, 8]

    q, k, v: one dtype and device. H is a multiple of Hk (grouped-query attention). Dv may differ from D.
    causal: query i sees key j if j <= i + N - M (aligned bottom-right).
    window: key j is visible if |i + N - M - j| < window, so the window counts the query's own position.
    softcap: logits become softcap * tanh(logits / softcap).  scale: D**-0.5 if None.
    bias: added to the logits. -inf, the dtype's minimum, or anything at or below -1e30 hides the cell, as does a logit.
    alibi: a slope for each head; slope * |i + N - M - j| is subtracted from the logits.
    sinks: one learned logit for each head. It is one more column of the softmax, which is dropped afterwards.
    q_segments, k_segments: the segment number (0, 1, ...) of each query or key; -1 = in no segment, so no table applies
        to it. [M] or [B, M]; [N] or [B, N].
    segment_mask: False hides all cells of a pair (segment of the query, segment of the key). [Sq, Sk], or with batch
        and heads in front, like segment_open.
    segment_open: True opens the cells of a pair to the right of the causal diagonal and outside the window. A cell is
        visible if ((causal and window allow it) or it is opened) and segment_mask, padding and bias allow it.
    key_padding: True = real key.
    query_padding: True = real query. Only statistics of keys read it, to leave padded queries out. If None, it is
        derived from key_padding: from the last M keys if causal, from all keys if M = N; else all queries are real.
    prefix: (k0, v0), keys and values that come before k and v and are shared by batch rows: G = 1 prefix for all
        rows, or G prefixes for equal runs of B / G rows. A prefix is read once for each run and never repeated. N, in
        the other arguments and in all results, is then P + the number of keys in k: positions 0 ... P-1 are the prefix.
    targets: for each query, the keys whose weights are returned; -1 = none. [M, T] or [B, M, T].
    key_features: numbers of each key to average under p. [N, F] or [B, N, F].
    spec: which statistics to compute.  edit: what to change. Statistics are computed after everything that changes
        weights, and before gate and replacement.
    backend: "auto", "triton" (CUDA), "compiled" (CPU, after python -m headstats.cpu has built it), "blocked" or
        "reference". "auto" takes the first of these that can do the call; an explicit choice that cannot do it raises.
    check_finite: first search every argument for NaN and infinity, and name the argument and the place. If False,
        they pass through. If True, it costs a pass over the inputs (and, on CUDA, waiting for them). Not available
        within torch.compile.

    A query that sees no key gives zeros, lse -inf and argmax -1. Gradients flow through out and lse to q, k, v, prefix,
    bias, alibi, sinks and the fields of Edit. Only the reference also differentiates statistics.

    Raises TypeError or ValueError for arguments that do not fit, and NotImplementedError for an explicit backend that
    cannot do the call.
    """
    call = make_call(
        q, k, v, causal=causal, window=window, softcap=softcap, scale=scale, bias=bias, alibi=alibi,
        sinks=sinks, q_segments=q_segments, k_segments=k_segments, segment_mask=segment_mask,
        segment_open=segment_open, key_padding=key_padding, query_padding=query_padding, prefix=prefix,
        targets=targets, key_features=key_features, spec=spec, edit=edit,
    )  # fmt: skip
    if check_finite:
        finite.check_finite(call)
    return _run(call, backend, report=edit is not None and edit.report_mass)


def _run(call: Call, name: str, report: bool) -> Attended:
    """Run a call on the backend of this name.

    report: also return the mass on key segments before and after edits.
    """
    segments_requested = call.spec.segments
    if report:
        call = replace(call, spec=replace(call.spec, segments=True))
    chosen, backend = _pick(call, name)
    run = _runner(call, chosen, backend)
    try:
        out, norm, stats = run(call)
    except LargeLogits as error:
        if name != "auto":
            raise NotImplementedError(f"backend={name!r} cannot do this call: {error}") from None
        return _run(call, "blocked", report)
    mass_before = _mass_before(call, run) if report else None
    mass_after = stats["segments"] if report else None
    if not segments_requested:
        stats.pop("segments", None)
    return Attended(out, lse_of(norm), AttentionStats(**stats), chosen, mass_before, mass_after)


def _runner(call: Call, name: str, backend: Backend) -> Run:
    """Return the backend's own `run`, or its operator while a compiler traces.

    The reference is traced directly.
    """
    return partial(torch_ops.run, backend=name) if is_tracing(call.q) and name != "reference" else backend.run


def _mass_before(call: Call, run: Run) -> Tensor:
    """Compute the mass on key segments without the edits."""
    with torch.no_grad():
        _, _, stats = run(replace(call.unedited(), spec=replace(StatSpec.none(), segments=True)))
    return stats["segments"]


def _pick(call: Call, name: str) -> tuple[str, Backend]:
    """Return the named backend, or the first that can do the call for "auto"."""
    if reason := transform_of(call):
        if name in ("auto", "reference"):
            return "reference", BACKENDS["reference"]
        raise NotImplementedError(f"backend={name!r} cannot do this call: {reason}")
    if name == "auto":
        names = BACKENDS if call.q.is_cuda else ("compiled", "blocked", "reference")
        return next((n, BACKENDS[n]) for n in names if BACKENDS[n].unsupported(call) is None)
    if name not in BACKENDS:
        allowed = ", ".join(repr(n) for n in ("auto", *BACKENDS))
        raise ValueError(f"backend={name!r}: one of {allowed} expected")
    if reason := BACKENDS[name].unsupported(call):
        raise NotImplementedError(f"backend={name!r} cannot do this call: {reason}. backend='auto' picks one that can.")
    return name, BACKENDS[name]
