"""What fits by gradient descent share: weights without gradients, shuffled batches, checks of losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from torch import Tensor

from interp.errors import InterpError
from interp.model.model import Model


@contextmanager
def without_weight_gradients(model: Model) -> Iterator[None]:
    """Inside, weights need no gradients, so that nothing is kept for them."""
    needed = [p for p in model.bridge.parameters() if p.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


def shuffled_batches(n: int, batch: int, steps: int, seed: int) -> Iterator[list[int]]:
    """``steps`` batches of numbers below n: shuffled, all of them before any comes again."""
    rng, queue = np.random.default_rng(seed), []
    for _ in range(steps):
        if len(queue) < min(batch, n):
            queue += rng.permutation(n).tolist()
        yield queue[:batch]
        queue = queue[batch:]


def require_finite(value: Tensor, what: str, why: str = "") -> float:
    """A number that is one. InterpError if it is NaN or infinite, with ``why`` (default: the model's precision)."""
    found = float(value.detach())
    if not np.isfinite(found):
        why = why or "the model gives no finite probabilities on this data (try dtype='float32')"
        raise InterpError(f"{what} is {found}: {why}")
    return found
