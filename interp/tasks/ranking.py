"""Rank statements by their likelihood, to see which of them a model holds true.

Wiland et al. 2024, "BEAR: a unified framework for evaluating relational knowledge in causal and masked language
models": every answer is written into a whole statement, and the most likely statement is the model's answer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import pandas as pd

from interp.errors import PromptError
from interp.prompts.coder import Coder
from interp.prompts.pairs import encode_prompt, listed_of_any_kind, text_of

log = logging.getLogger("interp")


class ScoringModel(Protocol):
    """The part of `interp.Model` that `rank` uses."""

    name: str

    @property
    def coder(self) -> Coder:
        """Text to tokens and back."""
        ...

    @property
    def masked(self) -> bool:
        """Whether the model fills in masks."""
        ...

    def token_logprobs(self, prompts: Any, *, masking: Literal["word", "token"] = "word") -> Sequence[Any]:
        """Log-probabilities of each prompt's tokens."""
        ...


def rank(model: ScoringModel, statements: Any, *, masking: Literal["word", "token"] = "word") -> pd.DataFrame:
    """Rank statements by their likelihood under a model; of masked models, by pseudo-likelihood.

        interp.tasks.rank(model, ["Paris is the capital of France", "Rome is the capital of France"])
        interp.tasks.rank(model, {"France": [...], "Italy": [...]})       # each question's statements by themselves

    Returns one row for each statement, the most likely first. Columns: ``question`` (for a mapping), ``number`` of the
    statement as given, ``statement``, ``logprob`` (the sum over its tokens, in nats), ``mean_logprob`` (a token),
    ``tokens`` (how many are scored), ``rank`` (1: the largest sum; equal ones share a rank) and ``mean_rank`` (by the
    mean). The sum is what BEAR ranks by; it favours short statements, the mean does not. A statement is a text, an
    `interp.Prompt` or token ids. ``masking``: see `interp.Model.token_logprobs`.

    Without a BOS token in front, a causal model gives the first token no probability; a warning says so where
    statements begin with different tokens. Raises PromptError for what is no statement, and for fewer than two.
    """
    is_grouped = isinstance(statements, Mapping) and "input_ids" not in statements
    groups = dict(statements) if is_grouped else {"": statements}
    if not groups:
        raise PromptError("there are no statements to rank")
    expected = "statements (texts, Prompts or token ids)"
    listed = {question: listed_of_any_kind(group, expected) for question, group in groups.items()}
    for question, items in listed.items():
        if len(items) < 2:
            where = f"question {question!r}: " if is_grouped else ""
            raise PromptError(f"{where}one statement has nothing to be ranked with: give at least two")
        _warn_of_first_tokens(model, items)
    scores = iter(model.token_logprobs([s for items in listed.values() for s in items], masking=masking))
    tables = []
    for question, items in listed.items():
        rows = [_row(number, item, next(scores)) for number, item in enumerate(items)]
        table = pd.DataFrame(rows)
        for column, by in (("rank", "logprob"), ("mean_rank", "mean_logprob")):
            table[column] = table[by].rank(ascending=False, method="min").astype(int)
        if is_grouped:
            table.insert(0, "question", question)
        tables.append(table.sort_values(["rank", "number"]))
    return pd.concat(tables, ignore_index=True)


def _row(number: int, statement: Any, logprobs: Any) -> dict[str, Any]:
    text, total, n = text_of(statement), float(logprobs.sum()), len(logprobs)
    return {
        "number": number, "statement": text if isinstance(text, str) else list(text), "logprob": total,
        "mean_logprob": total / n, "tokens": n,
    }  # fmt: skip


def _warn_of_first_tokens(model: ScoringModel, statements: Sequence[Any]) -> None:
    """Warn if statements begin with different tokens, which a causal model gives no probability."""
    if not model.masked and len({encode_prompt(s, model.coder)[0] for s in statements}) > 1:
        log.warning(
            "the statements begin with different tokens, and %s gives the first token of a prompt no probability, so "
            "that it is not part of the score: put a BOS token in front with interp.load(…, bos=True)", model.name,
        )  # fmt: skip
