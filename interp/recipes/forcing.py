"""Answers of several tokens: read by teacher forcing, as a whole.

The answer's tokens but the last stand behind the prompt, and the metric reads the rows that predict each of its tokens
(`Metric.of_string`). A foil has other tokens, and so runs and cells of its own; its value is subtracted. Positions and
spans are those of the prompt: `Encoded.tokens` does not count what stands behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from interp.errors import InterpError, PromptError
from interp.metrics import Metric
from interp.model.model import Model
from interp.prompts.coder import Encoded
from interp.prompts.embeddings import Embeddings
from interp.recipes.read_out import ReadOut

Side = Literal["answer", "foil"]
MOST_SHOWN = 8  # strings whose tokens provenance shows


def is_string(prompt: Encoded, metric: Metric) -> bool:
    """Whether the metric reads more than one token of an answer of this prompt, or of its foil."""
    return metric.reads_answer and bool(prompt.answer_rest or (metric.needs_foil and prompt.foil_rest))


def sides_of(metric: Metric) -> tuple[Side, ...]:
    """Return the strings whose tokens the metric reads, each in runs of its own."""
    return ("answer", "foil") if metric.needs_foil else ("answer",)


def string_metric(metric: Metric, model: Model, at_last: bool) -> Metric:
    """Return the metric of one string's tokens, whose rows are read together.

    ``at_last``: whether the recipe reads the end of the prompt. Raises InterpError for a metric that reads one token
    alone, for other positions, and inside `Model.edited` with masks.
    """
    if metric.of_string is None:
        raise InterpError(
            f"metric {metric.name!r} reads one token, and an answer or foil has several: use logit_diff, logprob, prob "
            "or rank, or interp.Metric(…, of_string=…) for several tokens, reads_answer=False if it reads no answer"
        )
    if not at_last:
        raise InterpError(
            f"at=: an answer or foil has several tokens, and metric {metric.name!r} reads them behind the last token "
            "of the prompt: leave at='last', or use token_kl, seq_logprob or kl"
        )
    edited = model.instrument.edited
    if edited is not None and edited.has_masks:
        raise InterpError(
            "an attention mask of model.edited does not say what an answer's tokens after the first see: use answers "
            "of one token, or attention edits"
        )
    return replace(metric, fn=metric.of_string, over="positions", reads_pair=False, needs_foil=False)


def string_outs(prompts: Sequence[Encoded], side: Side) -> list[list[ReadOut]]:
    """Return what is read of each prompt: all tokens of its answer or foil, from the rows that predict them."""
    outs = []
    for prompt in prompts:
        ids, n = prompt.answer_ids if side == "answer" else prompt.foil_ids, len(prompt.tokens)
        outs.append([ReadOut(None, tuple(range(n - 1, n - 1 + len(ids))), ids)])
    return outs


def with_answer(model: Model, ids: tuple[int, ...], answer: tuple[int, ...]) -> tuple[int, ...]:
    """Return a prompt's ids with an answer's behind them, whose tokens the edits of `Model.edited` do not count."""
    if answer and isinstance(ids, Embeddings):
        raise PromptError("an answer of several tokens cannot stand behind a prompt of vectors: use one token")
    if answer and model.instrument.edited is not None:
        model.instrument.edited.name_longer(ids, answer)
    return (*ids, *answer) if answer else ids


def with_answers(model: Model, prompts: Sequence[Encoded], answers: Sequence[tuple[int, ...]]) -> list[Encoded]:
    """Return pairs with an answer's tokens behind both prompts of each."""
    for prompt, answer in zip(prompts, answers, strict=True):
        for ids in dict.fromkeys((prompt.clean, prompt.corrupt)):
            with_answer(model, ids, answer)
    return [p.followed_by(answer) for p, answer in zip(prompts, answers, strict=True)]


def string_words(model: Model, prompts: Sequence[Encoded], metric: Metric) -> dict[str, object]:
    """Return what the provenance says of answers of several tokens."""
    strings = dict.fromkeys(
        ids for p in prompts for ids in ((p.answer_ids, p.foil_ids) if metric.needs_foil else (p.answer_ids,))
    )
    several = [model.coder.texts(ids) for ids in strings if len(ids) > 1]
    more = [] if len(several) <= MOST_SHOWN else [f"… and {len(several) - MOST_SHOWN} more"]
    minus = ", minus that of the foil" if metric.needs_foil else ""
    return {
        "read_answers": f"all tokens of the answer, each after the prompt and the tokens before it{minus}",
        "answer_tokens": [*several[:MOST_SHOWN], *more],
    }


@dataclass
class Scored:
    """The numbers of one row. ``rounding``: how far rounding can move the metric of its unchanged runs."""

    clean: float
    corrupt: float
    patched: float
    rounding: float
    no_gap: bool


def combine(sides: Sequence[Sequence[Scored]]) -> list[Scored]:
    """Return the numbers of equal lists of rows: those of the answer minus those of the foil, if there is one."""
    if len(sides) == 1:
        return list(sides[0])
    out = []
    for a, b in zip(*sides, strict=True):
        clean, corrupt, rounding = a.clean - b.clean, a.corrupt - b.corrupt, a.rounding + b.rounding
        out.append(Scored(clean, corrupt, a.patched - b.patched, rounding, abs(clean - corrupt) <= rounding))
    return out
