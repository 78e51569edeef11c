"""Inputs of models: prompts, pairs, facts, images, named spans, prompt files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from interp.prompts.answers import single_token
    from interp.prompts.coder import Coder, Encoded, first_difference
    from interp.prompts.images import ImagePair
    from interp.prompts.listing import TokenIds
    from interp.prompts.pair_set import PairSet
    from interp.prompts.pairs import (
        Fact,
        Prompt,
        PromptPair,
        encode_any,
        encode_facts,
        encode_pairs,
        listed_prompts,
        listed_texts,
    )
    from interp.prompts.ranges import Span, find_span, token_spans

_EXPORTS = {
    "answers": ("single_token",),
    "coder": ("Coder", "Encoded", "first_difference"),
    "images": ("ImagePair",),
    "listing": ("TokenIds",),
    "pair_set": ("PairSet",),
    "pairs": (
        "Fact", "Prompt", "PromptPair", "encode_any", "encode_facts", "encode_pairs", "listed_prompts", "listed_texts",
    ),
    "ranges": ("Span", "find_span", "token_spans"),
}  # fmt: skip

__all__ = [
    "Coder", "Encoded", "Fact", "ImagePair", "PairSet", "Prompt", "PromptPair", "Span", "TokenIds", "encode_any",
    "encode_facts", "encode_pairs", "find_span", "first_difference", "listed_prompts", "listed_texts", "single_token",
    "token_spans",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
