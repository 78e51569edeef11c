"""Check of heads: head h of q, k, v, z and result is head h of the untouched Hugging Face model's projections.

The expected side knows nothing of TransformerLens: it hooks the projections of the eager model, and finds head h in
their rows as transformers' attention modules split them (`_pieces`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from interp.doctor.matrix.case import ALLOWED, FamilyCase, difference
from interp.errors import InterpError
from interp.model.hooks import hooks
from interp.model.install import stacks

# How attention modules with one fused projection order its rows; all others have a projection for each of q, k and v.
FUSED = {
    "GPT2Attention": "all queries, all keys, all values",
    "MptAttention": "all queries, all keys, all values",
    "Phi3Attention": "all queries, all keys, all values",
    "ModernBertAttention": "all queries, all keys, all values",
    "GPTNeoXAttention": "query, key, value of each head",
    "BloomAttention": "query, key, value of each head",
}


@dataclass(frozen=True)
class _Heads:
    """Where an untouched model's component has its heads.

    ``pieces``: for each head, the slice of the last axis of the module's output (``side="in"``: its input).
    """

    module: Any
    side: str
    pieces: list[slice]

    def split(self, x: Tensor) -> Tensor:
        """Show the heads of a value: [batch, position, heads, width]."""
        x = x.squeeze(1) if x.ndim == 4 else x  # latent attention's keys and values have an axis more
        return torch.stack([x[..., piece] for piece in self.pieces], dim=-2)

    @contextmanager
    def adding(self, change: Tensor, values: list[Tensor]) -> Iterator[None]:
        """Add ``change`` [heads, width] inside the block; keep the unchanged values in ``values``."""

        def edit(x: Tensor) -> Tensor:
            values.append(self.split(x))
            x = x.clone()
            for head, piece in enumerate(self.pieces):
                x[..., piece] += _by_position(change[head], x.shape[-2])
            return x

        if self.side == "in":
            handle = self.module.register_forward_pre_hook(lambda _m, args: (edit(args[0]), *args[1:]))
        else:
            handle = self.module.register_forward_hook(lambda _m, _args, out: edit(out))
        try:
            yield
        finally:
            handle.remove()


@torch.no_grad()
def heads(case: FamilyCase) -> float:
    """Values of every head, and the effect of a different change in each, are those on the untouched model."""
    worst, where = 0.0, ""
    plain, firsts = case.run(case.eager), {}
    for prefix, (stack, layer) in case.attentions().items():
        firsts.setdefault(stack, (prefix, layer))
    for stack, (prefix, layer) in firsts.items():
        for component in ("q", "k", "v", "z", *(["result"] if stack == "" else [])):
            attn = stacks(case.ours.bridge)[stack][layer]
            with _results(case, needed=component == "result") as available:
                if available:
                    gap = _gap(case, prefix, attn, component, plain)
                    worst, where = max((worst, where), (gap, f"{prefix}.hook_{component}"))
    if worst > ALLOWED:
        raise InterpError(f"heads of {where} differ by {worst:.1e} from those of Hugging Face's projections")
    return worst


@contextmanager
def _results(case: FamilyCase, needed: bool) -> Iterator[bool]:
    """Turn on per-head results, if needed; yields whether the model has what is needed."""
    bridge: Any = case.ours.bridge
    try:
        if needed:
            bridge.set_use_attn_result(True)
    except (NotImplementedError, ValueError):
        yield False
        return
    try:
        yield True
    finally:
        if needed:
            bridge.set_use_attn_result(False)


def _gap(case: FamilyCase, prefix: str, attn: Any, component: str, plain: Tensor) -> float:
    """Compare one component of one layer: its values, and the output after a change of every head."""
    module = _untouched(case, attn.original_component)
    calls = {call.layer: call for call in case.stack_calls()[case.attentions()[prefix][0]]}
    call = calls[case.attentions()[prefix][1]]
    n_heads, n_kv = call.q.shape[1], call.k.shape[1]
    source = _pieces(case, module, attn, "z" if component == "result" else component, n_heads, n_kv)
    width = source.pieces[0].stop - source.pieces[0].start
    n = len(source.pieces)
    values: list[Tensor] = []
    ours: list[Tensor] = []
    scale = _added_scale(case) if component == "result" else 1.0
    if component == "result":
        weight = _matrix(source.module).unflatten(1, (n, -1))  # [d_model, heads, width]
        width = weight.shape[0]
        change = _wave(n * width, weight).view(n, width)
        handle = source.module.register_forward_hook(
            lambda _m, _args, out: out + _by_position(change.sum(0), out.shape[1]) / scale
        )
        with source.adding(torch.zeros_like(weight[0]), values):
            expected = case.run(case.eager)
        handle.remove()
        values = [scale * torch.einsum("bmhe,dhe->bmhd", values[0], weight)]
    else:
        change = _wave(n * width, next(module.parameters())).view(n, width)
        with source.adding(change, values):
            expected = case.run(case.eager)

    def add(x: Tensor, hook: Any) -> Tensor:
        ours.append(x[..., :width])
        x = x.clone()
        x[..., :width] += _by_position(change.flatten(), x.shape[1]).unflatten(-1, change.shape).to(x)
        return x

    with hooks(case.ours, (f"{prefix}.hook_{component}", add)):
        got = case.run(case.ours)
    if difference(expected, plain) < 1e-6:
        raise InterpError(f"a change of {prefix}.hook_{component} has no effect by hand")
    return max(difference(ours[0], values[0]), difference(got, expected))


def _pieces(case: FamilyCase, module: Any, attn: Any, component: str, n_heads: int, n_kv: int) -> _Heads:
    """Find the heads of one component in an untouched attention module."""
    if component == "z":
        projection = module.get_submodule(attn.o.name)
        return _Heads(projection, "in", _equal_parts(_matrix(projection).shape[1], n_heads))
    if hasattr(module, "kv_b_proj"):
        return _latent_pieces(module, component, n_heads)
    n = n_heads if component == "q" else n_kv
    if not hasattr(attn, "qkv"):
        projection = module.get_submodule(getattr(attn, component).name)
        parts = _equal_parts(projection.out_features, n)
        if component == "q" and hasattr(attn, "hook_q_gate"):  # each head's query, then its gate
            parts = [slice(p.start, (p.start + p.stop) // 2) for p in parts]
        return _Heads(projection, "out", parts)
    projection = module.get_submodule(attn.qkv.name)
    parts = _equal_parts(_matrix(projection).shape[0], n_heads + 2 * n_kv)
    order = FUSED.get(type(module).__name__) or _falcon_order(module)
    i, group = "qkv".index(component), n_heads // n_kv
    if order == "all queries, all keys, all values":
        first = (0, n_heads, n_heads + n_kv)[i]
        return _Heads(projection, "out", parts[first : first + n])
    if order == "query, key, value of each head":
        return _Heads(projection, "out", parts[i::3])
    if component == "q":
        return _Heads(projection, "out", [parts[h // group * (group + 2) + h % group] for h in range(n_heads)])
    return _Heads(projection, "out", parts[group + i - 1 :: group + 2])


def _latent_pieces(module: Any, component: str, n_heads: int) -> _Heads:
    """Heads of latent attention: of queries and keys only the part that is not rotated is a projection's output."""
    projection = module.q_b_proj if component == "q" else module.kv_b_proj
    n_plain, parts = module.qk_nope_head_dim, _equal_parts(projection.out_features, n_heads)
    if component == "v":
        return _Heads(projection, "out", [slice(p.start + n_plain, p.stop) for p in parts])
    return _Heads(projection, "out", [slice(p.start, p.start + n_plain) for p in parts])


def _falcon_order(module: Any) -> str:
    """How Falcon orders its fused rows, which depends on its config."""
    if type(module).__name__ != "FalconAttention":
        raise InterpError(f"{type(module).__name__} has a fused projection whose rows are not known: add it to FUSED")
    if module.new_decoder_architecture:
        return "queries of a group, its key, its value"
    return "all queries, all keys, all values" if module.multi_query else "query, key, value of each head"


def _added_scale(case: FamilyCase) -> float:
    """The factor by which a block scales attention's output before it adds it (Granite, Falcon-H1)."""
    config = case.eager.config
    scales = [getattr(config, name, None) for name in ("residual_multiplier", "attention_out_multiplier")]
    return next((float(x) for x in scales if x is not None), 1.0)


def _untouched(case: FamilyCase, original: Any) -> Any:
    """The eager model's module that corresponds to a module inside the bridge."""
    for name, module in case.ours.bridge.original_model.named_modules():
        if module is original:
            return case.eager.get_submodule(name.replace("._original_component", ""))
    raise InterpError(f"{type(original).__name__} is not a module of the model")


def _matrix(linear: Any) -> Tensor:
    """A projection's matrix [out, in]; transformers' Conv1D stores its transpose."""
    return linear.weight.T if type(linear).__name__ == "Conv1D" else linear.weight


def _equal_parts(width: int, n: int) -> list[slice]:
    return [slice(i * width // n, (i + 1) * width // n) for i in range(n)]


def _by_position(change: Tensor, n_positions: int) -> Tensor:
    """A different multiple of a change at every position: the same change of all keys would change no pattern."""
    return torch.sin(torch.arange(n_positions, device=change.device) + 1.0)[:, None].to(change) * change


def _wave(n: int, like: Tensor) -> Tensor:
    """A change that is another number in every channel of every head."""
    return torch.cos(torch.arange(n) * 0.7 + 0.3).to(like)
