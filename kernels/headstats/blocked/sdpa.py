"""PyTorch's CPU flash attention.

It serves calls that need only out, lse and statistics of keys known in advance.

The operator is private, so it is used only after it has reproduced a small case in this process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headstats import probes
from headstats.call import LN2, LOG2E, LOWEST, Call
from headstats.stats import Result

if TYPE_CHECKING:
    from torch import Tensor

# Below this many keys a single tile is faster, except with few rows, where the overhead of the call matters.
MIN_KEYS, FEW_ROWS = 48, 512
# Weights are computed from lse, in whose rounding log(n) is lost beside large logits. Up to here, it costs under 2e-5.
LARGEST_LSE = 256.0
LARGEST_FINITE = -LOWEST * LN2
# Fields of a call that the operator does not have.
UNSUPPORTED = (
    "softcap", "window", "bias", "alibi", "sinks", "key_padding", "segment_mask", "segment_open", "pattern_q",
    "logit_factor", "logit_raise", "temperature", "edit_bias", "knockout", "counterfactual", "gain", "take",
)  # fmt: skip


def is_faster(call: Call) -> bool:
    """Whether this path can do the call and is faster than tiles."""
    q, n = call.q, call.n
    if (
        q.device.type != "cpu"
        or call.v.shape[3] != q.shape[3]
        or any(getattr(call, x) is not None for x in UNSUPPORTED)
    ):
        return False
    ahead = call.k.shape[2] - q.shape[2]
    if call.causal and not (ahead == 0 or (q.shape[2] == 1 and ahead > 0)):
        return False
    if n < MIN_KEYS and q.shape[0] * q.shape[1] * q.shape[2] > FEW_ROWS:
        return False
    computed = probes.PROBED if call.prefix_k is None else ()
    return set(call.spec.requested()) <= set(computed) and _works(q.dtype)


def forward(call: Call) -> tuple[Tensor, Tensor, dict[str, Result]] | None:
    """Return out [B,H,M,Dv], norm [2,B,H,M] (see `call.lse_of`) and the requested statistics by name.

    None if logits turn out too large, or not finite, for this path.
    """
    out, lse = _flash(call.q, call.k, call.v, call.causal and call.k.shape[2] == call.q.shape[2], call.scale)
    if call.prefix_k is not None:
        out, lse, largest = _joined(call.dtype, (out, lse), _over_prefix(call))
    else:
        largest = float(lse.abs().amax())
    limit = LARGEST_LSE if call.spec.requested() or call.prefix_k is not None else LARGEST_FINITE
    if not largest <= limit:
        return None
    out = call.apply_gate(out).to(call.q.dtype)
    stats: dict[str, Result] = {n: probes.statistic(call, lse, n, x) for n, x in call.spec.requested().items()}
    return out, torch.stack([lse * LOG2E, torch.zeros_like(lse)]), stats


def _over_prefix(call: Call) -> tuple[Tensor, Tensor]:
    """Attend to the prefix alone.

    The batch rows of a run become more queries of one batch row.
    """
    assert call.prefix_k is not None and call.prefix_v is not None
    (b, h, m, d), runs = call.q.shape, call.prefix_k.shape[0]
    q = call.q.reshape(runs, b // runs, h, m, d).transpose(1, 2).reshape(runs, h, -1, d)
    out, lse = _flash(q, call.prefix_k, call.prefix_v, False, call.scale)
    out, lse = (x.unflatten(2, (-1, m)).transpose(1, 2).flatten(0, 1) for x in (out, lse))
    return out, lse


def _joined(
    dtype: torch.dtype, own: tuple[Tensor, Tensor], prefix: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, float]:
    """Join attention over two sets of keys. Also returns the largest |lse| of either.

    The weights are exp(lse of one - lse of both).
    """
    lse = torch.logaddexp(own[1], prefix[1])
    a, b = (out.to(dtype) * torch.exp(one - lse)[..., None] for out, one in (own, prefix))
    return a + b, lse, float(torch.maximum(own[1].abs(), prefix[1].abs()).amax())


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


@lru_cache
def _works(dtype: torch.dtype) -> bool:
    """Whether the operator reproduces the formula on grouped heads with a scale."""
    q = torch.linspace(-2, 2, 4 * 3 * 8).sin().view(1, 4, 3, 8).to(dtype)
    k, v = q[:, ::2].flip(2), q[:, 1::2]
    try:
        out, lse = _flash(q, k, v, True, 0.5)
    except (RuntimeError, AttributeError, TypeError):
        return False
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.5
    scores = scores.masked_fill(torch.ones(3, 3).triu(1) > 0, -torch.inf)
    expected = scores.softmax(-1) @ v.double().repeat_interleave(2, 1)
    return torch.allclose(out.double(), expected, rtol=0, atol=4 * torch.finfo(dtype).eps) and torch.allclose(
        lse.double(), scores.logsumexp(-1), atol=1e-2 if dtype.itemsize < 4 else 1e-5
    )
