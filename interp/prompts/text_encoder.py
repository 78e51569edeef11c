"""Convert text to a model's tokens and back.

This includes special tokens, character ranges and continuations.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from interp.errors import PromptError
from interp.prompts.coder import Following
from interp.prompts.embeddings import Embeddings
from interp.prompts.listing import TokenIds, check_text
from interp.prompts.ranges import Span, continues_word
from interp.prompts.special_tokens import SpecialTokens
from interp.prompts.token_bytes import label, offsets_by_bytes, token_bytes

log = logging.getLogger("interp")

ANCHORS = ("a", "(", "\n")  # texts of one token each, that few tokenizers merge with what follows


def no_tokenizer(name: str) -> PromptError:
    """Return the error for text that is given to a model without a tokenizer."""
    return PromptError(
        f"{name} has no tokenizer, so that prompts and answers cannot be texts: load it with tokenizer=…, or give "
        "token ids"
    )


@dataclass(frozen=True)
class TextEncoder:
    """Encodes text for one model.

    ``special``: the special tokens around every text. ``vocabulary``: the number of tokens that the model embeds; None
    if unknown. ``mask``: the mask token, for a model that fills it in. ``width``: numbers of a vector in the token's
    place; None if the model takes none.
    """

    name: str
    tokenizer: Any = field(repr=False)
    special: SpecialTokens
    n_ctx: int
    vocabulary: int | None = None
    mask: str | None = None
    width: int | None = None

    @property
    def unknown(self) -> int | None:
        """The id of words outside the vocabulary.

        It is None if that token has another use, as in GPT-2.
        """
        t = self.tokenizer
        if t is None:
            return None
        unknown = getattr(t, "unk_token_id", None)
        return None if unknown is None or unknown in (t.bos_token_id, t.eos_token_id) else unknown

    def bare(self, text: str) -> list[int]:
        """Encode without special tokens."""
        if self.tokenizer is None:
            raise no_tokenizer(self.name)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, text: str | TokenIds) -> list[int]:
        """Encode with the special tokens of the model's prompts; token ids stay as they are.

        Raises PromptError for an empty text, one without tokens, and beyond the context length or the vocabulary, and
        for token ids that are padded.
        """
        if isinstance(text, Embeddings):
            self._check_vectors(text)
            return text  # type: ignore[return-value]
        if isinstance(text, TokenIds):
            self.check(text)
            self._refuse_padding(text)
            return list(text)
        check_text(text)
        bare = self.bare(text)
        before, after = self.special.around(bare)
        ids = [*before, *bare, *after]
        self.check(ids)
        return ids

    def _check_vectors(self, prompt: Embeddings) -> None:
        """Raise PromptError for vectors that the model does not read, of another width, or too many of them."""
        if self.width is None:
            raise PromptError(
                f"{self.name} reads no vectors in the place of tokens (inputs_embeds): its prompts must be tokens"
            )
        if prompt.vectors.shape[1] != self.width:
            raise PromptError(
                f"{self.name} reads vectors of {self.width} numbers, as its token embedding gives them; these have "
                f"{prompt.vectors.shape[1]}"
            )
        if len(prompt) > self.n_ctx:
            raise PromptError(f"a prompt of {len(prompt)} vectors is longer than {self.name}'s context of {self.n_ctx}")

    def check(self, ids: Sequence[int]) -> None:
        """Raise PromptError for no token, more tokens than the context, or tokens without an embedding."""
        if not ids:
            raise PromptError(
                f"{self.name}'s tokenizer makes no token of this prompt, which then has nothing to read: write more "
                "than space, or put a BOS token in front with interp.load(…, bos=True)"
            )
        if len(ids) > self.n_ctx:
            raise PromptError(f"a prompt of {len(ids)} tokens is longer than {self.name}'s context of {self.n_ctx}")
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            if self.tokenizer is None:
                raise PromptError(
                    f"token {max(ids)} is beyond {self.name}'s vocabulary of {self.vocabulary} tokens, 0 to "
                    f"{self.vocabulary - 1}"
                )
            raise PromptError(
                f"token {max(ids)} ({self.texts([max(ids)])[0]!r}) is beyond the {self.vocabulary} tokens that "
                f"{self.name} knows: is the tokenizer another model's?"
            )

    def _refuse_padding(self, ids: Sequence[int]) -> None:
        """Raise PromptError for padding at an end of token ids, which the model would read as words.

        Where the padding token is also the first or last token of texts, several of them are told, and one is not.
        """
        pad = getattr(self.tokenizer, "pad_token_id", None)
        left = next((i for i, token in enumerate(ids) if token != pad), len(ids))
        right = next((i for i, token in enumerate(reversed(ids)) if token != pad), len(ids))
        if pad is None or max(left, right) == 0 or len(ids) == 1:
            return
        token = self.texts([pad])[0]
        many = f"{max(left, right)} padding token(s) ({token!r}) at an end of token ids would be read as words"
        remedy = "give what the tokenizer returned, with its attention_mask, or leave them out"
        if pad not in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            raise PromptError(f"{many}: {remedy}")
        if max(left, right) > 1:
            log.warning("%s: if they are padding, %s", many, remedy)

    def texts(self, ids: Sequence[int]) -> list[str]:
        """One string for each token.

        A token that is not a whole character shows its bytes.
        """
        if isinstance(ids, Embeddings):
            return list(ids.texts)
        return [str(i) if self.tokenizer is None else label(self.tokenizer, i) for i in ids]

    def offsets(self, text: str | TokenIds) -> list[Span]:
        """The character range of each token of `encode`; (0, 0) for special tokens, and for prompts of no text."""
        if not isinstance(text, str):
            return [(0, 0)] * len(text)
        bare = self.bare(text)
        before, after = self.special.around(bare)
        return [(0, 0)] * len(before) + self._bare_offsets(text, bare) + [(0, 0)] * len(after)

    def _bare_offsets(self, text: str, bare: Sequence[int]) -> list[Span]:
        if getattr(self.tokenizer, "is_fast", False):
            encoding = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            return [(start, stop) for start, stop in encoding["offset_mapping"]]
        ranges = offsets_by_bytes(text, [token_bytes(self.tokenizer, i) for i in bare])
        if ranges is not None:
            return ranges
        ends = [len(self.tokenizer.decode(bare[: i + 1])) for i in range(len(bare))]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def continuation(self, text: str) -> list[int]:
        """Encode text as the continuation of some other text, without special tokens.

        Where the other text is known, `following` is exact.
        """
        bare = self.bare(text)
        for anchor in ANCHORS if bare else ():  # some tokenizers mark the start of a string
            start, joined = self.bare(anchor), self.bare(anchor + text)
            if joined[: len(start)] == start and len(joined) > len(start):
                if self.unknown in start and self._is_absorbed(anchor, text, joined, len(start)):
                    continue
                return joined[len(start) :]
        return bare

    def _is_absorbed(self, anchor: str, text: str, joined: Sequence[int], n: int) -> bool:
        """Whether the ``n`` tokens of an unknown anchor hold the beginning of the text behind it."""
        begins = self._bare_offsets(anchor + text, joined)[n][0]
        return bool((anchor + text)[len(anchor) : begins].strip())

    def following(self, prompt: str | TokenIds, text: str) -> Following:
        """Encode text as the continuation of one prompt; in a masked model, as what fills its mask.

        Raises PromptError for a prompt whose last space belongs to the text's first token.
        """
        if not isinstance(prompt, str):
            return Following(self.continuation(text))
        if self.mask is not None:
            return Following(self._filling(prompt, text, self.mask))
        start = self.bare(prompt)
        for glue in ("", " "):
            joined = self.bare(prompt + glue + text)
            ids = joined[len(start) :] if joined[: len(start)] == start else []
            if ids and (not glue or not self._is_marked(ids[0])):  # without marks, a space says nothing
                return Following(ids, "" if glue else _note_on_glue(prompt, text))
            if text[:1].isspace():
                break
        if prompt[-1:] == " ":
            raise PromptError(
                f"the prompt {prompt[-40:]!r} ends with a space, which belongs to the first token of its answer: end "
                f"it without the space, and write the answer as {' ' + text.lstrip()!r}"
            )
        together = self.texts(self.bare(prompt + text)[-3:])
        note = (
            f"is not what the tokenizer makes of it after {prompt[-20:]!r}: both together end in the tokens {together}"
        )
        return Following(self.continuation(text), note, is_exact=False)

    def _is_marked(self, token: int) -> bool:
        """Whether a token's name says that a space stands before it."""
        return str(self.tokenizer.convert_ids_to_tokens(token)).startswith(("▁", "Ġ"))

    def _filling(self, prompt: str, text: str, mask: str) -> list[int]:
        """Encode text in the place of the prompt's mask."""
        left, found, right = prompt.partition(mask)
        start, whole = self.bare(left), self.bare(prompt)
        if not found or mask in right:
            return self.continuation(text)  # `mask_positions` reports this when the model runs
        at = whole.index(self.tokenizer.mask_token_id)
        word = text.strip() if not left or left[-1].isspace() else text
        joined, after = self.bare(left + word + right), whole[at + 1 :]
        fits = joined[:at] == whole[:at] and (not after or joined[-len(after) :] == after)
        ids = joined[at : len(joined) - len(after)] if fits and at <= len(start) else []
        return ids or self.continuation(text)


def _note_on_glue(prompt: str, text: str) -> str:
    """Return a note if the first letter of a text joins the last letter of its prompt."""
    if not continues_word(prompt, text):
        return ""
    last = prompt.split()[-1]
    return f"continues the prompt's last word ({last + text!r}): write {' ' + text!r} if it is a word of its own"
