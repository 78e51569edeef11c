"""What the tables of tiny models are made of: a family, and sizes that many of them share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

COMMON: dict[str, Any] = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
NARROW: dict[str, Any] = {**GROUPED, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of an architecture.

    ``config``: transformers' config class; ``arguments`` for it (beside `COMMON`, for models of text). ``kind`` tells
    what the model takes and gives: "decoder", "hybrid" (a decoder with recurrent or convolutional layers too, beside or
    instead of softmax attention), "encoder" (bidirectional text), "seq2seq" (encoder and decoder), "vision" (images
    alone) or "vision-language" (images among tokens). ``auto``: transformers' class for it. ``float64``: whether every
    operation of the model has it (torch's grouped matrix product has not). ``eager``: whether transformers' eager
    attention is right; where it is not, its SDPA attention is the reference. ``gain``: by how much
    weights are made larger, so that attention is far from uniform (and float32 still exact enough).
    """

    config: str
    arguments: dict[str, Any]
    kind: str = "decoder"
    auto: str = "AutoModelForCausalLM"
    float64: bool = True
    eager: bool = True
    gain: float = 8.0
