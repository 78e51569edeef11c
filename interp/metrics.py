"""Metrics: named functions of the final logits, with a direction.

A metric reads the logits at the answer position, one row per run, and a `Readout` with the token ids to look for.
Of an answer of several tokens, it reads the rows in which each of them is predicted (`Metric.of_string`). Effects
report its raw value and the recovery scale, on which 0 is the run that is patched into and 1 the run that is patched
from.

Importing this module does not import torch, so that the command line can list metrics quickly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from interp.errors import InterpError
from interp.utils.checks import did_you_mean

if TYPE_CHECKING:
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """What a metric may read besides logits: token ids and the clean run's logits.

    One of each per row. ``run_logits``: of the run that is changed, before the change. ``tokens``: for a metric over
    several positions, the tokens of the clean prompt at the positions that are named.
    """

    answer: Int[Tensor, " batch"]
    foil: Int[Tensor, " batch"] | None = None
    clean_logits: Float[Tensor, "batch *read vocab"] | None = None
    run_logits: Float[Tensor, "batch *read vocab"] | None = None
    tokens: Int[Tensor, "batch read"] | None = None

    def rows(self, index: Int[Tensor, " rows"]) -> Readout:
        """Return the readout of the rows in ``index``, which may repeat rows."""
        index = index.to(self.answer.device)
        others = (self.foil, self.clean_logits, self.run_logits, self.tokens)
        return Readout(self.answer[index], *(None if x is None else x[index] for x in others))


MetricFn = Callable[["Float[Tensor, 'batch *read vocab']", Readout], "Float[Tensor, ' batch']"]


@dataclass(frozen=True)
class Metric:
    """A named metric. ``fn(logits [batch, vocab], readout) -> [batch]``.

    ``direction`` is +1 if a larger value means that the model does the task better, −1 if worse. ``unit`` is shown on
    axes. ``needs_foil`` lets a recipe refuse a pair without a foil before any forward is run. ``reads_pair``: the
    metric reads only the logits of the answer and the foil, so that no others need to be computed.
    ``differentiable``: attribution methods can use it.

    ``over="positions"``: ``fn`` takes the logits of all positions that are read, [batch, read, vocab], and returns one
    number for them. ``predicts``: it reads the rows in which the tokens at these positions are predicted, the ones
    before. ``reads_run``: it reads ``readout.run_logits``. ``reads_answer``: it depends on the answer.

    ``of_string``: the metric of an answer of several tokens, a function like ``fn`` of the logits [batch, tokens,
    vocab] of the rows that predict each token after the prompt and the answer's tokens before it (teacher forcing), and
    of ``readout.tokens``, the answer's tokens. With ``needs_foil``, its value for the foil is subtracted. None: such
    answers are refused.
    """

    name: str
    fn: MetricFn
    unit: str = ""
    direction: int = 1
    needs_foil: bool = False
    reads_pair: bool = False
    differentiable: bool = True
    over: Literal["position", "positions"] = "position"
    predicts: bool = False
    reads_run: bool = False
    reads_answer: bool = True
    of_string: MetricFn | None = None

    def __post_init__(self) -> None:
        if self.over not in ("position", "positions"):
            raise InterpError(f"over={self.over!r}: 'position' (of each alone) or 'positions' (of all) expected")

    def __call__(self, logits: Float[Tensor, "batch *read vocab"], readout: Readout) -> Float[Tensor, " batch"]:
        """Evaluate on a batch of logits: of one position each, or of several (``over="positions"``)."""
        if self.needs_foil and readout.foil is None:
            raise InterpError(f"metric {self.name!r} needs a foil: give every PromptPair foil=…, or use interp.logprob")
        from torch import Tensor

        values = self.fn(logits, readout)
        if not isinstance(values, Tensor) or values.shape != logits.shape[:1]:
            shape = f"a tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise InterpError(
                f"metric {self.name!r} returned {shape} for logits of {len(logits)} runs; expected a tensor of shape "
                f"[{len(logits)}], one number per run"
            )
        return values


def _pick(values: Float[Tensor, "batch vocab"], ids: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    return values.gather(-1, ids[:, None])[:, 0]


def _wide(logits: Tensor) -> Tensor:
    import torch

    return logits if logits.dtype == torch.float64 else logits.float()


def _logit_diff(logits: Tensor, r: Readout) -> Tensor:
    assert r.foil is not None
    return _pick(logits, r.answer) - _pick(logits, r.foil)


def _kl(logits: Tensor, r: Readout) -> Tensor:
    if r.clean_logits is None:
        raise InterpError("metric 'kl' needs the clean run's logits in the readout")
    clean = _wide(r.clean_logits).log_softmax(-1)
    return (clean.exp() * (clean - _wide(logits).log_softmax(-1))).sum(-1)


def _token_kl(logits: Tensor, r: Readout) -> Tensor:
    if r.run_logits is None:
        raise InterpError("metric 'token_kl' needs the logits of the run that is changed: recipes with cells give them")
    return _kl(logits, Readout(r.answer, clean_logits=r.run_logits))


def _token_logprobs(logits: Float[Tensor, "batch read vocab"], r: Readout) -> Float[Tensor, "batch read"]:
    if r.tokens is None:
        raise InterpError("a metric of several tokens needs the tokens that are read: recipes with at= give them")
    return _wide(logits).log_softmax(-1).gather(-1, r.tokens[..., None])[..., 0]


def _sum_logprob(logits: Tensor, r: Readout) -> Tensor:
    return _token_logprobs(logits, r).sum(-1)


def _string_prob(logits: Tensor, r: Readout) -> Tensor:
    return _sum_logprob(logits, r).exp()


def _string_rank(logits: Float[Tensor, "batch read vocab"], r: Readout) -> Tensor:
    if r.tokens is None:
        raise InterpError("the rank of a string needs the tokens that are read: recipes give them")
    return (logits > logits.gather(-1, r.tokens[..., None])).sum(-1).amax(-1).float()


logit_diff = Metric("logit_diff", _logit_diff, unit="logits", needs_foil=True, reads_pair=True, of_string=_sum_logprob)
"""logit(answer) − logit(foil) (Wang et al. 2022).

Of several tokens: log P(answer) − log P(foil), each the sum over its tokens (not the mean: a longer string is less
probable). For single tokens the two are the same number.
"""

prob = Metric("prob", lambda x, r: _pick(_wide(x).softmax(-1), r.answer), unit="probability", of_string=_string_prob)
"""Probability of the answer (Meng et al. 2022): of several tokens, the product of theirs."""

logprob = Metric(
    "logprob", lambda x, r: _pick(_wide(x).log_softmax(-1), r.answer), unit="nats", of_string=_sum_logprob
)  # fmt: skip
"""Log-probability of the answer: of several tokens, the sum of theirs (not the mean)."""

rank = Metric("rank", lambda x, r: (x > _pick(x, r.answer)[:, None]).sum(-1).float(), unit="rank", direction=-1,
    differentiable=False, of_string=_string_rank)  # fmt: skip
"""How many tokens have a larger logit than the answer; 0 means that the answer is the model's first choice.

Of several tokens: the largest of their ranks, each after the answer's tokens before it. 0 means that greedy decoding
gives the answer.
"""

kl = Metric("kl", _kl, unit="nats", direction=-1, reads_answer=False)
"""KL(clean ‖ run) over the whole vocabulary; 0 for the clean run itself."""

token_kl = Metric("token_kl", _token_kl, unit="nats", direction=-1, reads_run=True, reads_answer=False)
"""KL(unchanged ‖ changed) at each position that is read; exactly 0 where the change cannot reach.

Unchanged is the run that is patched into: the corrupt one when denoising, else the clean one.
"""

seq_logprob = Metric("seq_logprob", _sum_logprob, unit="nats", over="positions", predicts=True, reads_answer=False)
"""Sum of the log-probabilities of the clean prompt's own tokens at the positions that are read."""

METRICS: dict[str, Metric] = {m.name: m for m in (logit_diff, prob, logprob, rank, kl, token_kl, seq_logprob)}


def as_metric(metric: Metric | str | MetricFn) -> Metric:
    """Accept a Metric, the name of one, or a plain function of (logits, readout)."""
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, str):
        if metric not in METRICS:
            hint = did_you_mean(metric, METRICS)
            raise InterpError(f"unknown metric {metric!r}; {hint}known metrics: {', '.join(METRICS)}")
        return METRICS[metric]
    if callable(metric):
        return Metric(getattr(metric, "__name__", "custom"), metric)
    raise InterpError(f"metric must be an interp.Metric, a name or a function, got {type(metric).__name__}")


def rounding(
    metric: Metric, logits: Float[Tensor, "batch *read vocab"], readout: Readout, dtype: torch.dtype
) -> Float[Tensor, " batch"]:
    """Return how far rounding of the logits can move the metric.

    Two scores closer than that are the same. The same prompt gives logits that differ in their last bits when it is run
    in another batch. The bound is the largest change of the metric when every logit moves by 2 · ``eps`` · max|logit|:
    once the answer up and all others down, once the answer up, the foil down, and the others up and down in turn.
    ``eps`` is the machine epsilon of ``dtype``, in which the model computes (of float32 for quantised weights). The
    metric is computed in the logits' own dtype, so that its own rounding is part of the bound.
    """
    import torch

    eps = torch.finfo(dtype if dtype.is_floating_point else torch.float32).eps
    before = metric(logits, readout).double()
    step = (2 * eps * logits.detach().abs().amax(-1, keepdim=True)).to(logits.dtype)
    columns = torch.arange(logits.shape[-1], device=logits.device)
    against_all = -torch.ones_like(logits)
    in_turn = torch.where(columns % 2 == 0, 1.0, -1.0).to(logits.dtype).expand_as(logits).clone()
    answer = readout.answer[:, None] if readout.tokens is None else readout.tokens[..., None]
    if readout.foil is not None and logits.ndim == 2:
        in_turn[columns == readout.foil[:, None]] = -1
    bound = torch.zeros_like(before)
    for signs in (against_all, in_turn):
        signs[columns == answer] = 1
        bound = torch.maximum(bound, (metric(logits + signs * step, readout).double() - before).abs())
    return bound


def recovery(
    patched: Float[Tensor, " n"],
    clean: Float[Tensor, " n"],
    corrupt: Float[Tensor, " n"],
    mode: str,
    no_gap: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """Return recovery: the share of the clean–corrupt gap that a patch carries over.

    Denoising (patch clean into the corrupt run): (patched − corrupt)/(clean − corrupt). Noising (patch corrupt into
    the clean run): (patched − clean)/(corrupt − clean). NaN where the gap is zero, or within rounding (``no_gap``).
    """
    import torch

    start, end = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    gap = end - start
    undefined = gap == 0 if no_gap is None else (gap == 0) | no_gap
    return torch.where(undefined, torch.full_like(gap, float("nan")), (patched - start) / gap)
