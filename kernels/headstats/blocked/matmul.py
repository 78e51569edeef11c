"""Matrix products of the blocked backend, by the faster of the two CPU libraries that PyTorch carries.

PyTorch sends float32 products to MKL, which on processors that are not Intel's takes its older instructions. oneDNN,
which PyTorch keeps for compiled models and half precision, takes what the processor has: twice as fast on an AVX-512
machine of AMD's. The operator is private, so it is used only after it has reproduced a product in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch

from headstats.blocked import threads as workers

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

WORTH = 1.15  # times faster before oneDNN takes over
LEAST = 1 << 14  # numbers in a product below which a call for each matrix costs more than it gains
# oneDNN compiles code for every shape and keeps it, a megabyte each: only shapes that return are given to it.
ROWS, KEYS, WIDTH = 64, 128, 256  # rows and keys in multiples of these; a head's width (at most WIDTH) as it is


def batched(
    a: Float[Tensor, "r m k"], b: Float[Tensor, "r k n"], out: Float[Tensor, "r m n"] | None = None
) -> Float[Tensor, "r m n"]:
    """a @ b; `out` is room that may be used."""
    if not _by_onednn(a, b):
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    found = [torch.ops.mkldnn._linear_pointwise(x, y.mT, None, "none", [], "") for x, y in zip(a, b, strict=True)]
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
    if like.dtype != torch.float32 or like.device.type != "cpu":
        return False
    # Where the user lets float32 products be rounded to less, oneDNN would do so.
    strict = torch.backends.mkldnn.enabled and torch.get_float32_matmul_precision() == "highest"
    return strict and not workers.watched() and onednn_pays()


def regular(stop: int, n: int) -> int:
    """The end of a tile's keys, moved up so that few ends occur: an eighth of the keys apart, and 128 at least."""
    step = max(KEYS, 1 << max(0, (n - 1).bit_length() - 3))
    return min(n, -(-stop // step) * step)


@cache
def onednn_pays() -> bool:
    """Whether oneDNN is there, agrees with PyTorch's own way, and is faster: tried once a process, on one thread."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 64, generator=g) for n in (192, 768))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            ways: tuple[Callable[[], Tensor], ...] = (
                lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
                lambda: torch.mm(x, w.mT),
            )
            if not (ways[0]() - ways[1]()).abs().max() < 1e-4:
                return False
            return WORTH * _seconds(ways[0]) < _seconds(ways[1])
    except (RuntimeError, TypeError, AttributeError):  # a build without it, or another signature in another version
        return False
    finally:
        torch.set_num_threads(before)


def _seconds(run: Callable[[], Tensor]) -> float:
    """The quickest of some runs: what else the machine does only ever adds."""
    times = []
    for _ in range(15):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return min(times)
