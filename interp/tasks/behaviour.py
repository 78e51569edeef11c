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
    with a 95% ``interval`` over prompts (`interp.results.significance.mean_interval`; NaN for one). Answers of several
    tokens count as a whole: more probable than the foil; without a foil, what greedy decoding gives (`margins`).
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
    if kinds == {Fact}:
        encoded = encode_facts(items, model.coder, strings=True)
    else:
        encoded = encode_pairs(items, model.coder, "declared", strings=True)
    diffs = margins(model, encoded)
    _, lo, hi = mean_interval(diffs[None])
    # without NaN left out: a prompt whose logits are NaN leaves no mean
    mean = float(diffs.mean())
    interval = (math.nan, math.nan) if math.isnan(mean) else (float(lo[0]), float(hi[0]))
    return Behaviour(model.name, task, len(diffs), float((diffs > 0).mean()), mean, interval)


def margins(model: TaskModel, encoded: Sequence[Encoded]) -> np.ndarray:
    """Answer logit minus foil logit of each clean prompt [prompts].

    Without a foil, the best other logit takes its place. Of several tokens: the log-probability of the answer minus
    that of the foil; without a foil, the smallest margin of the answer's tokens, each after those before it.
    """
    strings = [(e.answer_ids, e.foil_ids) if e.answer_rest or e.foil_rest else () for e in encoded]
    ids = [row for e, several in zip(encoded, strings, strict=True) for row in _read_prompts(e, several)]
    logits = iter(model.next_token_logits(ids).double().cpu().numpy())
    out = np.empty(len(encoded))
    for i, (e, several) in enumerate(zip(encoded, strings, strict=True)):
        if not several:
            row = next(logits)
            rival = row[e.foil] if e.foil is not None else np.delete(row, e.answer).max()
            out[i] = row[e.answer] - rival
        elif e.foil is None:
            rows = [next(logits) for _ in e.answer_ids]
            out[i] = min(row[t] - np.delete(row, t).max() for row, t in zip(rows, e.answer_ids, strict=True))
        else:
            answer, foil = ([_log_softmax(next(logits))[t] for t in string] for string in several)
            out[i] = sum(answer) - sum(foil)
    return out


def _read_prompts(e: Encoded, strings: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the prompts whose next token is read: before each token of the strings, or the clean prompt alone."""
    return [(*e.clean, *string[:k]) for string in strings for k in range(len(string))] or [e.clean]


def _log_softmax(row: np.ndarray) -> np.ndarray:
    shifted = row - row.max()
    return shifted - np.log(np.exp(shifted).sum())
