"""Counter-based random numbers for single cells.

They are an integer hash of (seed, batch row, head, query, key).

Any part of a pattern can therefore be filled separately, in any order, on any device, with the same numbers. The words
are unsigned 32-bit numbers in int64 tensors; sums and products keep the low 32 bits, like native unsigned words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

WORD = 0xFFFFFFFF
BITS = 23  # bits of the hash used for a uniform number: with the half added it is exact in float32


def mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """Mix a 32-bit word bijectively.

    This is MurmurHash3's finaliser, after adding a constant so that 0 does not stay 0.
    """
    x = (x + 0x9E3779B9) & WORD
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def words(
    seed: int,
    rows: Int[Tensor, " b"],
    heads: Int[Tensor, " h"],
    queries: Int[Tensor, " m"],
    keys: Int[Tensor, " n"],
) -> Int[Tensor, "b h m n"]:
    """Return the words of all cells, distinct for the keys of one query.

    They are mix(mix(key) ^ mix(query ^ mix(head ^ mix(row ^ mix(seed))))).
    """
    state = mix((queries & WORD) ^ states(seed, rows, heads)[:, :, None])[..., None]
    return mix(mix(keys & WORD) ^ state)


def states(seed: int, rows: Int[Tensor, " b"], heads: Int[Tensor, " h"]) -> Int[Tensor, "b h"]:
    """Return the part of `words` that all queries of a batch row and head share."""
    state = mix((rows & WORD) ^ mix(torch.full_like(rows, seed)))[:, None]
    return mix((heads & WORD) ^ state)


def uniform(word: Int[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Return numbers in (0, 1) from words: (word // 2^9 + 1/2) / 2^23."""
    return ((word >> (32 - BITS)).to(dtype) + 0.5) / (1 << BITS)
