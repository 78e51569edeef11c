"""Inputs of models: prompts, pairs, facts, images, named spans, prompt files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from interp.prompts.images import ImagePair
    from interp.prompts.pairs import (
        Coder,
        Encoded,
        Fact,
        PairSet,
        Prompt,
        PromptPair,
        Span,
        encode_any,
        encode_facts,
        encode_pairs,
        find_span,
        first_difference,
        listed_prompts,
        single_token,
        token_spans,
    )

_EXPORTS = {
    "images": ("ImagePair",),
    "pairs": (
        "Coder", "Encoded", "Fact", "PairSet", "Prompt", "PromptPair", "Span", "encode_any", "encode_facts",
        "encode_pairs", "find_span", "first_difference", "listed_prompts", "single_token", "token_spans",
    ),
}  # fmt: skip

__all__ = [
    "Coder", "Encoded", "Fact", "ImagePair", "PairSet", "Prompt", "PromptPair", "Span", "encode_any", "encode_facts",
    "encode_pairs", "find_span", "first_difference", "listed_prompts", "single_token", "token_spans",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
