"""The peers of the benchmark.

They are PyTorch's fused attention, FlexAttention, and eager attention with statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

SINK = 4  # number of first keys whose mass is summed, as in StatSpec()


def eager(
    q: Float[Tensor, "B H M D"], k: Float[Tensor, "B Hk M D"], v: Float[Tensor, "B Hk M Dv"]
) -> dict[str, Tensor]:
    """Compute causal attention with the statistics of StatSpec() as in a notebook.

    There is one expression for each statistic.

    The pattern is computed as in transformers' eager attention: product, scale, additive mask, softmax in float32.
    """
    m, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = torch.full((m, m), torch.finfo(q.dtype).min, dtype=q.dtype, device=q.device).triu(1)
    scores = q @ k.mT * q.shape[3] ** -0.5
    p = (scores + mask).softmax(-1, dtype=torch.float32)
    places = torch.arange(m, device=q.device, dtype=torch.float32)
    return {
        "out": p.to(v.dtype) @ v,
        "entropy": -(p * p.clamp_min(1e-20).log()).sum(-1),
        "max_prob": p.amax(-1),
        "argmax": p.argmax(-1),
        "distance": (p * (places[:, None] - places)).sum(-1),
        "sink": p[..., :SINK].sum(-1),
    }


def eager_lean(
    q: Float[Tensor, "B H M D"], k: Float[Tensor, "B Hk M D"], v: Float[Tensor, "B Hk M Dv"]
) -> dict[str, Tensor]:
    """Compute the same with few passes over the pattern.

    It works in place, without unused copies, and with sums as matrix products.
    """
    m, groups = q.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.mT).mul_(q.shape[3] ** -0.5)
    scores.masked_fill_(torch.ones(m, m, dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    p = scores.softmax(-1, dtype=torch.float32)
    del scores
    places = torch.arange(m, device=q.device, dtype=torch.float32)
    max_prob, argmax = p.max(-1)
    return {
        "out": p.to(v.dtype) @ v,
        "entropy": torch.special.entr(p).sum(-1),
        "max_prob": max_prob,
        "argmax": argmax,
        "distance": places - p @ places,
        "sink": p[..., :SINK].sum(-1),
    }


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run PyTorch's fused attention, causal, without statistics.

    On CUDA, only its flash backend is used.
    """
    if not q.is_cuda:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def flex(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """Compile causal FlexAttention for these inputs; with LSE on CUDA.

    On CPU the compiler refuses to return LSE.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    m = q.shape[2]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, m, m, device=q.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    more: dict[str, Any] = {"return_lse": True} if q.is_cuda else {}

    def run() -> Tensor | tuple[Tensor, ...]:
        with torch.no_grad():
            return compiled(q, k, v, block_mask=mask, enable_gqa=True, **more)

    run()  # compiles
    return run
