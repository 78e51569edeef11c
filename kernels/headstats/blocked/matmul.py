"""Matrix products of the blocked backend, by MKL or oneDNN.

The faster of these two CPU libraries of PyTorch is used. `headstats.onednn` says why oneDNN may be faster, and tests
it. The operator is private, so it is used only after it has reproduced a product in this process.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from headstats import onednn
from headstats.blocked import threads

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LEAST = 1 << 14  # below this size of a product, one call per matrix costs more than it gains
# oneDNN compiles and keeps code for every shape, about a megabyte each: it gets only shapes that occur repeatedly.
ROWS, KEYS, WIDTH = 64, 128, 256  # rows and keys in multiples of these; any width of a head up to WIDTH


def batched(
    a: Float[Tensor, "r m k"], b: Float[Tensor, "r k n"], out: Float[Tensor, "r m n"] | None = None
) -> Float[Tensor, "r m n"]:
    """Return a @ b; `out` is memory that may be used."""
    if not _goes_to_onednn(a, b):
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    products = [onednn.linear(x, y.mT) for x, y in zip(a, b, strict=True)]
    if len(products) == 1:
        return products[0][None]
    return torch.stack(products) if out is None else torch.stack(products, out=out)


def _goes_to_onednn(a: Tensor, b: Tensor) -> bool:
    (m, k), n = a.shape[1:], b.shape[2]
    if m * n < LEAST or k == 0 or m % ROWS or any(x > WIDTH and x % KEYS for x in (k, n)):
        return False
    return uses_onednn(a)


def uses_onednn(like: Tensor) -> bool:
    """Whether products of this dtype and device go to oneDNN where their shapes allow."""
    return onednn.is_allowed(like.dtype, like.device) and not threads.is_observed() and onednn_pays()


def round_end(stop: int, n: int) -> int:
    """Round the end of a tile's keys up so that few different ends occur.

    Ends are an eighth of the keys apart, and at least 128.
    """
    step = max(KEYS, 1 << max(0, (n - 1).bit_length() - 3))
    return min(n, -(-stop // step) * step)


@cache
def onednn_pays() -> bool:
    """Whether oneDNN is available, correct and faster here.

    Tested once per process, on one thread.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (192, 768))
    pair = (lambda: onednn.linear(x, weight)), (lambda: torch.mm(x, weight.mT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return onednn.pays([pair], 1e-4, timed=pair, runs=15)
    finally:
        torch.set_num_threads(threads)
