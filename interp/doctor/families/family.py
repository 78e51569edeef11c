"""The rows of the tables of tiny models, and the sizes that many of them share."""

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

    ``config``: transformers' config class; ``arguments``: its arguments (besides `COMMON`, for text models). ``kind``
    describes inputs and outputs: "decoder", "hybrid" (a decoder with recurrent or convolutional layers besides or
    instead of softmax attention), "encoder" (bidirectional text), "seq2seq" (encoder and decoder), "vision" (images
    alone) or "vision-language" (images among tokens). ``auto``: transformers' class for the model. ``float64``: whether
    every operation of the model supports it (torch's grouped matrix product does not). ``eager``: whether transformers'
    eager attention is correct; if not, its SDPA attention is the reference. ``gain``: factor by which weights are
    enlarged, so that attention is far from uniform (and float32 still exact enough).
    """

    config: str
    arguments: dict[str, Any]
    kind: str = "decoder"
    auto: str = "AutoModelForCausalLM"
    float64: bool = True
    eager: bool = True
    gain: float = 8.0
