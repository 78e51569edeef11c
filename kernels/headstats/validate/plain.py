"""Reduction of every tensor argument to a plain dense tensor, before a backend is chosen.

The compiled backend reads memory, so that a tensor without memory would kill the process, and a property that torch
applies lazily (a negative bit, a tangent) would be ignored. What can be written out is written out, what torch's own
operators can carry goes to the reference, and the rest is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from headstats.validate.values import is_tracing

functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]

if TYPE_CHECKING:
    from headstats.call import Call
    from headstats.edit import Edit

PLAIN = (Tensor, torch.nn.Parameter)
PAIRS = {"prefix": ("prefix[0]", "prefix[1]"), "pattern_from": ("Edit.pattern_from[0]", "Edit.pattern_from[1]")}


def materialise_all(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `attend` with plain tensors, also those in pairs; others are returned as they are."""
    if torch.compiler.is_compiling():
        return arguments
    fake = _fake(arguments["q"])
    if fake is None and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        raise TypeError("q has numbers, but FakeTensorMode is on, under which results would have none: leave the mode")
    return {name: _materialise_argument(name, name, x, fake) for name, x in arguments.items()}


def materialise_edit(edit: Edit, q: Tensor) -> Edit:
    """Return the edit with plain tensors."""
    if torch.compiler.is_compiling():
        return edit
    fake, changes = _fake(q), {}
    for f in fields(edit):
        if isinstance(x := getattr(edit, f.name), Tensor | tuple | list):
            changes[f.name] = _materialise_argument(f.name, f"Edit.{f.name}", x, fake)
    return replace(edit, **changes) if changes else edit


def _fake(q: Any) -> FakeTensor | None:
    return q if isinstance(q, FakeTensor) else None


def _materialise_argument(field: str, name: str, x: Any, fake: FakeTensor | None) -> Any:
    if isinstance(x, Tensor):
        return materialise(name, x, fake)
    if field in PAIRS and isinstance(x, tuple | list) and len(x) == 2:
        names = zip(PAIRS[field], x, strict=True)
        return tuple(materialise(n, y, fake) if isinstance(y, Tensor) else y for n, y in names)
    return x


def materialise(name: str, x: Tensor, fake: FakeTensor | None = None) -> Tensor:
    """Return x as a plain dense tensor with memory of its own or of its base.

    fake: q, if it is a fake tensor; the others must then be fake as well, or allowed beside fake ones.

    Raises TypeError for another kind of tensor, and ValueError for one whose memory is gone.
    """
    if isinstance(x, FakeTensor) and fake is None:
        raise TypeError(f"{name} is a FakeTensor, which has no numbers, but q is not one")
    if isinstance(x, FakeTensor) or (fake is not None and fake.fake_mode.allow_non_fake_inputs):
        return x
    if fake is not None:
        raise TypeError(f"{name} has numbers, but q is a FakeTensor: all of one kind expected")
    if type(x) not in PLAIN:
        x = _base_of_subclass(name, x)
    if x.is_meta and name != "q":
        return x  # refused with its device, which is not that of q
    if x.layout is not torch.strided or x.is_nested or x.is_quantized or x.is_meta:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
        kind = "on the meta device, without numbers" if x.is_meta else f"a {kind} tensor"
        raise TypeError(f"{name} is {kind}: a plain dense tensor expected")
    if functorch.is_functorch_wrapped_tensor(x):
        if _is_batched(x):
            raise NotImplementedError(f"{name} is inside torch.vmap, which attend does not do: use its batch axis")
        return x  # `transform_of` sends the call to the reference
    if x.is_neg() or x.is_conj():
        x = x.resolve_conj().resolve_neg()
    if x._is_zerotensor():
        x = x.clone()
    _check_memory(name, x)
    return x


def _base_of_subclass(name: str, x: Tensor) -> Tensor:
    """Return a subclass with ordinary memory as a Tensor."""
    kind: Any = type(x)
    plain: Any = Tensor
    if kind.__torch_dispatch__ is not plain.__torch_dispatch__ or torch.nn.parameter.is_lazy(x):
        raise TypeError(f"{name} is a {kind.__name__}, which may have no memory of its own: a plain tensor expected")
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def _check_memory(name: str, x: Tensor) -> None:
    if x.numel() == 0:
        return
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    available, needed = x.untyped_storage().nbytes(), (last + 1) * x.element_size()
    if available < needed or x.data_ptr() == 0:
        raise ValueError(
            f"{name} has no memory for its numbers ({available} bytes of {needed}): its storage was freed or resized, "
            "as FSDP does with parameters that are not in use"
        )


def _is_batched(x: Tensor) -> bool:
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


def transform_of(call: Call) -> str | None:
    """Return why only the reference, made of torch's own operators, can do a call, or None.

    That is so if an argument carries a forward-mode tangent or is inside a transform of torch.func.
    """
    if is_tracing(call.q):
        return None
    if forward_ad._current_level >= 0:
        for name, x in _tensors(call):
            if forward_ad.unpack_dual(x).tangent is not None:
                return f"{name} has a forward-mode tangent, which only backend 'reference' carries on"
    if functorch.maybe_current_level() is not None:
        for name, x in _tensors(call):
            if functorch.is_functorch_wrapped_tensor(x):
                return f"{name} is inside a transform of torch.func, which only backend 'reference' carries out"
    return None


def _tensors(call: Call) -> Iterable[tuple[str, Tensor]]:
    for f in fields(call):
        if isinstance(x := getattr(call, f.name), Tensor):
            yield f.name, x
