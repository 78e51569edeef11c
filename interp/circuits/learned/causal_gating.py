"""Causal Head Gating: one gate per attention head, learned from the next-token loss alone.

Nam et al. 2025 (arXiv 2505.13737). Each query head's output z is multiplied by a gate σ(m) in front of W_O, the model
stays as it is, and three sets of gates are fitted, one after the other:

* ``start``: the loss alone, from m = logit(u), u uniform in a range, (0, 1);
* ``plus`` (G+): from there, with every gate pushed towards 1 (λ > 0): what is still near 0 interferes;
* ``minus`` (G−): from the same start, with every gate pushed towards 0 (λ < 0): what is still near 1 facilitates.

Loss = mean over examples of (mean over the example's targets of −log P) − λ · mean over heads of clip(m, −4, 4): means,
as in the authors' code; the paper writes sums, so that its λ is another number. Their settings are the defaults: Adam
with step 1.0, gradients clipped to norm 1, batches of 32, 500 updates a phase, λ = ±0.1. Two things differ. The step
falls linearly to ``lr_end`` (an option of their code, which leaves it constant), so that gates come to rest. And the
pulls begin with logits clipped to ±4: where the start fit had carried one further, it would feel no pull, and an idle
head, which Adam moves by rounding noise alone, would be called by wherever it had drifted.

The start fit must find the behaviour before the minus fit can say what it needs. It should end no worse than the model
without gates; where it does, for want of a gradient (a head behind another that is closed, a saturated softmax), the
result names those seeds (`HeadGates.stuck`) and a warning is logged: begin nearer to 1 (``start=(0.9, 0.98)``) and
take smaller steps.

Scores (Table 1 of the paper): facilitation = G−, interference = 1 − G+, irrelevance = G+ (1 − G−). (Its running text
prints G− (1 − G+) for irrelevance, which does not agree with "high G+, low G−".)

Gates fit their data, and those of a random model fit its noise: what a class is worth is tested on other data
(`HeadGates.toggle`), and against a fit on permuted targets.

Gates go through the attention kernel (`headstats.Edit(gate=)`), a set for each batch row: seeds are fitted together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.fitting import require_finite, shuffled_batches, without_weight_gradients
from interp.circuits.learned.gated_model import Gated
from interp.circuits.learned.head_gates import CLAMP, HeadGates
from interp.circuits.learned.next_token import Sample, Text, permuted, samples
from interp.errors import InterpError, PromptError
from interp.model.model import Model
from interp.recipes.inputs import provenance_of
from interp.utils.arguments import check_positive, check_seed, check_whole
from interp.utils.progress import progress
from interp.utils.provenance import now, prompt_hash

log = logging.getLogger("interp")

MAX_DIFFERENCE = 5.0  # nats below the retained log-probability at which forgetting ends (contrastive)


def causal_head_gating(
    model: Model,
    data: Text | Iterable[Text],
    *,
    steps: int = 500,
    n_seeds: int = 5,
    lam: float = 0.1,
    lr: float = 1.0,
    lr_end: float = 0.1,
    start: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 32,
    seed: int = 0,
    permute_targets: bool = False,
    show_progress: bool | None = None,
) -> HeadGates:
    """Gates of all attention heads by this module's three fits, and what they say of each head.

    ``data``: texts (loss at every token), (prompt, completion) tuples (loss on the completion), PromptPairs (loss on
    the answer after the clean prompt), or a mixture. ``n_seeds`` sets of gates from different starts are fitted
    together (redundant heads take turns: the authors fit 10). ``lam``: λ of the plus fit, −λ of the minus fit.
    ``permute_targets=True`` fits the same on prompts with each other's targets: what it finds is chance. A forward and
    a backward pass of ``n_seeds`` × ``batch_size`` prompts for each of 3 × ``steps`` updates. Raises InterpError,
    PromptError or ModelError for bad input before the first of them.
    """
    fitted = settings_of(steps, n_seeds, lam, lr, lr_end, start, batch_size, seed)
    encoded = samples(data, model)
    if permute_targets:
        encoded = permuted(encoded, seed)
    gated = Gated(model)
    logits = {"start": _starts(gated, n_seeds, seed, start)}
    with progress("head gates", 3 * steps, show_progress) as advance:
        for phase, pull in (("start", 0.0), ("plus", lam), ("minus", -lam)):
            begin = logits["start"].clamp(-CLAMP, CLAMP) if pull else logits["start"].clone()
            fit = _Fit(gated, begin, lr, lr_end, steps, pull)
            for batch in shuffled_batches(len(encoded), batch_size, steps, seed):
                fit.step([encoded[i] for i in batch], phase)
                advance(1)
            logits[phase] = fit.m.detach()
    losses = {phase: _loss(gated, encoded, m.sigmoid()) for phase, m in logits.items()}
    losses["ungated"] = _loss(gated, encoded, torch.ones_like(logits["start"][:1]))
    made = {"targets": "permuted" if permute_targets else "as given", "losses": losses}
    found = _result(gated, logits, data, "causal head gating", seed, fitted, made)
    if found.stuck():
        log.warning(
            "the start fit of seeds %s ends worse than the model without gates: their facilitation says nothing. Give "
            "more steps, start=(0.9, 0.98), or a smaller lr", found.stuck(),
        )  # fmt: skip
    return found


def contrastive_head_gating(
    model: Model,
    retain: Iterable[Text],
    forget: Iterable[Text],
    *,
    steps: int = 500,
    n_seeds: int = 5,
    lam: float = 0.1,
    lr: float = 0.1,
    lr_end: float = 0.01,
    start: tuple[float, float] = (0.0, 1.0),
    batch_size: int = 64,
    seed: int = 0,
    show_progress: bool | None = None,
) -> HeadGates:
    """Contrastive Causal Head Gating: gates under which one variant of a task is kept and its twin forgotten.

    ``retain[i]`` and ``forget[i]`` are variants of one item. One set of gates ``contrast`` per seed, pushed towards 1:
    a head whose gate falls serves the forgotten variant and not the retained one. Loss as in the authors' code: −log
    P(retained) + max(log P(forgotten) − log P(retained), −5), per-example token means, with no gradient through the
    second log P(retained), − λ · mean of clip(m, −4, 4); and their settings (500 updates, batches of 64, step 0.1 to
    0.01).
    """
    fitted = settings_of(steps, n_seeds, lam, lr, lr_end, start, batch_size, seed)
    variants = [list(retain), list(forget)]
    kept_items = [item for variant in variants for item in variant]
    both = [samples(variant, model) for variant in variants]
    if len(both[0]) != len(both[1]):
        raise PromptError(f"retain has {len(both[0])} items and forget {len(both[1])}: item i of one is the twin of i")
    gated = Gated(model)
    fit = _Fit(gated, _starts(gated, n_seeds, seed, start), lr, lr_end, steps, lam)
    with progress("contrastive head gates", steps, show_progress) as advance:
        for batch in shuffled_batches(len(both[0]), batch_size, steps, seed):
            fit.contrast(*([variant[i] for i in batch] for variant in both))
            advance(1)
    gates = fit.m.detach().sigmoid()
    ones = torch.ones_like(gates[:1])
    named = zip(("retain", "forget"), both, strict=True)
    losses = {n: {"gated": _loss(gated, v, gates), "ungated": _loss(gated, v, ones)} for n, v in named}
    made = {"max_difference": MAX_DIFFERENCE, "losses": losses}
    method = "contrastive causal head gating"
    return _result(gated, {"contrast": fit.m.detach()}, kept_items, method, seed, fitted, made)


class _Fit:
    """Adam on the logits of some sets of gates, which do not feel each other."""

    def __init__(self, gated: Gated, m: Tensor, lr: float, lr_end: float, steps: int, pull: float):
        self.gated, self.pull = gated, pull
        self.m = m.requires_grad_()
        self.optimizer = torch.optim.Adam([self.m], lr=lr)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, lr_end / lr, total_iters=steps)

    def step(self, batch: Sequence[Sample], phase: str) -> None:
        """One update on the loss −log P."""
        gates = self.m.detach().sigmoid().requires_grad_()
        with torch.enable_grad(), without_weight_gradients(self.gated.model):
            for _, found in self.gated.log_probs(batch, gates):
                loss = -found.sum() / len(batch)
                require_finite(loss, f"the loss of the {phase} fit")
                loss.backward()
        self._update(gates)

    def contrast(self, retain: Sequence[Sample], forget: Sequence[Sample]) -> None:
        """One update on the contrastive loss."""
        kept = torch.zeros(len(self.m), len(retain), device=self.m.device, dtype=torch.float64)
        gates = self.m.detach().sigmoid().requires_grad_()
        with torch.enable_grad(), without_weight_gradients(self.gated.model):
            for rows, found in self.gated.log_probs(retain, gates):
                kept[:, rows] = found.detach().to(kept)
                loss = -found.sum() / len(retain)
                require_finite(loss, "the contrastive loss")
                loss.backward()
            for rows, found in self.gated.log_probs(forget, gates):
                loss = (found - kept[:, rows].to(found)).clamp(min=-MAX_DIFFERENCE).sum() / len(forget)
                require_finite(loss, "the contrastive loss")
                loss.backward()
        self._update(gates)

    def _update(self, gates: Float[Tensor, "sets layers heads"]) -> None:
        """One step of Adam, by what the loss says of the gates and by the pull on their logits."""
        with torch.enable_grad():
            each = self.m[0].numel()
            (-self.pull * self.m.clamp(-CLAMP, CLAMP).sum() / each).backward()
            self.m.sigmoid().backward(gates.grad)
        assert self.m.grad is not None
        norm = self.m.grad.flatten(1).norm(dim=1)
        self.m.grad /= norm.clamp(min=1.0)[:, None, None]  # of each set by itself, as if it were fitted alone
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


@torch.no_grad()
def _loss(gated: Gated, data: Sequence[Sample], gates: Float[Tensor, "sets layers heads"]) -> list[float]:
    """−log P over all the data, for each set of gates."""
    total = torch.zeros(len(gates), dtype=torch.float64)
    for _, found in gated.log_probs(data, gates):
        total -= found.double().sum(1).cpu()
    return (total / len(data)).tolist()


def _starts(gated: Gated, n_seeds: int, seed: int, within: tuple[float, float]) -> Float[Tensor, "sets layers heads"]:
    """logit(u), u uniform in a range, float32 (float64 of a float64 model); set i is that of seed + i."""
    shape, device = (len(gated.layers), gated.model.n_heads), gated.model.device
    dtype = torch.float64 if gated.model.dtype == torch.float64 else torch.float32
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(seed + i), dtype=dtype) for i in range(n_seeds)]
    low, high = within
    return (low + (high - low) * torch.stack(rows)).logit(eps=1e-6).to(device)


def _result(
    gated: Gated, logits: dict[str, Tensor], data: Any, method: str, seed: int, fitted: dict[str, Any],
    made: dict[str, Any],
) -> HeadGates:  # fmt: skip
    model = gated.model
    listed = [data] if isinstance(data, str) or hasattr(data, "clean") else list(data)
    provenance = {
        **model.provenance(), "prompts": prompt_hash(listed), "n_prompts": len(listed), "created": now(),
        "method": method, "seeds": [seed + i for i in range(fitted["n_seeds"])], **fitted,
        "optimizer": "Adam, gradient norm at most 1 for each seed", "clamp": CLAMP, **made,
        "regularisation": "mean over heads, loss = mean over examples of token means", **provenance_of(data),
    }  # fmt: skip
    values = {name: m.sigmoid().double().cpu().numpy() for name, m in logits.items()}
    return HeadGates(values, gated.layers, provenance)


def settings_of(
    steps: int, n_seeds: int, lam: float, lr: float, lr_end: float, start: Sequence[float], batch_size: int, seed: int
) -> dict[str, Any]:
    """The settings of a fit, for its provenance. InterpError for what cannot be."""
    check_whole(1, steps=steps, n_seeds=n_seeds, batch_size=batch_size)
    check_seed(seed)
    check_positive(lam=lam, lr=lr, lr_end=lr_end)
    numbers = isinstance(start, Sequence) and len(start) == 2 and all(isinstance(x, int | float) for x in start)
    if not numbers or not 0 <= start[0] < start[1] <= 1:
        raise InterpError(f"start={start!r}: a range within 0 and 1 is expected, like (0.9, 0.98)")
    if lr_end > lr:
        raise InterpError(f"lr_end={lr_end} is above lr={lr}: the step falls from lr to lr_end")
    made = {"steps": steps, "n_seeds": n_seeds, "lam": lam, "lr": lr, "lr_end": lr_end, "batch_size": batch_size}
    return {**made, "start": list(start)}
