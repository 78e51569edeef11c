"""The optional search for NaN and infinity in arguments (`check_finite=True`).

It costs a pass over every argument.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from headstats.call import Call
from headstats.validate.values import is_tracing

if TYPE_CHECKING:
    from jaxtyping import Shaped

ARGUMENTS = ("q", "k", "v", "bias", "alibi", "sinks", "key_features")  # other fields of a call are those of its Edit
PUBLIC_NAMES = {  # names of arguments whose field in Call has another name
    "prefix_k": "prefix[0]", "prefix_v": "prefix[1]", "edit_bias": "Edit.bias",
    "pattern_q": "Edit.pattern_from[0]", "pattern_k": "Edit.pattern_from[1]",
}  # fmt: skip


def check_finite(call: Call) -> None:
    """Raise ValueError for the first argument with NaN or infinity.

    The message names the argument and the first such place.

    A bias may hold -inf, which hides a cell. Raises NotImplementedError while a compiler traces.
    """
    if is_tracing(call.q):
        raise NotImplementedError("check_finite=True reads numbers, which torch.compile does not have: check before")
    for field in fields(call):
        x = getattr(call, field.name)
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            continue
        invalid = x.isnan() | (x == torch.inf) if field.name == "bias" else ~x.isfinite()
        if bool(invalid.any()):
            name = field.name if field.name in ARGUMENTS else PUBLIC_NAMES.get(field.name, f"Edit.{field.name}")
            raise ValueError(_message(name, x, invalid))


def _message(name: str, x: Shaped[torch.Tensor, "*shape"], invalid: Shaped[torch.Tensor, "*shape"]) -> str:
    first = int(invalid.flatten().to(torch.uint8).argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(first), x.shape)]
    allowed = "finite numbers or -inf (hides the cell) expected" if name == "bias" else "finite numbers expected"
    return (
        f"{name} holds {float(x.flatten()[first])} at {place} of {list(x.shape)}, the first of {int(invalid.sum())} "
        f"such numbers: {allowed}"
    )
