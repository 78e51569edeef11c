"""Word-level tokenizers built in memory.

Every word between spaces is one token, so that prompts stay readable.
"""

from __future__ import annotations

from collections.abc import Sequence
from string import ascii_lowercase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interp.model.hf_classes import PreTrainedTokenizerFast

BOS, EOS, UNK, PAD = SPECIALS = ("<bos>", "<eos>", "<unk>", "<pad>")

LETTERS = tuple(ascii_lowercase)
SYLLABLES = tuple(c + v for v in "aeiou" for c in "bcdfghjklmnpqrstvwxyz")  # 105 two-letter words
# No word is longer than two letters. A two-letter word then never occurs inside another word, so that searching a
# prompt for it is safe.


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Build a fast tokenizer of the four special tokens, then ``words``.

    The special tokens have ids 0 to 3. Text is split at whitespace; an unknown word becomes ``<unk>``. Every text
    encoded with special tokens begins with ``<bos>``, as TransformerLens expects of a model that was trained with one.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    from interp.model.hf_classes import fast_tokenizer

    vocabulary = {word: i for i, word in enumerate((*SPECIALS, *words))}
    if len(vocabulary) != len(SPECIALS) + len(words):
        raise ValueError("the words of a vocabulary must all differ")
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return fast_tokenizer(
        tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
        # TransformerLens reloads a tokenizer without these two from its path; this one exists in memory only.
        name_or_path="interp.zoo",
        add_bos_token=True,
        padding_side="right",
    )
