"""Inputs of circuit methods: batches of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from interp.model.batching import equal_length_batches
from interp.prompts.coder import Encoded
from interp.prompts.pairs import PromptPair

TOKENS = 1024  # of a batch
Pairs = PromptPair | Iterable[PromptPair]


def token_batches(prompts: Sequence[Encoded], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Batches of indices of prompts of one length.

    A batch has at most ``tokens`` tokens, and at least one prompt.
    """
    for batch in equal_length_batches([p.clean for p in prompts]):
        step = max(1, tokens // len(prompts[batch[0]]))
        yield from (batch[i : i + step] for i in range(0, len(batch), step))
