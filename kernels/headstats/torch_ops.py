"""Attention as operators of torch.library.

torch.compile and torch.export see one node per call.

The operators take tensors and plain values and return tensors; the loop over tiles, or the launch of a kernel, stays
inside. When no compiler traces, `attend` calls its backend directly, because the dispatcher would only cost time.

The schemas follow the fields of `Call`: a new field needs no change here, as long as it is a tensor or a plain value.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from headstats.backends import BACKENDS
from headstats.call import LEAVES, Call, grad_lse_of
from headstats.spec import StatSpec
from headstats.stats import BY_NAME, Result, from_tensors, tensors

if TYPE_CHECKING:
    from torch import Tensor

PLAIN = {"bool": "bool", "int": "SymInt", "float": "float", "str": "str", "StatSpec": "str"}
FIELDS = tuple(f.name for f in fields(Call))
TENSORS = tuple(f.name for f in fields(Call) if "[Tensor" in str(f.type))
INDEX = {name: i for i, name in enumerate(FIELDS)}


def run(call: Call, backend: str) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Return what the backend's own `run` returns, by calling the operator."""
    if not call.trainable:
        return _forward(call, backend)
    out, norm, stats = _forward(replace(call, gate=None, replacement=None), backend)
    return call.apply_gate(out), norm, stats  # as autograd.with_gradients does


def _forward(call: Call, backend: str) -> tuple[Tensor, Tensor, dict[str, Result]]:
    text = "; ".join([f"{name}={value}" for name, value in call.spec.requested().items()])
    arguments = [text if name == "spec" else getattr(call, name) for name in FIELDS]
    out, norm, flat_stats = torch.ops.headstats.attend(*arguments, backend)
    return out, norm, from_tensors(call.spec.requested(), flat_stats)


def _build_call(arguments: Sequence[Any]) -> Call:
    """Build the call from an operator's arguments, which are in the order of FIELDS."""
    values: dict[str, Any] = dict(zip(FIELDS, arguments, strict=True))
    values["spec"] = _parse_spec(values["spec"])
    return Call(**values)


@cache
def _parse_spec(text: str) -> StatSpec:
    values = {name: literal_eval(value) for name, value in (x.split("=") for x in text.split("; ") if x)}
    return replace(StatSpec.none(), **values)


def _schema(*more: str) -> str:
    """Return operator parameters: the names and types of Call's fields, then `more`."""
    parameters = []
    for f in fields(Call):
        kind, optional, _ = str(f.type).partition(" | None")
        kind = "Tensor" if f.name in TENSORS else PLAIN[kind]
        parameters.append(f"{kind}{'?' if optional else ''} {f.name}")
    return ", ".join([*parameters, *more])


def _attend(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    *call_arguments, backend = arguments
    call = _build_call(call_arguments)
    with torch.no_grad():
        out, norm, stats = BACKENDS[backend].run(call)
    flat_stats = [x.contiguous() for name in call.spec.requested() for x in tensors(stats[name])]
    return out.contiguous(), norm.contiguous(), flat_stats


def _attend_shapes(*arguments: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    call = _build_call(arguments[:-1])
    b, h, m, _ = call.q.shape
    sizes = {"B": b, "H": h, "M": m, "N": call.n, "Dv": call.v.shape[3], "S": call.n_segments}
    sizes |= {"T": 0 if call.targets is None else call.targets.shape[2]}
    sizes |= {"F": 0 if call.key_features is None else call.key_features.shape[2], "k": call.spec.topk}
    flat_stats = []
    for name in call.spec.requested():
        shape = [sizes[letter] for letter in BY_NAME[name].shape.split()]
        if name != "argmax":
            flat_stats.append(call.q.new_empty(shape, dtype=call.dtype))
        if name in ("argmax", "topk"):
            flat_stats.append(call.q.new_empty(shape, dtype=torch.int64))
    out = call.q.new_empty(b, h, m, call.v.shape[3])
    return out, call.q.new_empty(2, b, h, m, dtype=call.dtype), flat_stats


def _setup_context(ctx: Any, inputs: Sequence[Any], output: tuple[Tensor, Tensor, list[Tensor]]) -> None:
    out, norm, stats = output
    ctx.mark_non_differentiable(*stats)
    ctx.save_for_backward(*(inputs[INDEX[name]] for name in TENSORS), out, norm)
    ctx.plain = [None if name in TENSORS else x for name, x in zip(FIELDS, inputs, strict=False)]
    ctx.backend = inputs[-1]


def _gradient(ctx: Any, grad_out: Tensor, grad_norm: Tensor, _: Any) -> tuple[Any, ...]:
    *saved_arguments, out, norm = ctx.saved_tensors
    arguments = list(ctx.plain)
    for name, x in zip(TENSORS, saved_arguments, strict=True):
        arguments[INDEX[name]] = x
    leaf_names = [name for name in LEAVES if ctx.needs_input_grad[INDEX[name]]]
    leaf_grads = torch.ops.headstats.attend_backward(
        *arguments, out, norm, grad_out, grad_lse_of(grad_norm), ", ".join(leaf_names), ctx.backend
    )
    grads: list[Any] = [None] * (len(FIELDS) + 1)
    for name, x in zip(leaf_names, leaf_grads, strict=True):
        grads[INDEX[name]] = x
    return tuple(grads)


def _backward(*arguments: Any) -> list[Tensor]:
    """Return d loss / d leaf for each requested leaf, in the leaf's dtype."""
    *call_arguments, out, norm, grad_out, grad_lse, leaf_names, backend = arguments
    call, names = _build_call(call_arguments), leaf_names.split(", ")
    with torch.no_grad():
        run = BACKENDS[backend].backward
        assert run is not None  # the reference is traced directly, without this operator
        grads = run(call, set(names), out, norm, grad_out, grad_lse)
        return [grads[name].to(getattr(call, name).dtype).contiguous() for name in names]


def _backward_shapes(*arguments: Any) -> list[Tensor]:
    call, names = _build_call(arguments[: len(FIELDS)]), arguments[-2].split(", ")
    leaves = [getattr(call, name) for name in names]
    return [x.new_empty(x.shape) for x in leaves]


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise RuntimeError("headstats' backward is not differentiable: use backend='reference' for second derivatives")


library = torch.library.Library("headstats", "FRAGMENT")
library.define(f"attend({_schema('str backend')}) -> (Tensor, Tensor, Tensor[])")
library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("headstats::attend", _attend_shapes, lib=library)
torch.library.register_autograd("headstats::attend", _gradient, setup_context=_setup_context, lib=library)
_TO_BACKWARD = ("Tensor out", "Tensor norm", "Tensor grad_out", "Tensor grad_lse", "str leaf_names", "str backend")
library.define(f"attend_backward({_schema(*_TO_BACKWARD)}) -> Tensor[]")
library.impl("attend_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("headstats::attend_backward", _backward_shapes, lib=library)
torch.library.register_autograd("headstats::attend_backward", _no_second_derivative, lib=library)
