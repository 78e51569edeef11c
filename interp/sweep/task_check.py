"""Check that the model does a sweep's task, before parts are measured.

As few prompts are used as needed to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from interp import tasks
from interp.engine import Engine
from interp.engine.verified import Verified
from interp.errors import InterpError
from interp.model.batching import TOKENS_PER_FORWARD
from interp.results.significance import wilson

FIRST = 32  # prompts, spread over the set, that are checked first


class BaseRuns:
    """A model as the check of a task uses it.

    Next-token logits come from the engine's base runs, where these are lean.
    """

    def __init__(self, model: Any, engine: Any = "auto", memory: str | None = None):
        self.model, self.kind, self.memory = model, engine, memory
        self.name, self.tokenizer, self.coder = model.name, model.tokenizer, model.coder

    @torch.no_grad()
    def next_token_logits(self, ids: Sequence[Sequence[int]]) -> Any:
        """Return logits [prompts, vocab] after each prompt's last token, float32 on the CPU."""
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        logits = {}
        try:
            engine = Engine(self.model, self.kind, self.memory)
            longest = engine.record([ids[order[0]]])[0]  # tells the engine whether its base runs can be lean
            logits[order[0]] = longest.logits.float().cpu()
        except InterpError:  # models without an engine
            return self.model.next_token_logits(ids)
        if Verified.of(self.model).plain_base_runs is None:
            return self.model.next_token_logits(ids)
        step = max(1, TOKENS_PER_FORWARD // len(ids[order[0]]))
        for start in range(1, len(order), step):  # in batches: runs hold much more than their logits
            batch = order[start : start + step]
            for i, run in zip(batch, engine.record([ids[i] for i in batch]), strict=True):
                logits[i] = run.logits.float().cpu()
        return torch.stack([logits[i] for i in range(len(ids))])


def check_task(runs: BaseRuns, prompts: Sequence[Any], as_task: Callable[[Sequence[Any]], Any], require: float) -> str:
    """Return how well the model does a task, in words.

    TaskError for less than ``require`` of the prompts.

    Checks `FIRST` prompts; all of them, if the share of right answers among these is too close to ``require`` to
    decide. ``as_task``: turns prompts into those of their task.
    """
    n = len(prompts)
    sample = [prompts[i * n // FIRST] for i in range(FIRST)] if n > FIRST else prompts
    behaviour = tasks.check(runs, as_task(sample))
    if behaviour.n < n and not is_decided(behaviour.accuracy, behaviour.n, require):
        behaviour = tasks.check(runs, as_task(prompts))
    behaviour.require(require)
    words = (
        f"accuracy {behaviour.accuracy:.1%}, mean logit difference {behaviour.mean_logit_diff:.2f}, n = {behaviour.n}"
    )
    return words if behaviour.n == n else f"{words} of {n}"


def is_decided(share: float, n: int, least: float) -> bool:
    """Return whether ``least`` lies outside the 95% interval of a share of n.

    The interval is that of Wilson (1927). True also if ``least`` is 0 or less.
    """
    lo, hi = wilson(share * n, n)
    return least <= 0 or not lo <= least <= hi
