"""Matrix products by the faster of the two CPU libraries that PyTorch contains.

PyTorch computes float32 products with MKL, which uses older instructions on processors that are not Intel's. oneDNN,
which PyTorch uses for compiled models and half precision, uses the newest instructions that the processor has. On an
AVX-512 machine with an AMD processor it is twice as fast. Both round in float32, each in a different order.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from headstats import onednn
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ROWS, WIDTH = 256, 768  # size of the product that is timed to choose between the two


class Products:
    """x weightᵀ + bias, and operations fused with it.

    This class uses PyTorch's default library.
    """

    def rows(self, n: int) -> int:
        """Number of rows to allocate for ``n`` rows; padding costs less than it saves."""
        return n

    def linear(
        self, x: Float[Tensor, "*rows inner"], weight: Float[Tensor, "outer inner"], bias: Tensor | None = None
    ) -> Float[Tensor, "*rows outer"]:
        """Compute x weightᵀ + bias."""
        return F.linear(x, weight, bias)

    def silu(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute silu(x weightᵀ + bias)."""
        return F.silu(F.linear(x, weight, bias), inplace=True)

    def times(self, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
        """Compute (x weightᵀ + bias) · other, element by element."""
        return F.linear(x, weight, bias).mul_(other)


class OneDNN(Products):
    """Products by the operators that torch.compile puts into its CPU code.

    They are float32, without autograd. oneDNN compiles code for every number of rows and keeps it, a megabyte or two
    each. Rows are padded so that few numbers of rows occur: here for each product, unless its rows are padded already.
    """

    def rows(self, n: int) -> int:
        """As Products."""
        return round_up_rows(n)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As Products."""
        return _unpad(onednn.linear(_pad(x), weight, bias), x)

    def silu(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As Products."""
        return _unpad(onednn.linear(_pad(x), weight, bias, "swish"), x)

    def times(self, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
        """As Products."""
        product = onednn.linear_times(_pad(x), _pad(other), weight, bias)
        return _unpad(product, x)


def round_up_rows(rows: int) -> int:
    """Round up to the next number of rows for which code is compiled.

    There are four such numbers for each power of two, or multiples of 16.
    """
    step = max(16, (1 << max(0, rows - 1).bit_length()) // 8)
    return -(-rows // step) * step


def _pad(x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "more inner"]:
    flat = x.reshape(-1, x.shape[-1])
    n_padding = round_up_rows(len(flat)) - len(flat)
    return F.pad(flat, (0, 0, 0, n_padding)) if n_padding else flat


def _unpad(product: Float[Tensor, "more outer"], x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
    return product[: x.shape[:-1].numel()].view(*x.shape[:-1], -1)


PLAIN, ONEDNN = Products(), OneDNN()


@cache
def is_onednn_faster(threads: int) -> bool:
    """Whether oneDNN is available, correct and faster on this many threads.

    This is tested once per process.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, other = (torch.randn(n, WIDTH, generator=generator) for n in (ROWS, WIDTH, ROWS))
    bias = weight[0]
    pairs = [
        (lambda: ONEDNN.linear(x, weight, bias), lambda: PLAIN.linear(x, weight, bias)),
        (lambda: ONEDNN.silu(x, weight), lambda: PLAIN.silu(x, weight)),
        (lambda: ONEDNN.times(x, weight, bias, other), lambda: PLAIN.times(x, weight, bias, other)),
    ]
    timed = (lambda: ONEDNN.linear(x, weight)), (lambda: PLAIN.linear(x, weight))
    return onednn.pays(pairs, 1e-5 * WIDTH, timed, runs=9)


def choose_products(dtype: torch.dtype, device: torch.device) -> Products:
    """Choose the faster implementation for this dtype and device.

    While autograd is on, this is PyTorch's default.
    """
    if torch.is_grad_enabled() or not onednn.is_allowed(dtype, device):
        return PLAIN
    return ONEDNN if is_onednn_faster(torch.get_num_threads()) else PLAIN


def redirect_products(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Compute a model's own matrix products the faster way inside the block.

    These are F.linear, and addmm in Hugging Face's Conv1D.
    """
    return nullcontext() if choose_products(dtype, device) is PLAIN else _OneDNNProducts()


class _OneDNNProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _are_plain_float32(*args):
            return ONEDNN.linear(*args)
        if func is torch.addmm and not kwargs and _are_plain_float32(*args) and args[0].ndim == 1:
            bias, x, weight = args
            return ONEDNN.linear(x, weight.t(), bias)
        return func(*args, **(kwargs or {}))


def _are_plain_float32(*tensors: Tensor | None) -> bool:
    return all(
        t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.dtype == torch.float32 and t.is_cpu)
        for t in tensors
    )
