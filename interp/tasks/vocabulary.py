"""What tasks need of a model, and the single-token words of its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from interp.errors import TaskError
from interp.prompts.coder import Coder
from interp.prompts.pair_set import PairSet
from interp.prompts.pairs import PromptPair
from interp.utils.arguments import is_whole


class TaskModel(Protocol):
    """The part of `interp.Model` that tasks use."""

    @property
    def name(self) -> str:
        """The model's name in messages."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer."""
        ...

    @property
    def coder(self) -> Coder:
        """Text to tokens and back."""
        ...

    def next_token_logits(self, ids: Sequence[Sequence[int]]) -> Any:
        """Logits [prompts, vocab] after each prompt's last token."""
        ...


class TaskPairs(PairSet):
    """A PairSet that also holds what its task could not use with a tokenizer.

    ``dropped``: the words that are not one token; ``refused``: how many draws were not kept, by reason.
    ``split``: "train", "test", or None for all items.
    """

    def __init__(
        self,
        pairs: Iterable[PromptPair],
        *,
        task: str,
        seed: int,
        dropped: Iterable[str] = (),
        split: str | None = None,
        refused: Mapping[str, int] | None = None,
    ):
        super().__init__(pairs, task=task, seed=seed)
        self.dropped, self.split = tuple(dropped), split
        self.refused = dict(refused or {})

    def __repr__(self) -> str:
        note = f"; {len(self.dropped)} words not usable with this tokenizer" if self.dropped else ""
        return f"{super().__repr__()[:-1]}{note})"


def token_of(word: str, coder: Coder) -> int | None:
    """The one token of ``word`` after a space; None if several or unknown."""
    ids = coder.continuation(f" {word}")
    # The text is compared too: an unknown word can be a single token, namely <unk>.
    return ids[0] if len(ids) == 1 and coder.texts(ids)[0].strip() == word else None


def single_tokens(words: Iterable[str], coder: Coder) -> tuple[list[str], list[str]]:
    """Divide words into those that are one token after a space, and the rest.

    Each list keeps their order.
    """
    single: list[str] = []
    dropped: list[str] = []
    for word in words:
        (dropped if token_of(word, coder) is None else single).append(word)
    return single, dropped


def words_of_tokenizer(model: TaskModel, *, fewest: int, most: int) -> list[str]:
    """List lower-case words that are one token after a space.

    They come from the start of the tokenizer's vocabulary. Vocabularies are roughly ordered by frequency, so these are
    common words. Up to ``most`` words of three letters or more; if fewer than ``fewest`` of these exist, shorter ones
    too. Raises TaskError if the total is still below ``fewest``.
    """
    coder = model.coder
    coder.continuation("a")  # raises if there is no tokenizer
    long: list[str] = []
    short: list[str] = []
    for i in range(len(model.tokenizer)):
        word = coder.texts([i])[0].strip()
        if word.isascii() and word.isalpha() and word.islower() and token_of(word, coder) == i:
            (long if len(word) >= 3 else short).append(word)
            if len(long) == most:
                break
    words = long if len(long) >= fewest else long + short
    if len(words) < fewest:
        raise TaskError(
            f"{model.name}: this task needs {fewest} lower-case words that are single tokens after a space, but "
            f"the tokenizer has only {len(words)} among its {len(model.tokenizer)} tokens"
        )
    return words


def check_count(n: int, task: str) -> None:
    """Raise TaskError unless ``n`` is an integer of at least 1."""
    if not is_whole(n, 1):
        raise TaskError(f"{task}: n must be a whole number of at least 1, got {n!r}")
