"""The special tokens around a prompt: what a tokenizer itself adds, and whether BOS stands in front."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from interp.errors import ModelError

BosPolicy = Literal["tokenizer"] | bool
BOS_WORDS: dict[str, BosPolicy] = {"tokenizer": "tokenizer", "true": True, "false": False}  # on a command line
PROBE = "a"  # any text that is not empty


def bos_of_word(word: str) -> BosPolicy:
    """Return the policy that a word of a command line names. Raises ValueError for another word."""
    if word.lower() not in BOS_WORDS:
        raise ValueError(f"one of {', '.join(BOS_WORDS)} expected, got {word!r}")
    return BOS_WORDS[word.lower()]


@dataclass(frozen=True)
class SpecialTokens:
    """Token ids that stand ``before`` and ``after`` the text of every prompt.

    ``bos``: the id of the beginning-of-sequence token (None if the tokenizer has none). ``policy``: the argument
    ``bos=`` of `interp.load` that these follow.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    bos: int | None = None
    policy: BosPolicy = "tokenizer"

    @classmethod
    def of(cls, tokenizer: Any) -> SpecialTokens:
        """Return what a Hugging Face tokenizer adds by itself; nothing for None."""
        if tokenizer is None:
            return cls()
        whole, bare = (list(tokenizer(PROBE, add_special_tokens=own)["input_ids"]) for own in (True, False))
        bos = getattr(tokenizer, "bos_token_id", None)
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return cls(tuple(whole[:start]), tuple(whole[start + len(bare) :]), bos)
        return cls((), (), bos)

    def following(self, policy: BosPolicy, name: str, *, is_continued: bool) -> SpecialTokens:
        """Return the tokens under a policy of `interp.load`.

        ``is_continued``: the model predicts what follows the prompt. Then nothing stands after it. Raises ModelError
        for an unknown policy, and for True if the tokenizer has no BOS token.
        """
        if not (policy == "tokenizer" or isinstance(policy, bool)):
            raise ModelError(
                f"bos={policy!r}: 'tokenizer' (the special tokens that the tokenizer itself adds), True (a BOS token "
                "in front of every text) or False (none) expected"
            )
        tokens = replace(self, policy=policy, after=() if is_continued else self.after)
        if policy is True and not self.has_bos:
            if self.bos is None:
                raise ModelError(
                    f"bos=True: the tokenizer of {name} has no BOS token. Set tokenizer.bos_token to the token that "
                    "the model was trained with, or leave bos= out"
                )
            return replace(tokens, before=(self.bos, *self.before))
        if policy is False and self.has_bos:
            return replace(tokens, before=self.before[1:])
        return tokens

    @property
    def has_bos(self) -> bool:
        """Whether the BOS token is the first of every prompt."""
        return self.bos is not None and self.before[:1] == (self.bos,)

    def around(self, bare: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return what stands before and after the tokens of one text.

        A text that begins with the special tokens itself (that of a chat template) does not get them twice.
        """
        writes_itself = bool(self.before) and tuple(bare[: len(self.before)]) == self.before
        return (() if writes_itself else self.before), self.after

    def stand_in_front(self, prompts: Iterable[Sequence[int]]) -> bool | str | None:
        """Return whether prompts, as token ids, begin with the BOS token.

        True or False for all of them, ``"of some prompts"`` for a mixture, None for a tokenizer without BOS token.
        """
        if self.bos is None:
            return None
        begins = {len(ids) > 0 and ids[0] == self.bos for ids in prompts}
        return "of some prompts" if len(begins) > 1 else begins.pop() if begins else self.has_bos
