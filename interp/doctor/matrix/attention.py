"""Checks of attention: hooks, edits, gradients, statistics, kernel calls."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import headstats
import torch
from torch import Tensor

from interp.doctor.matrix.case import ALLOWED, DECODERS, FamilyCase, difference
from interp.doctor.matrix.outputs import halve_head
from interp.errors import InterpError
from interp.model.edited_attention import attend
from interp.model.protocols import Bridge

HIDDEN = -1e30  # scores below this are masked; how negative they are is a convention


def _halve_square(x: Tensor, hook: Any) -> Tensor:
    """A hook on scores or pattern [batch, heads, query, key] that halves head 1."""
    x = x.clone()
    x[:, 1] *= 0.5
    return x


def _hook_values(case: FamilyCase, bridge: Bridge) -> dict[str, Any]:
    """Collect the value of every hook of a bridge in one forward."""
    if case.kind in DECODERS:
        return bridge.run_with_cache(case.tokens(), return_cache_object=False)[1]
    values: dict[str, Any] = {}

    def keep(x: Any, hook: Any) -> None:
        values[hook.name] = x.detach().clone() if isinstance(x, Tensor) else x

    switched_off = ("hook_result", "hook_attn_in", "hook_mlp_in", "_input")  # by default
    names = [name for name in bridge.hook_dict if not name.endswith(switched_off)]
    with bridge.hooks(fwd_hooks=[(name, keep) for name in names]):
        case.run(bridge)
    return values


@torch.no_grad()
def hooks(case: FamilyCase) -> float:
    """Every hook that TransformerLens fires has the same value.

    Scores and pattern are included.
    """
    expected, got = _hook_values(case, case.theirs), _hook_values(case, case.ours.bridge)
    if silent := sorted(set(expected) - set(got)):
        raise InterpError(f"{len(silent)} hooks do not fire: {', '.join(silent[:3])}")
    if not any(name.endswith("hook_pattern") for name in got):
        raise InterpError("no hook shows a pattern")
    worst, worst_hook = 0.0, ""
    for name, value in expected.items():
        ours = got[name]
        if not isinstance(value, Tensor) or value.dtype == torch.bool:
            continue
        if name.endswith("hook_attn_scores"):
            if torch.equal(value, expected[name.replace("attn_scores", "pattern")]):
                continue  # on models it does not re-implement, TransformerLens shows the pattern as the scores
            visible = (value > HIDDEN) & (ours > HIDDEN) & torch.ones(value.shape[-2:], dtype=torch.bool).tril()
            value, ours = value.masked_fill(~visible, 0), ours.masked_fill(~visible, 0)
        worst, worst_hook = max((worst, worst_hook), (difference(ours, value), name))
    if worst > ALLOWED:
        raise InterpError(f"{worst_hook} differs by {worst:.1e}")
    return worst


@torch.no_grad()
def edits(case: FamilyCase) -> float:
    """Edits of scores, pattern, z and v act as in TransformerLens."""
    plain = {"ours": case.run(case.ours), "theirs": case.run(case.theirs)}
    # Halving a head's scores equals halving its queries; halving its pattern equals halving its output.
    equivalent = {"attn_scores": "q", "pattern": "z", "z": "z", "v": "v"}
    stacks = {stack: prefix for prefix, (stack, layer) in case.attentions().items() if layer == 1}
    worst = 0.0
    for prefix in stacks.values():
        for name, equal in equivalent.items():
            edit = halve_head if name == equal else _halve_square
            ours = _edited(case, case.ours.bridge, f"{prefix}.hook_{name}", edit)
            theirs = _edited(case, case.theirs, f"{prefix}.hook_{name}", edit)
            if difference(theirs, plain["theirs"]) < 1e-9:  # TransformerLens fires this hook too late to matter
                if name == "attn_scores" and case.kind not in DECODERS:
                    theirs = _softened(case, prefix)
                else:
                    theirs = _edited(case, case.theirs, f"{prefix}.hook_{equal}", halve_head)
            if difference(ours, plain["ours"]) < 1e-7:
                raise InterpError(f"an edit of {prefix}.hook_{name} has no effect")
            worst = max(worst, difference(ours, theirs))
    return worst


def _edited(case: FamilyCase, bridge: Bridge, name: str, edit: Any) -> Tensor:
    with warnings.catch_warnings(), bridge.hooks(fwd_hooks=[(name, edit)]):
        warnings.simplefilter("ignore", UserWarning)  # TransformerLens warns when it discards the edit
        return case.run(bridge)


def _softened(case: FamilyCase, prefix: str) -> Tensor:
    """TransformerLens' output with head 1's scores halved, by a change of its z.

    Its pattern becomes its square root, normalised to sum to 1. (Halving its queries is not the same if a bias is
    added to the scores.)
    """
    values: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        values["v" if "hook_pattern" not in hook.name else "pattern"] = x

    with case.theirs.hooks(fwd_hooks=[(f"{prefix}.hook_pattern", keep), (f"{prefix}.hook_v", keep)]):
        case.run(case.theirs)
    root, v = values["pattern"][:, 1].sqrt(), values["v"]

    def replace_head(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 1] = root / root.sum(-1, keepdim=True) @ v[:, :, v.shape[2] // z.shape[2]]
        return z

    return _edited(case, case.theirs, f"{prefix}.hook_z", replace_head)


def _loss(output: Tensor) -> Tensor:
    """A scalar that depends on all outputs (of a decoder: on the last position's)."""
    return (output[:, -1] if output.ndim == 3 else output).logsumexp(-1).sum()


def gradients(case: FamilyCase) -> float:
    """Gradients of the weights equal eager's, on the kernel and with a dense layer."""
    case.eager.zero_grad()
    _loss(case.run(case.eager)).backward()
    expected = {n: p.grad for n, p in case.eager.named_parameters() if p.grad is not None}
    floor = 1e-3 * max(g.abs().max() for g in expected.values())
    worst, model = 0.0, case.ours.bridge.original_model
    # TransformerLens splits fused projections into new weights; the others keep their names except for a suffix.
    by_name = {n.replace("._original_component", ""): p for n, p in model.named_parameters()}
    shared = [n for n in expected if n in by_name and by_name[n].shape == expected[n].shape]
    dense = [prefix for prefix, (_, layer) in case.attentions().items() if layer == 1]
    for fwd_hooks in ([], [(f"{prefix}.hook_pattern", lambda x, hook: x) for prefix in dense]):
        model.zero_grad()
        with case.ours.bridge.hooks(fwd_hooks=fwd_hooks):
            _loss(case.run(case.ours)).backward()
        reached = [n for n in shared if by_name[n].grad is not None]  # not the fused ones, which were split
        if len(reached) < len(expected) / 2:
            raise InterpError(f"gradients reach only {len(reached)} of {len(expected)} weights with a known name")
        for name in reached:
            value = expected[name]
            worst = max(worst, float((by_name[name].grad - value).abs().max() / value.abs().max().clamp_min(floor)))
    model.zero_grad()
    return worst


@torch.no_grad()
def statistics(case: FamilyCase) -> float:
    """Every statistic equals the float64 reference on the dense pattern.

    That pattern must be the one that hook_pattern shows.
    """
    model, spec = case.ours, headstats.StatSpec.all()
    calls, patterns = case.stack_calls(), {}
    names = {f"{prefix}.hook_pattern": prefix for prefix in case.attentions()}

    def keep(x: Tensor, hook: Any) -> None:
        patterns[hook.name] = x

    with model.bridge.hooks(fwd_hooks=[(name, keep) for name in names]):
        case.run(model)
    with ExitStack() as collectors:
        collected = {stack: collectors.enter_context(i.collecting(spec)) for stack, i in model.instruments.items()}
        case.run(model)
    worst = 0.0
    for prefix, (stack, layer) in case.attentions().items():
        call = next(c for c in calls[stack] if c.layer == layer)
        wide = {f: getattr(call, f).double() for f in ("q", "k", "v")}
        exact = attend(replace(call, **wide), spec=spec, backend="reference").stats.as_dict()
        n, heads = call.k.shape[2], call.k.shape[1]
        identity = torch.eye(n, dtype=torch.float64).expand(len(call.k), heads, n, n)
        pattern = attend(replace(call, **{**wide, "v": identity}), backend="reference").out
        worst = max(worst, difference(patterns[f"{prefix}.hook_pattern"], pattern))
        for name, got in collected[stack][layer].as_dict().items():
            for ours, value in zip(_tensors(got), _tensors(exact[name]), strict=True):
                scale = value.abs().max().clamp_min(1.0)
                worst = max(worst, float((ours.double() - value.double()).abs().max() / scale))
    return worst


def _tensors(statistic: Any) -> list[Tensor]:
    return [statistic] if isinstance(statistic, Tensor) else list(statistic)


@torch.no_grad()
def calls(case: FamilyCase) -> float:
    """Each layer calls the kernel exactly once per forward.

    Only a hooked layer is computed densely.
    """
    model, attentions = case.ours, case.attentions()
    for hooked in (None, next(p for p, (_, layer) in attentions.items() if layer == 1)):
        for instrument in model.instruments.values():
            instrument.layers.clear()
        with model.bridge.hooks(fwd_hooks=[] if hooked is None else [(f"{hooked}.hook_pattern", lambda x, hook: None)]):
            case.run(model)
        for prefix, (stack, layer) in attentions.items():
            record = model.instruments[stack].record(layer)
            if record.calls != 1:
                raise InterpError(f"layer {layer} called the kernel {record.calls} times in one forward")
            if ("dense" in record.backends) != (prefix == hooked):
                raise InterpError(f"layer {layer} ran on {', '.join(record.backends)}")
    return 0.0
