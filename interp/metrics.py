"""Metrics: named functions of the final logits, with a direction.

A metric sees the logits at the answer position, one row per run, and a `Readout` that says what to look
for. Effects report it raw and on the recovery scale, where 0 is the run that is patched into and 1 the
run that is patched from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InterpError


@dataclass(frozen=True)
class Readout:
    """What a metric may read beside the logits: per row, token ids and the clean run's logits."""

    answer: Int[Tensor, " batch"]
    foil: Int[Tensor, " batch"] | None = None
    clean_logits: Float[Tensor, "batch vocab"] | None = None

    def rows(self, index: Int[Tensor, " rows"]) -> Readout:
        """The readout of some rows, repeated as the index says."""
        index = index.to(self.answer.device)
        foil, clean = self.foil, self.clean_logits
        return Readout(
            self.answer[index],
            None if foil is None else foil[index],
            None if clean is None else clean[index],
        )


MetricFn = Callable[[Float[Tensor, "batch vocab"], Readout], Float[Tensor, " batch"]]


@dataclass(frozen=True)
class Metric:
    """A named metric. ``fn(logits [batch, vocab], readout) -> [batch]``.

    ``direction`` is +1 if larger means that the model does the task better, −1 if worse. ``unit`` is
    shown on axes. ``needs_foil`` lets a recipe refuse a pair without one before any forward is run. ``reads_pair``:
    of the logits, only the answer's and the foil's are read, so that no others need to be computed.
    """

    name: str
    fn: MetricFn
    unit: str = ""
    direction: int = 1
    needs_foil: bool = False
    reads_pair: bool = False

    def __call__(self, logits: Float[Tensor, "batch vocab"], readout: Readout) -> Float[Tensor, " batch"]:
        """Evaluate on a batch of final-position logits."""
        if self.needs_foil and readout.foil is None:
            raise InterpError(f"metric {self.name!r} needs a foil: give every PromptPair foil=…, or use interp.logprob")
        values = self.fn(logits, readout)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            found = f"a tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise InterpError(
                f"metric {self.name!r} returned {found} for logits of {len(logits)} runs: a tensor with one number for "
                f"each, of shape [{len(logits)}], expected"
            )
        return values


def _pick(values: Float[Tensor, "batch vocab"], ids: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    return values.gather(-1, ids[:, None])[:, 0]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _logit_diff(logits: Tensor, r: Readout) -> Tensor:
    assert r.foil is not None
    return _pick(logits, r.answer) - _pick(logits, r.foil)


def _kl(logits: Tensor, r: Readout) -> Tensor:
    if r.clean_logits is None:
        raise InterpError("metric 'kl' needs the clean run's logits in the readout")
    clean = _wide(r.clean_logits).log_softmax(-1)
    return (clean.exp() * (clean - _wide(logits).log_softmax(-1))).sum(-1)


logit_diff = Metric("logit_diff", _logit_diff, unit="logits", needs_foil=True, reads_pair=True)
"""logit(answer) − logit(foil) (Wang et al. 2022)."""

prob = Metric("prob", lambda x, r: _pick(_wide(x).softmax(-1), r.answer), unit="probability")
"""Probability of the answer token (Meng et al. 2022)."""

logprob = Metric("logprob", lambda x, r: _pick(_wide(x).log_softmax(-1), r.answer), unit="nats")
"""Log-probability of the answer token."""

rank = Metric("rank", lambda x, r: (x > _pick(x, r.answer)[:, None]).sum(-1).float(), unit="rank", direction=-1)
"""How many tokens outrank the answer; 0 means that the model says it."""

kl = Metric("kl", _kl, unit="nats", direction=-1)
"""KL(clean ‖ run) over the whole vocabulary; 0 for the clean run itself."""

METRICS: dict[str, Metric] = {m.name: m for m in (logit_diff, prob, logprob, rank, kl)}


def as_metric(metric: Metric | str | MetricFn) -> Metric:
    """Accept a Metric, the name of one, or a plain function of (logits, readout)."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            raise InterpError(f"unknown metric {metric!r}; known metrics: {', '.join(METRICS)}")
        return METRICS[metric]
    if callable(metric):
        return Metric(getattr(metric, "__name__", "custom"), metric)
    raise InterpError(f"metric must be an interp.Metric, a name or a function, got {type(metric).__name__}")


def recovery(
    patched: Float[Tensor, " n"], clean: Float[Tensor, " n"], corrupt: Float[Tensor, " n"], mode: str
) -> Float[Tensor, " n"]:
    """The recovery scale: the share of the clean–corrupt gap that a patch carries over.

    Denoising (patch clean into the corrupt run): (patched − corrupt)/(clean − corrupt). Noising (patch
    corrupt into the clean run): (patched − clean)/(corrupt − clean). NaN where the gap is exactly zero.
    """
    start, end = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    gap = end - start
    return torch.where(gap == 0, torch.full_like(gap, float("nan")), (patched - start) / gap)
