"""Checks of attention itself: hooks, edits, gradients, statistics, and that no layer goes its own way."""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import headstats
import torch
from torch import Tensor

from interp.doctor.matrix.case import ALLOWED, DECODERS, Case, difference
from interp.doctor.matrix.outputs import halve_head
from interp.errors import InterpError
from interp.model.instrument import attend
from interp.model.protocols import Bridge

HIDDEN = -1e30  # masked scores hold "very negative", whose value is a convention


def _halve_square(x: Tensor, hook: Any) -> Tensor:
    """A hook on scores or pattern [batch, heads, query, key] that halves head 1."""
    x = x.clone()
    x[:, 1] *= 0.5
    return x


def _fired(case: Case, bridge: Bridge) -> dict[str, Any]:
    """What every hook of a bridge carries in one forward."""
    if case.kind in DECODERS:
        return bridge.run_with_cache(case.tokens(), return_cache_object=False)[1]
    seen: dict[str, Any] = {}

    def keep(x: Any, hook: Any) -> None:
        seen[hook.name] = x.detach().clone() if isinstance(x, Tensor) else x

    switched = ("hook_result", "hook_attn_in", "hook_mlp_in", "_input")  # off by default
    names = [name for name in bridge.hook_dict if not name.endswith(switched)]
    with bridge.hooks(fwd_hooks=[(name, keep) for name in names]):
        case.run(bridge)
    return seen


@torch.no_grad()
def hooks(case: Case) -> float:
    """Every hook that TransformerLens fires on its own path fires, with the same value; pattern and scores too."""
    expected, got = _fired(case, case.theirs), _fired(case, case.ours.bridge)
    if silent := sorted(set(expected) - set(got)):
        raise InterpError(f"{len(silent)} hooks do not fire: {', '.join(silent[:3])}")
    if not any(name.endswith("hook_pattern") for name in got):
        raise InterpError("no pattern is shown")
    worst, where = 0.0, ""
    for name, value in expected.items():
        ours = got[name]
        if not isinstance(value, Tensor) or value.dtype == torch.bool:
            continue
        if name.endswith("hook_attn_scores"):
            if torch.equal(value, expected[name.replace("attn_scores", "pattern")]):
                continue  # on models it does not re-implement, TransformerLens shows the pattern as the scores
            seen = (value > HIDDEN) & (ours > HIDDEN) & torch.ones(value.shape[-2:], dtype=torch.bool).tril()
            value, ours = value.masked_fill(~seen, 0), ours.masked_fill(~seen, 0)
        worst, where = max((worst, where), (difference(ours, value), name))
    if worst > ALLOWED:
        raise InterpError(f"{where} differs by {worst:.1e}")
    return worst


@torch.no_grad()
def edits(case: Case) -> float:
    """Edits of scores, pattern, z and v change the logits as they do in TransformerLens."""
    plain = {"ours": case.run(case.ours), "theirs": case.run(case.theirs)}
    # Halving a head's scores is halving its queries; halving its pattern is halving its output.
    same = {"attn_scores": "q", "pattern": "z", "z": "z", "v": "v"}
    stacks = {stack: prefix for prefix, (stack, layer) in case.attentions().items() if layer == 1}
    worst = 0.0
    for prefix in stacks.values():
        for name, equal in same.items():
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


def _edited(case: Case, bridge: Bridge, name: str, edit: Any) -> Tensor:
    with warnings.catch_warnings(), bridge.hooks(fwd_hooks=[(name, edit)]):
        warnings.simplefilter("ignore", UserWarning)  # where TransformerLens discards the edit, it warns
        return case.run(bridge)


def _softened(case: Case, prefix: str) -> Tensor:
    """TransformerLens' output with head 1's scores halved, by what that does to its z.

    Its pattern becomes the root of what it was, made to sum to 1 again. (Halving its queries is not the same where a
    bias is added to the scores.)
    """
    seen: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: Any) -> None:
        seen["v" if "hook_pattern" not in hook.name else "pattern"] = x

    with case.theirs.hooks(fwd_hooks=[(f"{prefix}.hook_pattern", keep), (f"{prefix}.hook_v", keep)]):
        case.run(case.theirs)
    root, v = seen["pattern"][:, 1].sqrt(), seen["v"]

    def reread(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, 1] = root / root.sum(-1, keepdim=True) @ v[:, :, v.shape[2] // z.shape[2]]
        return z

    return _edited(case, case.theirs, f"{prefix}.hook_z", reread)


def _loss(output: Tensor) -> Tensor:
    """One number that depends on all outputs; of a decoder, on those of the last position."""
    return (output[:, -1] if output.ndim == 3 else output).logsumexp(-1).sum()


def gradients(case: Case) -> float:
    """Gradients of the weights equal eager's, on the kernel and with a dense layer."""
    case.eager.zero_grad()
    _loss(case.run(case.eager)).backward()
    expected = {n: p.grad for n, p in case.eager.named_parameters() if p.grad is not None}
    floor = 1e-3 * max(g.abs().max() for g in expected.values())
    worst, model = 0.0, case.ours.bridge.original_model
    # TransformerLens splits fused projections into new weights; the others keep their names, more or less.
    same = {n.replace("._original_component", ""): p for n, p in model.named_parameters()}
    shared = [n for n in expected if n in same and same[n].shape == expected[n].shape]
    dense = [prefix for prefix, (_, layer) in case.attentions().items() if layer == 1]
    for hooked in ([], [(f"{prefix}.hook_pattern", lambda x, hook: x) for prefix in dense]):
        model.zero_grad()
        with case.ours.bridge.hooks(fwd_hooks=hooked):
            _loss(case.run(case.ours)).backward()
        reached = [n for n in shared if same[n].grad is not None]  # not the fused ones that were split
        if len(reached) < len(expected) / 2:
            raise InterpError(f"gradients reach only {len(reached)} of {len(expected)} weights with a known name")
        for name in reached:
            value = expected[name]
            worst = max(worst, float((same[name].grad - value).abs().max() / value.abs().max().clamp_min(floor)))
    model.zero_grad()
    return worst


@torch.no_grad()
def statistics(case: Case) -> float:
    """Every statistic equals the float64 reference on the dense pattern, which is the one that hook_pattern shows."""
    model, spec = case.ours, headstats.StatSpec.all()
    calls, patterns = case.stack_calls(), {}
    names = {f"{prefix}.hook_pattern": prefix for prefix in case.attentions()}

    def keep(x: Tensor, hook: Any) -> None:
        patterns[hook.name] = x

    with model.bridge.hooks(fwd_hooks=[(name, keep) for name in names]):
        case.run(model)
    with ExitStack() as held:
        found = {stack: held.enter_context(i.collecting(spec)) for stack, i in model.instruments.items()}
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
        for name, got in found[stack][layer].as_dict().items():
            for one, value in zip(_each(got), _each(exact[name]), strict=True):
                scale = value.abs().max().clamp_min(1.0)
                worst = max(worst, float((one.double() - value.double()).abs().max() / scale))
    return worst


def _each(statistic: Any) -> list[Tensor]:
    return [statistic] if isinstance(statistic, Tensor) else list(statistic)


@torch.no_grad()
def calls(case: Case) -> float:
    """Each layer's attention arrives exactly once a forward, on the kernel; only a hooked layer goes dense."""
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
