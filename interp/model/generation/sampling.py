"""Choose next tokens: greedily, or by seeds that do not depend on the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

NUCLEUS = 256  # the most probable tokens in which top_p is looked for first


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0: the most probable one, and the other settings have no effect."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def draws_of(self, prompt: Sequence[int], sample: int, repeat: int) -> torch.Generator:
        """The random numbers of one sample of a prompt: a function of seed, tokens and sample number alone.

        ``repeat``: how often the same prompt stands before this one in the call.
        """
        key = f"{self.seed} {sample} {repeat} {list(prompt)}".encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        return torch.Generator().manual_seed(number)


def choose(
    logits: Float[Tensor, "rows vocab"], sampling: Sampling, draws: Sequence[torch.Generator]
) -> Int[Tensor, " rows"]:
    """Return one token for each row; each row takes one uniform number of its own generator.

    The distribution is softmax(logits / temperature), cut to the ``top_k`` most probable tokens, and then to the least
    number of them whose share reaches ``top_p`` (nucleus sampling, Holtzman et al. 2020). Drawn by its inverse
    distribution function in float64.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in draws]).to(logits.device)
    probs = (logits.double() / sampling.temperature).softmax(-1)
    tokens = None
    if sampling.top_k is not None or sampling.top_p is not None:
        probs, tokens = _most_probable(probs, sampling)
    mass = probs.cumsum(-1)
    places = torch.searchsorted(mass, (uniform * mass[:, -1])[:, None], right=True)
    last = (probs > 0).long().cumsum(-1).argmax(-1, keepdim=True)  # rounding may leave the mass below its own sum
    places = places.minimum(last)
    return (places if tokens is None else tokens.gather(-1, places))[:, 0]


def _most_probable(probs: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Return probabilities in descending order with 0 for those that are cut, and their tokens."""
    vocabulary = probs.shape[-1]
    k = min(sampling.top_k or vocabulary, vocabulary)
    if sampling.top_p is None:
        return probs.topk(k)
    whole = probs.topk(k).values.sum(-1, keepdim=True) if k < vocabulary else 1.0
    top, tokens = probs.topk(min(NUCLEUS, k))
    if len(top[0]) < k and bool((top.sum(-1, keepdim=True) < sampling.top_p * whole).any()):
        top, tokens = probs.topk(k)
    before = top.cumsum(-1) - top
    return torch.where(before < sampling.top_p * whole, top, 0.0), tokens
