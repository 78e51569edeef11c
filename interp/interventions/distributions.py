"""The fields of an edit that hold several numbers: weights of a row by token, and gates by head and token."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from interp.errors import InterpError

if TYPE_CHECKING:
    pass

ROUNDING = 1e-4  # by which the sum of a row's weights may differ from 1
GATE_SHAPES = "a number, or a tensor [heads of the layer] or [heads of the layer, queries]"


def as_weights(weights: Any) -> dict[int | str, float] | tuple[float, ...] | None:
    """Return a distribution by position or span, or by token of the prompt; None stays None.

    Raises InterpError unless it holds numbers that are at least 0 and sum to 1.
    """
    if weights is None:
        return None
    by_token: Any = weights
    if isinstance(weights, Mapping):
        if any(isinstance(name, bool) or not isinstance(name, int | str) for name in weights):
            raise _bad_weights(weights)
        by_token = weights.values()
    elif hasattr(weights, "tolist"):
        by_token = weights.tolist()
    if isinstance(by_token, str) or not isinstance(by_token, Iterable):
        raise _bad_weights(weights)
    items = tuple(by_token)
    if any(isinstance(x, bool) or not isinstance(x, Real) for x in items):
        raise _bad_weights(weights)
    numbers = tuple(map(float, items))
    total, smallest = sum(numbers), min(numbers, default=0.0)
    if not smallest >= 0 or not math.isclose(total, 1, abs_tol=ROUNDING):
        raise InterpError(
            f"AttentionEdit(weights=…): a distribution expected, whose numbers are at least 0 and sum to 1; these sum "
            f"to {total:g}" + (f", and the smallest is {smallest:g}" if smallest < 0 else "")
        )
    return dict(zip(weights, numbers, strict=True)) if isinstance(weights, Mapping) else numbers


def by_name(weights: Mapping[int | str, float] | Sequence[float]) -> Mapping[int | str, float]:
    """Return weights by position or span; of those by token, the positions that have any."""
    return weights if isinstance(weights, Mapping) else {i: x for i, x in enumerate(weights) if x}


def _bad_weights(weights: Any) -> InterpError:
    return InterpError(
        f"AttentionEdit(weights={weights!r:.80}): numbers by position or span expected, e.g. {{'S1': 0.5, -4: 0.5}}, "
        "or one number for each token of the prompt"
    )


def as_gate(gate: Any) -> Any:
    """Return a number as it is, or several as a tensor, without gradients.

    Raises InterpError for tensors that are not finite or have another shape.
    """
    if gate is None or isinstance(gate, bool | int | float | str):
        return gate
    import torch

    wide = None if hasattr(gate, "dtype") else torch.float64
    try:
        gates = torch.as_tensor(gate, dtype=wide).detach()
    except (TypeError, ValueError, RuntimeError):
        raise InterpError(f"AttentionEdit(gate={gate!r:.60}): {GATE_SHAPES} expected") from None
    if gates.ndim == 0:
        return gates.item()
    if gates.ndim > 2 or not gates.numel() or gates.is_complex():
        raise InterpError(f"AttentionEdit(gate=…) has shape {list(gates.shape)}: {GATE_SHAPES} expected")
    if not bool(gates.isfinite().all()):
        raise InterpError("AttentionEdit(gate=…): finite numbers expected")
    return gates
