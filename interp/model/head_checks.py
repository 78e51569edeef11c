"""Check at load that head h of q, k, v, z and result is head h of the model's own computation.

One attention layer of each kind is run again, alone, on the arguments that it received in the forward of `verify`. Its
hooks change heads by a code: head h changes in the runs in which bit h of the code is set. Then the heads that change
in the attention call (q, k, v), in z (for a changed attention output), and in the input of the output projection (for a
changed z) must be those of the code. This needs no knowledge of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend
from interp.model.hooks import hooks_at
from interp.model.instrument import Instrument
from interp.model.protocols import Bridge

INPUTS = ("q", "k", "v")
CHANGED = 1e-2  # share of the largest value; a coded change is as large as that value
PARALLEL = 0.999  # cosine of a head before and after, if a norm over all heads has scaled it


@dataclass
class HeadAxes:
    """What the check found.

    ``faults``: why heads of a component (by stack and component) are not the model's heads, so that it is refused.
    ``joint``: the components (of q, k and v) that a norm over all heads follows, so that a change of one head scales
    all: behind q and k themselves (OLMo 2), or between attention and its output projection (BitNet).
    """

    faults: dict[tuple[str, str], str] = field(default_factory=dict)
    joint: set[str] = field(default_factory=set)

    def fault(self, component: str) -> str | None:
        """Why a component of the stack that sites address is refused; None if it is not."""
        return self.faults.get(("", component))

    def told(self, components: Iterable[str]) -> dict[str, str]:
        """What provenance says of an experiment that changes these components: nothing, or its ``joint_heads``."""
        joint = sorted(self.joint.intersection(components))
        text = f"{', '.join(joint)}: a norm over all heads follows, so that a change of one head scales all"
        return {"joint_heads": text} if joint else {}


@dataclass
class _Replay:
    """One attention layer, the arguments of its last forward, and how to run it again."""

    attn: Any
    layer: int
    instrument: Instrument
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, edits: dict[str, Callable[[Tensor], Tensor]], out: Tensor | None = None) -> dict[str, Tensor]:
        """Run the layer with edited hooks; return q, k, v and the output of its call, and all hooked values.

        ``out``: what attention returns, in place of its own output. ``o``: the input of the output projection.
        """
        seen: dict[str, Tensor] = {}

        def handler(call: AttentionCall) -> Tensor:
            seen.update(q_used=call.q, k_used=call.k, v_used=call.v)
            seen["out"] = attend(call).out if out is None else out
            return seen["out"]

        def edit(name: str, function: Callable[[Tensor], Tensor]) -> Any:
            def hook(x: Tensor, hook: Any) -> Tensor:
                seen[name] = function(x)
                return seen[name]

            return _hook_point(self.attn, name), hook

        def keep_input(_module: Any, args: Any) -> None:
            seen["o"] = args[0]

        handle = self.attn.o.original_component.register_forward_pre_hook(keep_input)
        try:
            with self.instrument.handled_by(handler), hooks_at(*(edit(n, f) for n, f in edits.items())):
                result = self.attn(*self.args, **self.kwargs)
        finally:
            handle.remove()
        seen["returned"] = result[0] if isinstance(result, tuple) else result
        return seen


@contextmanager
def recorded(
    bridge: Bridge, instruments: dict[str, Instrument], by_stack: Any
) -> Iterator[dict[str, dict[int, _Replay]]]:
    """Record the arguments of one attention layer of each kind in the forward inside the block."""
    replays: dict[str, dict[int, _Replay]] = {}
    handles = []
    for stack, layers in by_stack.items():
        kinds = {_kind(attn): (layer, attn) for layer, attn in reversed(layers.items())}
        for layer, attn in kinds.values():
            if getattr(getattr(attn, "o", None), "original_component", None) is None:
                continue

            def keep(module: Any, args: Any, kwargs: Any, stack: str = stack, layer: int = layer) -> None:
                clean = {name: None if hasattr(x, "update") else x for name, x in kwargs.items()}  # no KV cache
                replay = _Replay(module, layer, instruments[stack], args, clean)
                replays.setdefault(stack, {}).setdefault(layer, replay)

            handles.append(attn.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield replays
    finally:
        for handle in handles:
            handle.remove()


def _kind(attn: Any) -> tuple[Any, ...]:
    """Layers of the same kind split their heads in the same way."""
    shapes = tuple((name, tuple(p.shape)) for name, p in attn.original_component.named_parameters())
    return type(attn), type(attn.original_component), shapes


@torch.no_grad()
def check_heads(bridge: Bridge, replays: dict[str, dict[int, _Replay]]) -> HeadAxes:
    """Check the heads of every recorded attention layer; never raises for a model that can be run."""
    axes = HeadAxes()
    for stack, layers in replays.items():
        for replay in layers.values():
            name = f"layer {replay.layer} ({type(replay.attn.original_component).__name__})"
            for component, fault in _faults(replay, axes.joint if stack == "" else set()).items():
                axes.faults.setdefault((stack, component), f"in {name}, {fault}")
            if stack == "" and (fault := _result_fault(bridge, replay)):
                axes.faults.setdefault((stack, "result"), f"in {name}, {fault}")
    return axes


def _faults(replay: _Replay, joint: set[str]) -> dict[str, str]:
    """What is wrong with q, k, v and z of one layer; adds to ``joint``."""
    names = [n for n in INPUTS if _hook_point(replay.attn, n) is not None]
    base = replay.run(dict.fromkeys([*names, "z"], _same))
    heads = {"q": base["q_used"], "k": base["k_used"], "v": base["v_used"], "z": base["out"]}
    faults = {}
    for name in [*names, "z"]:
        n = heads[name].shape[1]
        if base[name].ndim != 4 or base[name].shape[2] != n:
            shape = tuple(base[name].shape)
            faults[name] = f"hook_{name} has the shape {shape}, which is not that of {n} heads"
    names = [n for n in names if n not in faults]
    changes: dict[str, list[Bool[Tensor, " heads"]]] = {name: [] for name in [*names, "z"]}
    scaled = dict.fromkeys([*names, "z"], True)
    most = max(x.shape[1] for x in heads.values())
    for bit in range(most.bit_length()):
        codes = {name: _code(heads[name].shape[1], bit) for name in heads}
        edits = {n: _adding(codes[n], 2) for n in names}
        seen = replay.run({**edits, "z": _same}, _adding(codes["z"], 1)(base["out"]))
        for name in names:
            before, after = heads[name], seen[f"{name}_used"]
            changes[name].append(_changed(before, after))
            scaled[name] &= _only_scaled(before, after, ~codes[name])
        if "z" not in faults:
            before, after = base["z"].transpose(1, 2), seen["z"].transpose(1, 2)
            changes["z"].append(_changed(before, after))
            scaled["z"] &= _only_scaled(before, after, ~codes["z"])
    for name, per_bit in changes.items():
        if name in faults:
            continue
        expected = [_code(heads[name].shape[1], bit) for bit in range(most.bit_length())]
        pairs = [(observed.cpu(), code) for observed, code in zip(per_bit, expected, strict=True)]
        if all(torch.equal(observed, code) for observed, code in pairs):
            continue
        if scaled[name] and all(observed[code].all() for observed, code in pairs):
            joint.update([name] if name != "z" else INPUTS)  # before z (BitNet): what changes one head's output
        else:
            faults[name] = f"a change of head h of {name} does not change head h of its attention, and no other"
    if "z" not in faults:
        seen = replay.run({"z": lambda x: x + _wave(x)})
        if not torch.equal(seen["o"], seen["z"].flatten(-2).view_as(seen["o"])):
            faults["z"] = "head h of z is not the h-th part of what the output projection reads"
    return faults


def _result_fault(bridge: Bridge, replay: _Replay) -> str | None:
    """What is wrong with the per-head results of one layer; None if nothing is, or if it has none."""
    switch: Any = bridge
    before = bool(getattr(bridge.cfg, "use_attn_result", False))
    try:
        switch.set_use_attn_result(True)
    except (NotImplementedError, ValueError, AttributeError):
        return None
    try:
        seen = replay.run({"z": _same, "result": _same})
        if "result" not in seen:
            return "hook_result does not fire"
        z, result = seen["z"], seen["result"]
        weight = _output_weight(replay.attn.o.original_component)
        if weight is None or z.ndim != 4:
            return None
        own = torch.einsum("bmhe,dhe->bmhd", z, weight.unflatten(1, (z.shape[2], -1)))
        if own.shape != result.shape:
            return f"hook_result has the shape {tuple(result.shape)}, and W_O z by head {tuple(own.shape)}"
        scale = (own * result).sum() / (own * own).sum()  # of what the block adds (Granite, Falcon-H1)
        if not _near(result, scale * own):
            return "head h of result is not W_O times head h of z"
        moved = replay.run({"result": lambda x: x + _wave(x)})
        if not _near((moved["returned"] - seen["returned"]) * scale, _wave(result).sum(2)):
            return "a change of result does not reach the attention's output"
    finally:
        switch.set_use_attn_result(before)
    return None


def _output_weight(linear: Any) -> Float[Tensor, "d_model heads*width"] | None:
    weight = getattr(linear, "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        return None
    return weight.T if type(linear).__name__ == "Conv1D" else weight


def _hook_point(attn: Any, name: str) -> Any:
    """The hook point behind ``hook_q`` and so on; None if the layer has none.

    It is a projection's output (z: its input), even where TransformerLens adds a second point (Falcon-H1's ``hook_k``).
    """
    projection = getattr(attn, "o" if name == "z" else name, None)
    if name == "result" or projection is None:
        return getattr(attn, f"hook_{name}", None)
    return projection.hook_in if name == "z" else projection.hook_out


def _same(x: Tensor) -> Tensor:
    return x


def _code(n_heads: int, bit: int) -> Bool[Tensor, " heads"]:
    """Which heads have this bit set in the code of their number, counted from 1."""
    return (torch.arange(1, n_heads + 1) >> bit) % 2 == 1


def _wave(x: Tensor) -> Tensor:
    """A change as large as ``x``, without zeros, not constant along the last axis."""
    wave = torch.cos(torch.arange(x.shape[-1], device=x.device) * 0.7 + 0.3)
    return (wave * x.detach().abs().amax().clamp_min(1.0)).to(x.dtype).expand_as(x)


def _adding(code: Bool[Tensor, " heads"], axis: int) -> Callable[[Tensor], Tensor]:
    """A hook that adds a large change to the heads of a code."""

    def add(x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[axis] = -1
        return x + _wave(x) * code.to(x.device).view(shape)

    return add


def _changed(before: Tensor, after: Tensor) -> Bool[Tensor, " heads"]:
    """Which heads [batch, heads, position, width] differ."""
    return (after - before).abs().amax((0, 2, 3)) > CHANGED * before.abs().amax().clamp_min(1e-6)


def _only_scaled(before: Tensor, after: Tensor, heads: Bool[Tensor, " heads"]) -> bool:
    """Whether these heads have kept their directions."""
    cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
    is_zero = before.float().norm(dim=-1) < CHANGED * before.float().abs().amax().clamp_min(1e-6)
    return bool(((cosine > PARALLEL) | is_zero)[:, heads.to(before.device)].all())


def _near(a: Tensor, b: Tensor) -> bool:
    allowed = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((a - b).abs().max() <= allowed * max(float(b.abs().max()), 1e-6))
