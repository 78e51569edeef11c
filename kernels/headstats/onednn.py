"""oneDNN's float32 matrix products on CPU, and the test of whether they pay.

PyTorch sends float32 products to MKL, which uses older instructions on processors that are not Intel's. oneDNN, which
PyTorch ships for compiled models and half precision, uses what the processor has: it is twice as fast on an AVX-512
machine of AMD's. The operators are private, so callers use them only after `pays` has compared their results with
PyTorch's own products in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Product = Callable[[], Tensor]

SPEEDUP = 1.15  # oneDNN is used where it is at least this many times faster


def linear(
    x: Float[Tensor, "rows inner"],
    weight: Float[Tensor, "outer inner"],
    bias: Float[Tensor, " outer"] | None = None,
    activation: str = "none",
) -> Float[Tensor, "rows outer"]:
    """Return activation(x weight^T + bias). activation: "none" or "swish" (SiLU).

    Without autograd.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "")


def linear_times(
    x: Float[Tensor, "rows inner"],
    other: Float[Tensor, "rows outer"],
    weight: Float[Tensor, "outer inner"],
    bias: Float[Tensor, " outer"] | None = None,
) -> Float[Tensor, "rows outer"]:
    """Return (x weight^T + bias) * other, element by element. Without autograd."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, bias, "mul")


def is_allowed(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of this dtype and device may go to oneDNN.

    They may where oneDNN computes them at full precision under the user's settings.
    """
    if dtype != torch.float32 or device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    # At a lower setting, oneDNN would round float32 products to less.
    return torch.get_float32_matmul_precision() == "highest"


@torch.no_grad()
def pays(pairs: Sequence[tuple[Product, Product]], tolerance: float, timed: tuple[Product, Product], runs: int) -> bool:
    """Whether oneDNN exists here, agrees with PyTorch's own products, and is faster.

    pairs: (by oneDNN, by PyTorch) of products that must agree within `tolerance`.  timed: the pair whose quickest of
    `runs` runs are compared.
    """
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    try:
        if not all((by_onednn() - by_torch()).abs().max() < tolerance for by_onednn, by_torch in pairs):
            return False
        by_onednn, by_torch = timed
        return SPEEDUP * _quickest(by_onednn, runs) < _quickest(by_torch, runs)
    except (RuntimeError, TypeError, AttributeError):  # a build without it, or another signature in another version
        return False


def _quickest(product: Product, runs: int) -> float:
    """Seconds of the quickest run: whatever else the machine does only adds time."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
