"""Inputs of circuit methods: batches of one length, and base provenance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from interp.model.batching import equal_length_batches
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PromptPair
from interp.utils.provenance import now, prompt_hash

TOKENS = 1024  # of a batch
Pairs = PromptPair | Iterable[PromptPair]


def token_batches(prompts: Sequence[Encoded], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Batches of indices of prompts of one length.

    A batch has at most ``tokens`` tokens, and at least one prompt.
    """
    for batch in equal_length_batches([p.clean for p in prompts]):
        step = max(1, tokens // len(prompts[batch[0]]))
        yield from (batch[i : i + step] for i in range(0, len(batch), step))


def base_provenance(model: Model, prompts: Sequence[Any]) -> dict[str, Any]:
    """The facts that every result stores: model, prompts and time.

    Of the prompts, a hash and their number are stored.
    """
    return {**model.provenance(), "prompts": prompt_hash(prompts), "n_prompts": len(prompts), "created": now()}
