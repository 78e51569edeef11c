"""Does the model do a sweep's task? Asked before its parts are measured, of as few prompts as it takes to tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from interp import tasks
from interp.engine import Engine
from interp.engine.verified import Verified
from interp.errors import InterpError
from interp.model.batching import TOKENS_PER_FORWARD

FIRST = 32  # prompts, spread over the set, that are asked first
SURE = 1.96  # standard deviations, for 95%


class BaseRuns:
    """A model as tasks ask it: next-token logits from base runs of the engine, where these are lean."""

    def __init__(self, model: Any, engine: Any = "auto", memory: str | None = None):
        self.model, self.kind, self.memory = model, engine, memory
        self.name, self.tokenizer, self.coder = model.name, model.tokenizer, model.coder

    @torch.no_grad()
    def next_token_logits(self, ids: Sequence[Sequence[int]]) -> Any:
        """Logits [prompts, vocab] after each prompt's last token, float32 on the CPU."""
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        found = {}
        try:
            engine = Engine(self.model, self.kind, self.memory)
            found[order[0]] = engine.record([ids[order[0]]])[0].logits.float().cpu()  # by which the engine learns
        except InterpError:  # of what has no engine
            return self.model.next_token_logits(ids)
        if Verified.of(self.model).plain_base_runs is None:
            return self.model.next_token_logits(ids)
        step = max(1, TOKENS_PER_FORWARD // len(ids[order[0]]))
        for start in range(1, len(order), step):  # runs hold much more than their logits
            batch = order[start : start + step]
            for i, run in zip(batch, engine.record([ids[i] for i in batch]), strict=True):
                found[i] = run.logits.float().cpu()
        return torch.stack([found[i] for i in range(len(ids))])


def asked(runs: BaseRuns, prompts: Sequence[Any], named: Callable[[Sequence[Any]], Any], require: float) -> str:
    """How well the model does it, in words. TaskError for less than ``require`` of the prompts.

    Asked of `FIRST` prompts; of all, if the share of right answers among these is too close to ``require`` to tell.
    ``named``: prompts as those of their task.
    """
    n = len(prompts)
    found = tasks.check(runs, named([prompts[i * n // FIRST] for i in range(FIRST)] if n > FIRST else prompts))
    if found.n < n and not clear(found.accuracy, found.n, require):
        found = tasks.check(runs, named(prompts))
    found.require(require)
    words = f"accuracy {found.accuracy:.1%}, mean logit difference {found.mean_logit_diff:.2f}, n = {found.n}"
    return words if found.n == n else f"{words} of {n}"


def clear(share: float, n: int, least: float) -> bool:
    """Whether ``least`` lies outside the 95% interval of a share of n (Wilson 1927), or nothing is asked for."""
    middle = (share + SURE**2 / (2 * n)) / (1 + SURE**2 / n)
    half = SURE / (1 + SURE**2 / n) * math.sqrt(share * (1 - share) / n + SURE**2 / (4 * n**2))
    return least <= 0 or abs(least - middle) > half
