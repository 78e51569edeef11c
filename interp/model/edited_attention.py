"""One layer's attention, with its edits, through headstats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import headstats
import torch
from headstats.stats import BY_NAME, TopK, tensors
from jaxtyping import Bool, Float
from torch import Tensor

from interp.errors import InterpError
from interp.model.attention_call import AttentionCall, rows_unknown
from interp.model.dense_edits import real_keys
from interp.model.edit_tables import CallSize, edit_arguments, select_rows
from interp.model.layer_edits import LayerEdit, compatible_groups, shifted
from interp.model.overwritten_rows import check_seen
from interp.model.segment_masks import with_spans, without_segments

NO_STATISTICS = headstats.StatSpec.none()
OF_TOKENS = ("k_segments", "targets", "key_features")  # arguments of statistics, with a batch axis


def attend(
    call: AttentionCall, *, spec: headstats.StatSpec | None = None, backend: str = "auto", **more: Any
) -> headstats.Attended:
    """Run a layer's attention, with its edits, through headstats.

    Edits that one call cannot hold take a call each, from which the rows and heads are taken on which they act. Under
    `torch.autocast` queries, keys and values get its dtype, as those of PyTorch's own attention do. ``more``: further
    arguments of `headstats.attend`.
    """
    if any(call.edits):
        return _attend_edited(call, spec, backend, more)
    q, k, v = call.q, call.k, call.v
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    spec, restore = NO_STATISTICS if spec is None else spec, None
    if call.masks is not None:
        if more.get("k_segments") is None:
            spec = without_segments(spec)
        more, restore = call.masks.joined(more)
    result = headstats.attend(
        q, k, v,
        causal=call.causal, window=call.window, softcap=call.softcap, scale=call.scale, bias=call.bias,
        sinks=call.sinks, key_padding=call.key_padding, spec=spec, backend=backend, **more,
    )  # fmt: skip
    return result if restore is None else replace(result, stats=restore(result.stats))


def attend_gated(
    call: AttentionCall, gate: Tensor, replacement: Tensor | None = None, *, backend: str = "auto"
) -> Float[Tensor, "batch heads query d_v"]:
    """Compute a call's output, gated and replaced as `headstats.Edit` does it: after the call's own edits.

    ``gate``: [batch, heads] or [batch, heads, query]; ``replacement``: [batch, heads, query, d_v].
    """
    if not any(call.edits):
        return attend(call, backend=backend, edit=headstats.Edit(gate=gate, replacement=replacement)).out
    out, weight = attend(call, backend=backend).out, gate.reshape(*gate.shape, *[1] * (4 - gate.ndim))
    return weight * out if replacement is None else weight * out + (1 - weight) * replacement


def weight_options(call: AttentionCall) -> dict[str, Any]:
    """Return what a call's attention weights depend on besides q and k, for the functions of `headstats.patterns`.

    Raises InterpError for edits that need several calls of the kernel.
    """
    names = ("causal", "window", "softcap", "scale", "bias", "sinks", "key_padding")
    options = {name: getattr(call, name) for name in names}
    if not any(call.edits):
        return options if call.masks is None else call.masks.joined(options)[0]
    if call.q.shape[0] > 1 and any(_knows_its_row(e) for edits in call.without_masks() for e in edits):
        raise InterpError(
            f"layer {call.layer}: attention weights of several prompts at once, under edits that depend on a prompt's "
            "place in its batch (random, shuffled, or uniform without renormalise): pass one prompt"
        )
    groups, n = compatible_groups(call.without_masks()), call.k.shape[2]
    if len(groups) > 1:
        raise InterpError(
            f"layer {call.layer}: its attention edits need more than one call of the kernel (they differ in "
            "renormalise, counterfactual or seed), so its pattern cannot be shown: use one block for each"
        )
    size = CallSize(call.q.shape[1], n - call.q.shape[2], n, n, call.sinks is not None)
    options |= edit_arguments(groups[0].edits, size, call.q.device, call.q.dtype)
    return options if call.masks is None else call.masks.joined(options)[0]


def _attend_edited(
    call: AttentionCall, spec: headstats.StatSpec | None, backend: str, more: dict[str, Any]
) -> headstats.Attended:
    """Run the edits of a call, in as few calls of headstats as they need.

    Raises InterpError for statistics that several calls together do not give.
    """
    call = with_rows_of_held_keys(call)
    edits = call.without_masks()
    if (call.q.shape[0] > 1 or call.key_padding is not None) and any(_knows_its_row(e) for r in edits for e in r):
        return _attend_each_alone(call, spec, backend, more)
    n = call.k.shape[2] + (more["prefix"][0].shape[2] if more.get("prefix") is not None else 0)
    check_seen(call, n)
    size = CallSize(call.q.shape[1], n - call.q.shape[2], n, n, call.sinks is not None)
    plain, groups = replace(call, edits=()), compatible_groups(edits)
    spans, more = more.get("k_segments"), {name: x for name, x in more.items() if name != "k_segments"}
    if spec is not None:
        if spans is None:  # segments are those of the edits, of which nobody asked for statistics
            spec = without_segments(spec)
        if len(groups) > 1:
            _refuse_key_statistics(call.layer, spec)
    results = []
    for group in groups:
        arguments = edit_arguments(group.edits, size, call.q.device, call.q.dtype)
        arguments, restore = with_spans(arguments, spans)
        of_group = attend(plain, spec=spec, backend=backend, **more, **arguments)
        results.append(replace(of_group, stats=restore(of_group.stats)))
    result, *others = results
    for group, other in zip(groups[1:], others, strict=True):
        acts = torch.stack([select_rows(edits, size) for edits in group.own]).to(call.q.device)
        result = _where(acts, other, result)
    return result


def _where(
    acts: Bool[Tensor, "batch heads query"], new: headstats.Attended, old: headstats.Attended
) -> headstats.Attended:
    """Take the output and the statistics of some queries and heads from another result."""

    def pick(x: Tensor, y: Tensor) -> Tensor:
        return torch.where(acts.reshape(*acts.shape, *[1] * (x.ndim - 3)), x, y)

    values: dict[str, Any] = {}
    other = old.stats.as_dict()
    for name, x in new.stats.as_dict().items():
        parts = [pick(a, b) for a, b in zip(tensors(x), tensors(other[name]), strict=True)]
        values[name] = TopK(*parts) if name == "topk" else parts[0]
    backend = old.backend if new.backend == old.backend else f"{old.backend} and {new.backend}"
    return headstats.Attended(
        pick(new.out, old.out), pick(new.lse, old.lse), headstats.AttentionStats(**values), backend
    )


def _refuse_key_statistics(layer: int, spec: headstats.StatSpec) -> None:
    if names := [name for name in spec.requested() if BY_NAME[name].axis == "key"]:
        raise InterpError(
            f"layer {layer}: its attention edits need more than one call of the kernel (they differ in renormalise, "
            f"counterfactual or seed), and {', '.join(names)} sum over queries of all of them. Leave these out of the "
            "spec, or apply the edits in blocks of their own"
        )


def _knows_its_row(e: LayerEdit) -> bool:
    """Whether an edit depends on the number of the batch row, or on how much padding the row holds."""
    return e.is_random or e.counts_keys


def with_rows_of_held_keys(call: AttentionCall) -> AttentionCall:
    """Count the tokens of edits from the first key that a sliding cache still holds.

    Raises InterpError for edits that depend on keys that are gone.
    """
    if not call.first_key or not any(call.edits):
        return call
    if call.first_key < 0:
        raise InterpError(rows_unknown(call, "attention edits"))
    if any(_knows_its_row(e) for edits in call.without_masks() for e in edits):
        raise InterpError(
            f"layer {call.layer}: its sliding cache has dropped keys, and edits with counterfactual='random' or "
            "'shuffled', or 'uniform' without renormalise, depend on all of them. Decode without a cache"
        )
    return replace(call, edits=tuple(shifted(edits, -call.first_key) for edits in call.edits), first_key=0)


def _attend_each_alone(
    call: AttentionCall, spec: headstats.StatSpec | None, backend: str, more: dict[str, Any]
) -> headstats.Attended:
    """Compute every batch row alone and without its padding, so that its numbers do not depend on the batch.

    Raises InterpError for statistics of padded rows.
    """
    results = []
    for i in range(call.q.shape[0]):
        one, rows = _alone(call, i)
        if spec is not None and rows != slice(0, call.q.shape[2]):
            raise InterpError(
                f"layer {call.layer}: statistics of padded prompts under edits that depend on a token's position "
                "(random, shuffled, or uniform without renormalise): run prompts of one length together"
            )
        own = {name: x[i : i + 1] if name in OF_TOKENS else x for name, x in more.items()}
        result = attend(one, spec=spec, backend=backend, **own)
        if rows != slice(0, call.q.shape[2]):
            out = result.out.new_zeros(1, *call.q.shape[1:3], call.v.shape[-1])
            lse = result.lse.new_full(out.shape[:3], -torch.inf)
            out[:, :, rows], lse[:, :, rows] = result.out, result.lse
            result = headstats.Attended(out, lse, result.stats, result.backend)
        results.append(result)
    return _joined(results)


def _alone(call: AttentionCall, i: int) -> tuple[AttentionCall, slice]:
    """The call of one batch row without padding, and the rows of its queries in the batch."""
    part, start = slice(i, i + 1), 0
    rows, keys = slice(0, call.q.shape[2]), slice(None)  # all keys: those of a shared prefix too
    if call.key_padding is not None:
        start, stop = real_keys(call.key_padding[i])
        first = call.k.shape[2] - call.q.shape[2]
        rows, keys = slice(max(start - first, 0), max(stop - first, 0)), slice(start, stop)
    bias = call.bias
    if bias is not None:
        bias = bias[part] if bias.shape[0] > 1 else bias
        bias = bias[..., rows, :] if bias.shape[-2] > 1 else bias
        bias = bias[..., keys] if bias.shape[-1] > 1 else bias
    one = replace(
        call, q=call.q[part, :, rows], k=call.k[part, :, keys], v=call.v[part, :, keys], bias=bias, key_padding=None,
        masks=None if call.masks is None else call.masks.of_row(i, rows, keys), edits=(shifted(call.edits[i], -start),),
    )  # fmt: skip
    return one, rows


def _joined(results: list[headstats.Attended]) -> headstats.Attended:
    """Join the results of single batch rows."""
    values: dict[str, Any] = {}
    by_row = [result.stats.as_dict() for result in results]
    for name in by_row[0]:
        parts = [torch.cat(x) for x in zip(*(tensors(stats[name]) for stats in by_row), strict=True)]
        values[name] = TopK(*parts) if name == "topk" else parts[0]
    out, lse = (torch.cat([getattr(result, name) for result in results]) for name in ("out", "lse"))
    return headstats.Attended(out, lse, headstats.AttentionStats(**values), results[0].backend)
