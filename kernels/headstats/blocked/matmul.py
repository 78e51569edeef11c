"""Matrix products of the blocked backend, by the faster of the two CPU libraries that PyTorch carries.

PyTorch sends float32 products to MKL, which on processors that are not Intel's takes its older instructions. oneDNN,
which PyTorch keeps for compiled models and half precision, takes what the processor has: twice as fast on an AVX-512
machine of AMD's. The operator is private, so it is used only after it has reproduced a product in this process.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from headstats import onednn
from headstats.blocked import threads as workers

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

LEAST = 1 << 14  # numbers in a product below which a call for each matrix costs more than it gains
# oneDNN compiles code for every shape and keeps it, a megabyte each: only shapes that return are given to it.
ROWS, KEYS, WIDTH = 64, 128, 256  # rows and keys in multiples of these; a head's width (at most WIDTH) as it is


def batched(
    a: Float[Tensor, "r m k"], b: Float[Tensor, "r k n"], out: Float[Tensor, "r m n"] | None = None
) -> Float[Tensor, "r m n"]:
    """a @ b; `out` is room that may be used."""
    if not _by_onednn(a, b):
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    found = [onednn.linear(x, y.mT) for x, y in zip(a, b, strict=True)]
    if len(found) == 1:
        return found[0][None]
    return torch.stack(found) if out is None else torch.stack(found, out=out)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    (m, k), n = a.shape[1:], b.shape[2]
    if m * n < LEAST or k == 0 or m % ROWS or any(x > WIDTH and x % KEYS for x in (k, n)):
        return False
    return takes(a)


def takes(like: Tensor) -> bool:
    """Whether products of such numbers go to oneDNN where their shapes allow."""
    return onednn.is_allowed(like.dtype, like.device) and not workers.watched() and onednn_pays()


def regular(stop: int, n: int) -> int:
    """The end of a tile's keys, moved up so that few ends occur: an eighth of the keys apart, and 128 at least."""
    step = max(KEYS, 1 << max(0, (n - 1).bit_length() - 3))
    return min(n, -(-stop // step) * step)


@cache
def onednn_pays() -> bool:
    """Whether oneDNN is available, correct and faster here: tested once per process, on one thread."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (192, 768))
    pair = (lambda: onednn.linear(x, weight)), (lambda: torch.mm(x, weight.mT))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return onednn.pays([pair], 1e-4, timed=pair, runs=15)
    finally:
        torch.set_num_threads(threads)
