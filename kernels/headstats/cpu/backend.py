"""The compiled CPU backend: attention and every statistic in C++.

Optional; ``python -m headstats.cpu`` builds it.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from headstats.call import Call
from headstats.cpu import library, self_test
from headstats.cpu.arguments import COMPUTED, CallArguments
from headstats.edits import lowering
from headstats.stats import Result
from headstats.validate.values import is_tracing

if TYPE_CHECKING:
    from torch import Tensor

# The fields of a call that this backend reads. A field added to Call later is refused until it is listed here.
READ = {
    "q", "k", "v", "causal", "window", "softcap", "scale", "spec", "bias", "alibi", "sinks", "prefix_k", "prefix_v",
    "key_padding", "query_padding", "q_segments", "k_segments", "segment_mask", "segment_open", "n_segments",
    "targets", "key_features", "gate", "replacement", "temperature", "edit_bias", "knockout", "gain",
    "edit_q_segments", "pattern_q", "pattern_k", "pattern_rows", "logit_factor", "logit_raise", "counterfactual",
    "counterfactual_rows", "counterfactual_renormalise", "counterfactual_seed", "take", "give", "keep_fraction",
}  # fmt: skip


def unsupported(call: Call) -> str | None:
    """Return why this backend cannot do the call, or None."""
    if call.q.device.type != "cpu":
        return f"it runs on CPU, and q is on {call.q.device}"
    if type(call.q) not in (torch.Tensor, torch.nn.Parameter) and not is_tracing(call.q):
        return f"it reads memory, which a {type(call.q).__name__} may not have"
    unread = [f.name for f in fields(call) if f.name not in READ and getattr(call, f.name) is not f.default]
    if unread:
        return f"it does not read {', '.join(unread)}"
    if (reason := lowering.unsupported(call)) is not None:
        return reason
    if missing := [name for name in call.spec.requested() if name not in COMPUTED]:
        return f"it does not compute {', '.join(missing)}"
    return self_test.failure(call.dtype)


def forward(call: Call) -> tuple[Tensor, Tensor, dict[str, Result]]:
    """Return out [B,H,M,Dv], norm [2,B,H,M] (see `call.lse_of`) and the requested statistics by name."""
    return _pass(lowering.lower(call, _pass))


def _pass(call: Call) -> tuple[Tensor, Tensor, dict[str, Result]]:
    compiled, reason = library.find()
    assert compiled is not None, reason  # `unsupported` has checked
    arguments = CallArguments(call, compiled.structure)
    compiled.attend(arguments.c)
    return arguments.out.to(call.q.dtype), arguments.norm, arguments.stats
