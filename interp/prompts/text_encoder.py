"""Convert text to a model's tokens and back.

This includes special tokens, character ranges and continuations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from interp.errors import PromptError
from interp.prompts.pairs import Span
from interp.prompts.token_bytes import label, offsets_by_bytes, token_bytes


class TokenBridge(Protocol):
    """The part of a TransformerBridge that encoding uses."""

    original_model: Any

    def to_tokens(self, text: Any, **kwargs: Any) -> Tensor:
        """Tokens [batch, position] of text."""
        ...


@dataclass(frozen=True)
class TextEncoder:
    """Encodes text for one model.

    It adds the special tokens that TransformerLens' ``to_tokens`` adds.
    """

    name: str
    bridge: TokenBridge = field(repr=False)
    tokenizer: Any = field(repr=False)
    n_ctx: int

    @property
    def unknown(self) -> int | None:
        """The id of words outside the vocabulary.

        It is None if that token has another use, as in GPT-2.
        """
        t = self.tokenizer
        unknown = getattr(t, "unk_token_id", None)
        return None if unknown is None or unknown in (t.bos_token_id, t.eos_token_id) else unknown

    def encode(self, text: str) -> list[int]:
        """Encode with the model's special tokens.

        Raises PromptError beyond its context length or its vocabulary.
        """
        if self.tokenizer is None:
            raise PromptError(f"{self.name} has no tokenizer and reads no text, so prompts cannot be strings")
        ids = self.bridge.to_tokens(text, truncate=False)[0].tolist()
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos) and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]  # a chat template has written the special token already
        if len(ids) > self.n_ctx:
            raise PromptError(f"a prompt of {len(ids)} tokens is longer than {self.name}'s context of {self.n_ctx}")
        self._check_embedded(ids)
        return ids

    def _check_embedded(self, ids: Sequence[int]) -> None:
        """Raise PromptError for tokens without an embedding in the model."""
        # not all models are classes of transformers
        get_embeddings = getattr(self.bridge.original_model, "get_input_embeddings", None)
        table = getattr(get_embeddings and get_embeddings(), "weight", None)
        size = None if table is None else len(table)
        if size is not None and ids and max(ids) >= size:
            raise PromptError(
                f"token {max(ids)} ({label(self.tokenizer, max(ids))!r}) is beyond the {size} tokens that {self.name} "
                "knows: is the tokenizer another model's?"
            )

    def texts(self, ids: Sequence[int]) -> list[str]:
        """One string for each token.

        A token that is not a whole character shows its bytes.
        """
        return [label(self.tokenizer, i) for i in ids]

    def offsets(self, text: str) -> list[Span]:
        """The character range of each token of `encode`; (0, 0) for special tokens."""
        ids = self.encode(text)
        if getattr(self.tokenizer, "is_fast", False):
            encoding = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            bare, spans = list(encoding["input_ids"]), [tuple(o) for o in encoding["offset_mapping"]]
            for shift in range(len(ids) - len(bare) + 1):
                if ids[shift : shift + len(bare)] == bare:
                    tail = len(ids) - len(bare) - shift
                    return [(0, 0)] * shift + spans + [(0, 0)] * tail  # type: ignore[return-value]
        ranges = offsets_by_bytes(text, [token_bytes(self.tokenizer, i) for i in ids])
        if ranges is not None:
            return ranges
        ends = [len(self.tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def continuation(self, text: str) -> list[int]:
        """Encode text as the continuation of other text, without special tokens."""
        bare = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(bare) <= 1 or not text[0].isspace():
            return bare
        # Some tokenizers mark the start of a string; a continuation is what follows other text.
        anchor = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        joined = list(self.tokenizer("a" + text, add_special_tokens=False)["input_ids"])
        follows = joined[: len(anchor)] == anchor and len(joined) > len(anchor)
        return joined[len(anchor) :] if follows else bare
