"""Probabilities of a prompt's own tokens: along causal prompts, and one masked token at a time.

Logits of [batch, position, vocab] never exist together: the model runs once, and its head on a few positions at a time.

Pseudo-likelihood of masked models: Salazar et al. 2020, "Masked language model scoring" (each token is masked alone);
Kauf & Ivanova 2023, "A better way to do masked language model scoring" (the later tokens of its word are masked too).
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.errors import InterpError, ModelError, PromptError
from interp.model.batching import equal_length_batches
from interp.model.input_checks import needs_images
from interp.model.loaded_model import LoadedModel
from interp.prompts.embeddings import refuse_vectors
from interp.prompts.listing import TokenIds
from interp.prompts.pairs import encode_prompt, listed_of_any_kind, text_of
from interp.prompts.ranges import continues_word
from interp.utils.progress import progress

LOGITS_AT_A_TIME = 2**24  # numbers: 64 MiB in float32, and a few times that while they are reduced
Masking = Literal["word", "token"]
MASKINGS = ("word", "token")


@dataclass(frozen=True)
class TokenScores:
    """What a model says after each token of one prompt, one number a position.

    ``logprob``: of the token that follows (NaN at the last position). ``best``: the most probable token.
    """

    logprob: Float[Tensor, " position"]
    entropy: Float[Tensor, " position"]
    margin: Float[Tensor, " position"]
    best: Int[Tensor, " position"]


def confidence_table(model: LoadedModel, prompts: Any) -> pd.DataFrame:
    """Return one row for each token of each prompt; see `Model.confidence`."""
    refuse_without_words(model)
    if model.masked:
        raise PromptError(
            f"{model.name} is a masked language model: it predicts no next token. interp.tasks.rank scores whole "
            "statements by pseudo-likelihood"
        )
    ids = [encode_prompt(p, model.coder) for p in listed_of_any_kind(prompts)]
    refuse_vectors(ids, "confidence reads the probabilities of the prompt's own tokens")
    parts = []
    for example, scores in enumerate(token_scores(model, ids)):
        tokens = model.coder.texts(ids[example])
        parts.append(
            pd.DataFrame({
                "example": example, "position": range(len(tokens)), "token": tokens, "next": [*tokens[1:], None],
                "probability": scores.logprob.exp(), "logprob": scores.logprob, "entropy": scores.entropy,
                "margin": scores.margin, "best": model.coder.texts(scores.best.tolist()),
            })
        )  # fmt: skip
    return pd.concat(parts, ignore_index=True)


def refuse_without_words(model: LoadedModel) -> None:
    """Raise ModelError for a model that gives no probabilities to the tokens of a text."""
    if model.stacks or model.headless or model.reads == "images" or needs_images(model):
        raise ModelError(
            f"{model.name} is no language model with a head that reads text alone ("
            f"{type(model.bridge.original_model).__name__}): it gives no probabilities to the tokens of a prompt"
        )


def token_scores(model: LoadedModel, ids: Sequence[Sequence[int]]) -> list[TokenScores]:
    """Return the scores of causal prompts of any lengths, float64 on the CPU."""
    scores: dict[int, TokenScores] = {}
    with progress("probabilities of tokens", len(ids)) as advance:
        for batch in _batches(model, ids):
            tokens = torch.tensor([list(ids[i]) for i in batch], device=model.device)
            following = torch.cat([tokens[:, 1:], tokens[:, :1]], dim=1)
            parts = [_reduced(logits, following[:, rows]) for rows, logits in _logits_by_rows(model, tokens)]
            logprob, entropy, margin, best = (torch.cat(x, dim=1).cpu() for x in zip(*parts, strict=True))
            logprob[:, -1] = torch.nan
            for row, i in enumerate(batch):
                scores[i] = TokenScores(logprob[row], entropy[row], margin[row], best[row])
            advance(len(batch))
    return [scores[i] for i in range(len(ids))]


def _batches(model: LoadedModel, ids: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield numbers of prompts of equal length; few of them where a forward returns the logits of all positions."""
    for batch in equal_length_batches(ids):
        few = max(1, LOGITS_AT_A_TIME // (len(ids[batch[0]]) * int(model.bridge.cfg.d_vocab)))
        few = len(batch) if _takes(model.bridge.original_model, "logits_to_keep") else few
        yield from (batch[i : i + few] for i in range(0, len(batch), few))


def _reduced(
    logits: Float[Tensor, "batch rows vocab"], following: Int[Tensor, "batch rows"]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probability of the following token, entropy, margin (all float64) and the best token."""
    logprobs = logits.double().log_softmax(-1) if logits.dtype == torch.float64 else logits.float().log_softmax(-1)
    probs = logprobs.exp()
    top = probs.topk(2, dim=-1)
    entropy = torch.special.entr(probs).sum(-1)
    picked = logprobs.gather(-1, following[..., None])[..., 0]
    margin = top.values[..., 0] - top.values[..., 1]
    return picked.double(), entropy.double(), margin.double(), top.indices[..., 0]


def _logits_by_rows(model: LoadedModel, tokens: Int[Tensor, "batch position"]) -> Iterator[tuple[slice, Tensor]]:
    """Yield stretches of positions with their logits, of one forward.

    The model's own head runs on a stretch of positions at a time; its layers run once, and their output is used again.
    Models that take no ``logits_to_keep`` return all logits at once.
    """
    hf, n = model.bridge.original_model, tokens.shape[1]
    step = max(1, LOGITS_AT_A_TIME // (len(tokens) * int(model.bridge.cfg.d_vocab)))
    if step >= n or not _takes(hf, "logits_to_keep"):
        yield slice(0, n), model.forward(tokens, n)
        return
    options = {"use_cache": False} if _takes(hf, "use_cache") else {}
    body: Any = hf.base_model
    own_forward = vars(body).get("forward")  # where accelerate moves activations between devices
    outputs: list[Any] = []
    handle = body.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        for start in range(0, n, step):
            rows = torch.arange(start, min(n, start + step), device=tokens.device)
            logits = hf(tokens, logits_to_keep=rows, **options).logits
            if outputs and body is not hf:
                body.forward = lambda *_args, **_options: outputs[0]
            yield slice(start, start + len(rows)), logits
    finally:
        handle.remove()
        vars(body).pop("forward", None)
        if own_forward is not None:
            body.forward = own_forward


def _takes(module: Any, name: str) -> bool:
    return name in inspect.signature(module.forward).parameters


# ---------------------------------------------------------------- whole statements


def statement_logprobs(model: LoadedModel, prompts: Any, masking: Masking) -> list[Float[Tensor, " tokens"]]:
    """Return the log-probabilities of each prompt's own tokens; see `Model.token_logprobs`."""
    refuse_without_words(model)
    if masking not in MASKINGS:
        raise InterpError(f"masking={masking!r}: one of {', '.join(map(repr, MASKINGS))} expected")
    items = listed_of_any_kind(prompts)
    ids = [encode_prompt(p, model.coder) for p in items]
    refuse_vectors(ids, "rank reads the probabilities of the statements' own tokens")
    first_of: dict[tuple[int, ...], int] = {}  # equal statements have one score, to the bit
    for number, row in enumerate(ids):
        first_of.setdefault(tuple(row), number)
    distinct = list(first_of)
    if model.masked:
        scores = _pseudo_logprobs(model, [text_of(items[first_of[row]]) for row in distinct], distinct, masking)
    else:
        scores = [s.logprob[:-1] for s in token_scores(model, distinct)]
    if empty := next((row for row, s in zip(distinct, scores, strict=True) if not len(s)), None):
        raise PromptError(
            f"{items[first_of[empty]]!r:.80} has no token whose probability the model gives: the first token of a "
            "prompt has none (a BOS token in front gives it one: interp.load(…, bos=True))"
        )
    by_ids = dict(zip(distinct, scores, strict=True))
    return [by_ids[tuple(row)] for row in ids]


def _pseudo_logprobs(
    model: LoadedModel, texts: Sequence[Any], ids: Sequence[tuple[int, ...]], masking: Masking
) -> list[Tensor]:
    """Return the log-probability of every token but the special ones, given the others."""
    mask = getattr(model.tokenizer, "mask_token_id", None)
    if mask is None:
        raise PromptError(f"{model.name} is a masked language model, and no tokenizer says which token its mask is")
    copies: list[tuple[int, int, list[int]]] = []  # statement, position, ids with masks
    for number, (text, row) in enumerate(zip(texts, ids, strict=True)):
        if mask in row:
            raise PromptError(f"{text!r:.80} holds the mask token: a whole statement expected, its words in place")
        before, after = model.special_tokens.before, model.special_tokens.after
        first = len(before) if row[: len(before)] == before else 0
        stop = len(row) - len(after) if after and row[-len(after) :] == after else len(row)
        joined = _joined_to_next(model, text, row) if masking == "word" else [False] * len(row)
        for position in range(first, stop):
            end = position + 1
            while end < stop and joined[end - 1]:
                end += 1
            copies.append((number, position, [*row[:position], *[mask] * (end - position), *row[end:]]))
    counts, firsts = Counter(number for number, *_ in copies), dict[int, int]()
    for number, position, _ in copies:
        firsts.setdefault(number, position)
    values = [torch.zeros(counts[i], dtype=torch.float64) for i in range(len(ids))]
    with progress("pseudo-likelihood", len(copies)) as advance:
        for batch in _batches(model, [c[2] for c in copies]):
            places = torch.tensor([copies[i][1] for i in batch], device=model.device)
            logits = model.forward(torch.tensor([copies[i][2] for i in batch], device=model.device), 0)
            picked = logits[torch.arange(len(batch), device=places.device), places]
            picked = (picked if picked.dtype == torch.float64 else picked.float()).log_softmax(-1)
            for row, i in enumerate(batch):
                number, position, _ = copies[i]
                values[number][position - firsts[number]] = picked[row, ids[number][position]].item()
            advance(len(batch))
    return values


def _joined_to_next(model: LoadedModel, text: Any, ids: Sequence[int]) -> list[bool]:
    """Return for each token whether the next one continues its word; never for token ids, whose words are unknown."""
    if isinstance(text, TokenIds):
        return [False] * len(ids)
    offsets = model.coder.offsets(text)
    joins = [a[1] == b[0] < b[1] and continues_word(text[: b[0]], text[b[0] :]) for a, b in pairwise(offsets)]
    return [*joins, False]
