"""Measure whether a model does a task, before explaining how it does it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from interp.errors import PromptError, TaskError
from interp.prompts.coder import Encoded
from interp.prompts.pairs import Fact, PromptPair, encode_facts, encode_pairs, listed_prompts
from interp.results.significance import mean_interval
from interp.tasks.vocabulary import TaskModel


@dataclass(frozen=True)
class Behaviour:
    """How well a model does a task on its clean prompts.

    ``accuracy``: share of prompts whose answer has a higher logit than the foil; without a foil (a Fact), than every
    other token, so top-1. ``mean_logit_diff``: mean of answer logit minus foil logit (or minus the best other logit),
    with a 95% ``interval`` over prompts (`interp.results.significance.mean_interval`; NaN for one).
    """

    model: str
    task: str
    n: int
    accuracy: float
    mean_logit_diff: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        lo, hi = self.interval
        return (
            f"{self.model} on {self.task}: accuracy {self.accuracy:.1%}, mean logit difference "
            f"{self.mean_logit_diff:.2f} [{lo:.2f}, {hi:.2f}], n = {self.n}"
        )

    def require(self, min_accuracy: float = 0.8) -> Behaviour:
        """Return self if the model does the task.

        Raises TaskError with the numbers if it does not.
        """
        if self.accuracy >= min_accuracy:
            return self
        lo, hi = self.interval
        raise TaskError(
            f"{self.model} does not do the task {self.task!r}: it prefers the right answer on {self.accuracy:.1%} "
            f"of {self.n} prompts (at least {min_accuracy:.0%} is required), mean logit difference "
            f"{self.mean_logit_diff:.2f} [{lo:.2f}, {hi:.2f}]. What a circuit does for a behaviour that the model does "
            "not show cannot be measured: choose another model or task, or lower min_accuracy knowingly."
        )


def check(model: TaskModel, prompts: PromptPair | Fact | Iterable[PromptPair] | Iterable[Fact]) -> Behaviour:
    """Run the clean prompts and compare each answer with its foil.

    Without a foil, compare it with every other token. Raises PromptError for prompts that cannot be encoded, before
    anything runs.
    """
    task = getattr(prompts, "task", "these prompts")
    items = listed_prompts(prompts)
    kinds = {type(p) for p in items}
    if len(kinds) > 1:
        raise PromptError("check takes PromptPairs or Facts, not a mixture of both")
    encoded = encode_facts(items, model.coder) if kinds == {Fact} else encode_pairs(items, model.coder, "declared")
    diffs = margins(model, encoded)
    _, lo, hi = mean_interval(diffs[None])
    # without NaN left out: a prompt whose logits are NaN leaves no mean
    mean = float(diffs.mean())
    interval = (math.nan, math.nan) if math.isnan(mean) else (float(lo[0]), float(hi[0]))
    return Behaviour(model.name, task, len(diffs), float((diffs > 0).mean()), mean, interval)


def margins(model: TaskModel, encoded: Sequence[Encoded]) -> np.ndarray:
    """Answer logit minus foil logit of each clean prompt [prompts].

    Without a foil, the best other logit takes its place.
    """
    logits = model.next_token_logits([e.clean for e in encoded])
    out = np.empty(len(encoded))
    for i, (row, e) in enumerate(zip(logits.double().cpu().numpy(), encoded, strict=True)):
        rival = row[e.foil] if e.foil is not None else np.delete(row, e.answer).max()
        out[i] = row[e.answer] - rival
    return out
