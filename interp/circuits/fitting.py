"""Helpers of fits by gradient descent.

Weights without gradients, shuffled batches, and checks of losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from interp.errors import InterpError
from interp.model.model import Model


@contextmanager
def without_weight_gradients(model: Model) -> Iterator[None]:
    """Inside the block, weights need no gradients, so nothing is stored for them."""
    trainable = [p for p in model.bridge.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def shuffled_batches(n: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """``steps`` batches of shuffled indices below n.

    Every index is used before any is repeated.
    """
    rng, queue = np.random.default_rng(seed), []
    for _ in range(steps):
        if len(queue) < min(batch, n):
            queue += rng.permutation(n).tolist()
        yield queue[:batch]
        queue = queue[batch:]


def require_finite(value: Tensor, what: str, advice: str = "") -> float:
    """The value as a float.

    Raises InterpError, with ``advice`` (default: try float32), if it is NaN or infinite.
    """
    number = float(value.detach())
    if not np.isfinite(number):
        advice = advice or "the model gives no finite probabilities on this data (try dtype='float32')"
        raise InterpError(f"{what} is {number}: {advice}")
    return number
