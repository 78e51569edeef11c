"""Matrix products by the faster of the two CPU libraries that PyTorch carries.

PyTorch sends float32 products to MKL, which on processors that are not Intel's takes its older instructions; oneDNN,
which PyTorch keeps for compiled models and half precision, takes what the processor has. On an AVX-512 machine of
AMD's it is twice as fast. Both round in float32, each in an order of its own.
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

ROWS, WIDTH = 256, 768  # of the product that decides


class Products:
    """x weightᵀ + bias, and what is done at once with the result. Subclasses say how; here by PyTorch's own way."""

    def rows(self, n: int) -> int:
        """How many rows to lay out for n of them: those beyond cost less than what they spare."""
        return n

    def linear(
        self, x: Float[Tensor, "*rows inner"], weight: Float[Tensor, "outer inner"], bias: Tensor | None = None
    ) -> Float[Tensor, "*rows outer"]:
        """x weightᵀ + bias."""
        return F.linear(x, weight, bias)

    def silu(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """silu(x weightᵀ + bias)."""
        return F.silu(F.linear(x, weight, bias), inplace=True)

    def times(self, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
        """(x weightᵀ + bias) · other, element by element."""
        return F.linear(x, weight, bias).mul_(other)


class OneDNN(Products):
    """By the operators that torch.compile puts into its CPU code. Float32, without autograd.

    oneDNN compiles code for every number of rows and keeps it, a megabyte or two each: rows are filled up so that few
    numbers of them occur, here for each product unless they come so.
    """

    def rows(self, n: int) -> int:
        """As Products."""
        return filled_rows(n)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As Products."""
        return _cut(onednn.linear(_filled(x), weight, bias), x)

    def silu(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As Products."""
        return _cut(onednn.linear(_filled(x), weight, bias, "swish"), x)

    def times(self, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
        """As Products."""
        product = onednn.linear_times(_filled(x), _filled(other), weight, bias)
        return _cut(product, x)


def filled_rows(rows: int) -> int:
    """The next number of rows that is worth code of its own: four for each power of two, or multiples of 16."""
    step = max(16, (1 << max(0, rows - 1).bit_length()) // 8)
    return -(-rows // step) * step


def _filled(x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "more inner"]:
    flat = x.reshape(-1, x.shape[-1])
    more = filled_rows(len(flat)) - len(flat)
    return F.pad(flat, (0, 0, 0, more)) if more else flat


def _cut(found: Float[Tensor, "more outer"], x: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows outer"]:
    return found[: x.shape[:-1].numel()].view(*x.shape[:-1], -1)


PLAIN, ONEDNN = Products(), OneDNN()


@cache
def onednn_pays(threads: int) -> bool:
    """Whether oneDNN is available, correct and faster on this many threads: tested once per process."""
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


def products_for(dtype: torch.dtype, device: torch.device) -> Products:
    """The faster way for such matrices, with autograd where it is on."""
    if torch.is_grad_enabled() or not onednn.is_allowed(dtype, device):
        return PLAIN
    return ONEDNN if onednn_pays(torch.get_num_threads()) else PLAIN


def redirected(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Inside the block, a model's own products (F.linear, and addmm in Hugging Face's Conv1D) go the faster way."""
    return nullcontext() if products_for(dtype, device) is PLAIN else _Redirected()


class _Redirected(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _plain(*args):
            return ONEDNN.linear(*args)
        if func is torch.addmm and not kwargs and _plain(*args) and args[0].ndim == 1:
            bias, x, weight = args
            return ONEDNN.linear(x, weight.t(), bias)
        return func(*args, **(kwargs or {}))


def _plain(*tensors: Tensor | None) -> bool:
    return all(
        t is None or (type(t) in (Tensor, torch.nn.Parameter) and t.dtype == torch.float32 and t.is_cpu)
        for t in tensors
    )
