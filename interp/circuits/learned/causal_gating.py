"""Causal Head Gating: one gate per head, learned from the next-token loss.

Nam et al. 2025 (arXiv 2505.13737). Each query head's output z is multiplied by a gate σ(m) before W_O. The model's
weights stay as they are. Three sets of gates are fitted, one after the other:

* ``start``: by the loss alone, from m = logit(u), with u uniform in a range, (0, 1);
* ``plus`` (G+): from there, with every gate pushed towards 1 (λ > 0). Heads that are still near 0 interfere;
* ``minus`` (G−): from the same start, with every gate pushed towards 0 (λ < 0). Heads that are still near 1 facilitate.

Loss = mean over examples of (mean over the example's targets of −log P) − λ · mean over heads of clip(m, −4, 4). These
are means, as in the authors' code; the paper writes sums, so its λ is a different number. The authors' settings are the
defaults: Adam with step 1.0, gradients clipped to norm 1, batches of 32, 500 updates per phase, λ = ±0.1. Two things
differ. The step falls linearly to ``lr_end``, so that gates converge (an option of the authors' code, which leaves it
constant). And the plus and minus fits start with logits clipped to ±4. If the start fit had moved a logit further, it
would feel no penalty, and an idle head, which Adam moves by rounding noise alone, would be classified by wherever it
had drifted.

The start fit must find the behaviour before the minus fit can show what it needs. It should end no worse than the model
without gates. If it ends worse for lack of a gradient (a head after another that is closed, a saturated softmax), the
result names those seeds (`HeadGates.stuck`) and a warning is logged: start nearer to 1 (``start=(0.9, 0.98)``) and take
smaller steps.

Scores (Table 1 of the paper): facilitation = G−, interference = 1 − G+, irrelevance = G+ (1 − G−). (The paper's text
prints G− (1 − G+) for irrelevance, which does not agree with "high G+, low G−".)

Gates fit their data, and gates of a random model fit its noise. So test a class on other data (`HeadGates.toggle`), and
against a fit on permuted targets.

Gates go through the attention kernel (`headstats.Edit(gate=)`), one set for each batch row, so seeds are fitted
together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.fitting import require_finite, shuffled_batches, without_weight_gradients
from interp.circuits.learned.gated_model import GatedModel
from interp.circuits.learned.head_gates import CLAMP, HeadGates
from interp.circuits.learned.next_token import Sample, Text, listed_data, permuted, samples
from interp.errors import InterpError, PromptError
from interp.model.model import Model
from interp.model.prompt_provenance import prompt_provenance
from interp.model.session import in_session
from interp.recipes.inputs import provenance_of
from interp.utils.arguments import check_positive, check_seed, check_whole
from interp.utils.progress import progress

log = logging.getLogger("interp")

MAX_DIFFERENCE = 5.0  # nats below the retained log-probability, beyond which forgetting is not rewarded (contrastive)


@in_session
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
    """Learn gates of all heads by three fits, and classify each head by them.

        known = interp.zoo.one_head()
        gates = causal_head_gating(known.model, known.pairs(12), steps=40, n_seeds=2, batch_size=4)
        print(gates.summary())

    ``data``: texts (loss at every token), (prompt, completion) tuples (loss on the completion), PromptPairs (loss on
    the answer after the clean prompt), or a mixture. ``n_seeds`` sets of gates with different starts are fitted
    together, because redundant heads replace each other from seed to seed (the authors fit 10). ``lam``: λ of the plus
    fit, −λ of the minus fit. ``permute_targets=True`` fits prompts with each other's targets, as a control: what it
    finds is chance. Each of the 3 × ``steps`` updates takes a forward and a backward pass of ``n_seeds`` ×
    ``batch_size`` prompts. The module docstring describes the fits. Raises InterpError, PromptError or ModelError for
    bad input before the first update.
    """
    settings = settings_of(steps, n_seeds, lam, lr, lr_end, start, batch_size, seed)
    items = listed_data(data)
    encoded = read = samples(items, model)
    if permute_targets:
        encoded = permuted(encoded, seed)
    gated = GatedModel(model)
    logits = {"start": _initial_logits(gated, n_seeds, seed, start)}
    with progress("head gates", 3 * steps, show_progress) as advance:
        for phase, penalty in (("start", 0.0), ("plus", lam), ("minus", -lam)):
            initial = logits["start"].clamp(-CLAMP, CLAMP) if penalty else logits["start"].clone()
            fit = _GateFit(gated, initial, lr, lr_end, steps, penalty)
            for batch in shuffled_batches(len(encoded), batch_size, steps, seed):
                fit.step([encoded[i] for i in batch], phase)
                advance(1)
            logits[phase] = fit.logits.detach()
    losses = {phase: _losses(gated, encoded, m.sigmoid()) for phase, m in logits.items()}
    losses["ungated"] = _losses(gated, encoded, torch.ones_like(logits["start"][:1]))
    details = {"targets": "permuted" if permute_targets else "as given", "losses": losses}
    gates = _result(
        gated, logits, items, read, "causal head gating", seed, settings, {**details, **provenance_of(data)}
    )
    if gates.stuck():
        log.warning(
            "the start fit of seeds %s ends worse than the model without gates: their facilitation says nothing. Use "
            "more steps, start=(0.9, 0.98), or a smaller lr", gates.stuck(),
        )  # fmt: skip
    return gates


@in_session
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
    """Learn gates that retain one variant of a task and forget its twin.

    ``retain[i]`` and ``forget[i]`` are variants of one item. There is one set of gates ``contrast`` per seed, pushed
    towards 1. A head whose gate falls serves the forgotten variant and not the retained one. The loss is that of the
    authors' code: −log P(retained) + max(log P(forgotten) − log P(retained), −5), per-example token means, with no
    gradient through the second log P(retained), − λ · mean of clip(m, −4, 4). The defaults are their settings (500
    updates, batches of 64, step 0.1 to 0.01).
    """
    settings = settings_of(steps, n_seeds, lam, lr, lr_end, start, batch_size, seed)
    variants = [listed_data(retain), listed_data(forget)]
    items = [item for variant in variants for item in variant]
    encoded = [samples(variant, model) for variant in variants]
    if len(encoded[0]) != len(encoded[1]):
        raise PromptError(
            f"retain has {len(encoded[0])} items and forget has {len(encoded[1])}: expected as many, each with its twin"
        )
    gated = GatedModel(model)
    fit = _GateFit(gated, _initial_logits(gated, n_seeds, seed, start), lr, lr_end, steps, lam)
    with progress("contrastive head gates", steps, show_progress) as advance:
        for batch in shuffled_batches(len(encoded[0]), batch_size, steps, seed):
            fit.contrast(*([variant[i] for i in batch] for variant in encoded))
            advance(1)
    gates = fit.logits.detach().sigmoid()
    ones = torch.ones_like(gates[:1])
    by_name = zip(("retain", "forget"), encoded, strict=True)
    losses = {n: {"gated": _losses(gated, v, gates), "ungated": _losses(gated, v, ones)} for n, v in by_name}
    details = {"max_difference": MAX_DIFFERENCE, "losses": losses}
    method = "contrastive causal head gating"
    return _result(
        gated, {"contrast": fit.logits.detach()}, items, [*encoded[0], *encoded[1]], method, seed, settings, details
    )


class _GateFit:
    """A fit by Adam of the logits of several independent sets of gates."""

    def __init__(self, gated: GatedModel, logits: Tensor, lr: float, lr_end: float, steps: int, penalty: float):
        self.gated, self.penalty = gated, penalty
        self.logits = logits.requires_grad_()
        self.optimizer = torch.optim.Adam([self.logits], lr=lr)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, lr_end / lr, total_iters=steps)

    def step(self, batch: Sequence[Sample], phase: str) -> None:
        """Update once on the loss −log P."""
        gates = self.logits.detach().sigmoid().requires_grad_()
        with torch.enable_grad(), without_weight_gradients(self.gated.model):
            for _, log_probs in self.gated.log_probs(batch, gates):
                loss = -log_probs.sum() / len(batch)
                require_finite(loss, f"the loss of the {phase} fit")
                loss.backward()
        self._update(gates)

    def contrast(self, retain: Sequence[Sample], forget: Sequence[Sample]) -> None:
        """Update once on the contrastive loss."""
        retained = torch.zeros(len(self.logits), len(retain), device=self.logits.device, dtype=torch.float64)
        gates = self.logits.detach().sigmoid().requires_grad_()
        with torch.enable_grad(), without_weight_gradients(self.gated.model):
            for rows, log_probs in self.gated.log_probs(retain, gates):
                retained[:, rows] = log_probs.detach().to(retained)
                loss = -log_probs.sum() / len(retain)
                require_finite(loss, "the contrastive loss")
                loss.backward()
            for rows, log_probs in self.gated.log_probs(forget, gates):
                difference = log_probs - retained[:, rows].to(log_probs)
                loss = difference.clamp(min=-MAX_DIFFERENCE).sum() / len(forget)
                require_finite(loss, "the contrastive loss")
                loss.backward()
        self._update(gates)

    def _update(self, gates: Float[Tensor, "sets layers heads"]) -> None:
        """Take a step of Adam by the loss's gradient at the gates and the penalty."""
        with torch.enable_grad():
            n_heads = self.logits[0].numel()
            (-self.penalty * self.logits.clamp(-CLAMP, CLAMP).sum() / n_heads).backward()
            self.logits.sigmoid().backward(gates.grad)
        assert self.logits.grad is not None
        norm = self.logits.grad.flatten(1).norm(dim=1)
        self.logits.grad /= norm.clamp(min=1.0)[:, None, None]  # for each set separately, as if it were fitted alone
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()


@torch.no_grad()
def _losses(gated: GatedModel, data: Sequence[Sample], gates: Float[Tensor, "sets layers heads"]) -> list[float]:
    """−log P over all the data, for each set of gates."""
    total = torch.zeros(len(gates), dtype=torch.float64)
    for _, log_probs in gated.log_probs(data, gates):
        total -= log_probs.double().sum(1).cpu()
    return (total / len(data)).tolist()


def _initial_logits(
    gated: GatedModel, n_seeds: int, seed: int, within: tuple[float, float]
) -> Float[Tensor, "sets layers heads"]:
    """logit(u) with u uniform in a range; set i uses seed + i.

    Float32, or float64 for a float64 model.
    """
    shape, device = (len(gated.layers), gated.model.n_heads), gated.model.device
    dtype = torch.float64 if gated.model.dtype == torch.float64 else torch.float32
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(seed + i), dtype=dtype) for i in range(n_seeds)]
    low, high = within
    return (low + (high - low) * torch.stack(rows)).logit(eps=1e-6).to(device)


def _result(
    gated: GatedModel, logits: dict[str, Tensor], items: list[Any], read: list[Sample], method: str, seed: int,
    settings: dict[str, Any], details: dict[str, Any],
) -> HeadGates:  # fmt: skip
    """Gates with the provenance of their fit."""
    provenance = {
        **prompt_provenance(gated.model, items, [s.ids for s in read]),
        "method": method, "seeds": [seed + i for i in range(settings["n_seeds"])], **settings,
        "optimizer": "Adam, gradient norm at most 1 for each seed", "clamp": CLAMP, **details,
        "regularisation": "mean over heads, loss = mean over examples of token means",
    }  # fmt: skip
    values = {name: m.sigmoid().double().cpu().numpy() for name, m in logits.items()}
    return HeadGates(values, gated.layers, provenance)


def settings_of(
    steps: int, n_seeds: int, lam: float, lr: float, lr_end: float, start: Sequence[float], batch_size: int, seed: int
) -> dict[str, Any]:
    """The settings of a fit, for its provenance.

    Raises InterpError for values that are out of range.
    """
    check_whole(1, steps=steps, n_seeds=n_seeds, batch_size=batch_size)
    check_seed(seed)
    check_positive(lam=lam, lr=lr, lr_end=lr_end)
    is_pair = isinstance(start, Sequence) and len(start) == 2 and all(isinstance(x, int | float) for x in start)
    if not is_pair or not 0 <= start[0] < start[1] <= 1:
        raise InterpError(f"start={start!r}: expected a range within 0 and 1, like (0.9, 0.98)")
    if lr_end > lr:
        raise InterpError(f"lr_end={lr_end} is above lr={lr}: the step falls from lr to lr_end")
    settings = {"steps": steps, "n_seeds": n_seeds, "lam": lam, "lr": lr, "lr_end": lr_end, "batch_size": batch_size}
    return {**settings, "start": list(start)}
