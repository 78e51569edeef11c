"""Move a progress bar layer by layer, while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from interp.utils.progress import Advance, is_shown


@contextmanager
def by_layer(model: Any, advance: Advance, n: float, forwards: int = 1) -> Iterator[None]:
    """Move a bar by ``n`` in total inside the block: a share after each layer of each of ``forwards`` forwards.

        with by_layer(model, advance, len(batch)):
            model.last_logits(batch)

    Further forwards move nothing; what is missing at the end is added. A bar that nobody sees costs nothing.
    """
    blocks = list(getattr(model.bridge, "blocks", None) or ()) if is_shown() else []
    step, done = n / (forwards * max(1, len(blocks))), 0.0

    def tick(*_: Any) -> None:
        nonlocal done
        if done + step <= n:
            done += step
            advance(step)

    handles = [block.register_forward_hook(tick) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    advance(n - done)


class Share:
    """How much of a batch is done: moves a bar by the share of its ``n`` cells, and never back."""

    def __init__(self, advance: Advance, n: int):
        self.advance, self.n, self.done = advance, n, 0.0

    def to(self, share: float) -> None:
        """Move to a share between 0 and 1."""
        if share > self.done:
            self.advance((share - self.done) * self.n)
            self.done = share
