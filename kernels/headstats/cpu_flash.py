"""PyTorch's own CPU flash attention, where its result is all that is asked: out, lse, and statistics of known keys.

The operator is private, so it is used only after it has reproduced a small case in this process.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from headstats import probes
from headstats.call import Call
from headstats.stats import Result

if TYPE_CHECKING:
    from torch import Tensor

# Below this many keys a single tile is faster, unless there are few rows and the call's overhead counts.
MIN_KEYS, FEW_ROWS = 48, 512


def suits(call: Call) -> bool:
    """Whether this path can do the call and is the faster one."""
    q, n = call.q, call.n
    plain = call.softcap is call.window is call.bias is call.sinks is call.key_padding is None
    aligned = not call.causal or call.offset == 0 or (q.shape[2] == 1 and call.offset > 0)
    if not (plain and aligned and q.device.type == "cpu" and call.v.shape[3] == q.shape[3]):
        return False
    if n < MIN_KEYS and q.shape[0] * q.shape[1] * q.shape[2] > FEW_ROWS:
        return False
    return set(call.spec.requested()) <= set(probes.PROBED) and _works(q.dtype)


def forward(call: Call) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Returns out [B,H,M,Dv], lse [B,H,M] and the requested statistics by name."""
    out, lse = _flash(call.q, call.k, call.v, call.causal and call.offset == 0, call.scale)
    if call.gate is not None:
        out = (out * call.gate[..., None]).to(out.dtype)
    return out, lse, {n: probes.statistic(call, lse, n, x) for n, x in call.spec.requested().items()}


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


@lru_cache
def _works(dtype: torch.dtype) -> bool:
    """Runs the operator on grouped heads with a scale and compares out and lse with the formula."""
    q = torch.linspace(-2, 2, 4 * 3 * 8).sin().view(1, 4, 3, 8).to(dtype)
    k, v = q[:, ::2].flip(2), q[:, 1::2]
    try:
        out, lse = _flash(q, k, v, True, 0.5)
    except (RuntimeError, AttributeError, TypeError):
        return False
    scores = q.double() @ k.double().repeat_interleave(2, 1).mT * 0.5
    scores = scores.masked_fill(torch.ones(3, 3).triu(1) > 0, -torch.inf)
    want = scores.softmax(-1) @ v.double().repeat_interleave(2, 1)
    return torch.allclose(out.double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps) and torch.allclose(
        lse.double(), scores.logsumexp(-1), atol=1e-2 if dtype.itemsize < 4 else 1e-5
    )
