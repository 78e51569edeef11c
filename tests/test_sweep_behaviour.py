"""Whether a model does a sweep's task, asked of as few prompts as it takes to tell."""

from __future__ import annotations

import numpy as np
import pytest

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import TaskError
from interp.prompts.pair_set import PairSet
from interp.sweep.task_check import FIRST, BaseRuns, check_task, is_decided


class Counting(BaseRuns):
    """Counts prompts; answers are right but for every ``wrong``-th."""

    def __init__(self, model, wrong: int):
        super().__init__(model)
        self.wrong, self.seen = wrong, []

    def next_token_logits(self, ids):
        logits = self.model.next_token_logits(ids) * 0
        for i, row in enumerate(logits):
            row[self.right] = -1.0 if self.wrong and i % self.wrong == 0 else 1.0
        self.seen.append(len(ids))
        return logits


@pytest.fixture(scope="module")
def model(word_tokenizer):
    return interp.load(tiny_hf("llama").double(), tokenizer=word_tokenizer)


def pairs_of(n: int) -> list[interp.PromptPair]:
    words = [f"w{i % 90} w{i % 7} w{i % 11}" + " w3" * (i % 3) for i in range(n)]
    return [interp.PromptPair(w, w, answer="w95", foil="w94") for w in words]


def test_base_runs_give_the_logits_of_the_model(model) -> None:
    prompts = [model.coder.encode(p.clean) for p in pairs_of(9)]
    want = model.next_token_logits(prompts)
    # both are handed out in float32, whose rounding is the bound
    np.testing.assert_allclose(BaseRuns(model).next_token_logits(prompts), want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(BaseRuns(model, "naive").next_token_logits(prompts), want, rtol=1e-6, atol=1e-6)


def test_all_are_asked_where_some_leave_it_open(model) -> None:
    pairs = pairs_of(90)

    def ask(wrong: int, require: float) -> tuple[str, list[int]]:
        runs = Counting(model, wrong)
        runs.right = model.coder.continuation("w95")[0]
        try:
            return check_task(runs, pairs, lambda some: PairSet(some, task="made up"), require), runs.seen
        except TaskError as error:
            return str(error), runs.seen

    words, seen = ask(0, 0.8)
    assert seen == [FIRST] and words.startswith("accuracy 100.0%") and words.endswith(f"n = {FIRST} of 90")
    words, seen = ask(3, 0.7)  # two thirds are right: not far from enough
    assert seen == [FIRST, 90] and "prefers the right answer on" in words and "of 90 prompts" in words
    words, seen = ask(1, 0.8)
    assert seen == [FIRST] and f"0.0% of {FIRST} prompts" in words


@pytest.mark.parametrize(("right", "n", "least", "is_clear"), [
    (32, 32, 0.8, True), (31, 32, 0.8, True), (30, 32, 0.8, False), (26, 32, 0.8, False), (16, 32, 0.8, True),
    (0, 32, 0.0, True), (32, 32, 1.0, False),
])  # fmt: skip
def test_wilsons_interval_decides(right: int, n: int, least: float, is_clear: bool) -> None:
    score_test = abs(right / n - least) > 1.96 * (least * (1 - least) / n) ** 0.5  # of which it is the inverse
    assert is_decided(right / n, n, least) == is_clear == (least <= 0 or score_test)
