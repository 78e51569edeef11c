"""Refuse first-order estimates of a metric that has no slope where the gradient is taken."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InterpError
from interp.metrics import Metric, Readout

LEAST_SLOPE = 1e-3  # of the slope at the other run: below, a first-order estimate is rounding


def check_slope(
    metric: Metric, base: Float[Tensor, "batch vocab"], other: Float[Tensor, "batch vocab"], read: Readout, run: str
) -> None:
    """Raise InterpError if the metric is flat at the logits of every base run.

    KL(clean ‖ run) has its minimum at the clean run: its gradient there is 0, and what is computed of it is rounding.
    ``run``: the name of the base run, "clean" or "corrupt". A metric without a gradient passes: others refuse it.
    """
    slopes = [_slope(metric, logits, read) for logits in (base, other)]
    if any(s is None for s in slopes):
        return
    at_base, at_other = (s for s in slopes if s is not None)
    if bool((at_other > 0).any()) and bool((at_base <= LEAST_SLOPE * at_other).all()):
        share = float((at_base / at_other.clamp(min=torch.finfo(at_other.dtype).tiny)).max())
        mode = "denoise" if run == "clean" else "noise"
        raise InterpError(
            f"metric {metric.name!r} has no slope at the {run} run (its gradient there is {share:.1g} of that at the "
            f"other run), so a first-order estimate would be rounding: use mode={mode!r}, a method of integrated "
            "gradients, or a metric such as 'logit_diff'"
        )


def _slope(metric: Metric, logits: Float[Tensor, "batch vocab"], read: Readout) -> Float[Tensor, " batch"] | None:
    """Return the size of the metric's gradient by the logits of each run; None if it has no gradient."""
    with torch.enable_grad(), torch.inference_mode(False):
        leaf = logits.detach().clone().requires_grad_()
        total = metric(leaf, read).sum()
        if not total.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient.double().norm(dim=-1)
