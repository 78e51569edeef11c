"""The token of an answer: the one that continues the prompt at hand.

The same letters are other tokens after other text: "x" is one token after "f(" and another after "the ", and " x" is a
third. So the answer is tokenised together with its prompt, and what follows the prompt's own tokens is read.
"""

from __future__ import annotations

from typing import Any, NoReturn

from interp.errors import PromptError
from interp.prompts.coder import Coder
from interp.prompts.listing import TokenIds


def answer_ids(
    prompt: Any, answer: Any, foil: Any, coder: Coder, what: str, notes: list[str]
) -> tuple[int, int | None]:
    """Return the tokens of answer and foil after a prompt (text or token ids).

    ``what`` names the prompt in messages. ``notes`` receives what a user should know, one sentence each. Raises
    PromptError if one is not a single token, if both are the same, or if only one of two words has a leading space.
    """
    first = next_token(prompt, answer, coder, f"{what}: answer", notes)
    if foil is None:
        return first, None
    second = next_token(prompt, foil, coder, f"{what}: foil", notes)
    _refuse_one_space(prompt, answer, foil, coder, what)
    if first == second:
        raise PromptError(f"{what}: answer and foil are the same token {answer!r}")
    return first, second


def next_token(prompt: Any, text: Any, coder: Coder, what: str, notes: list[str]) -> int:
    """Return the id of a text that must be exactly one token after a prompt; a token id stays as it is.

    Raises PromptError otherwise.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text >= 0:
        return coder.encode(TokenIds((text,)))[0]
    if not isinstance(text, str):
        _refuse(text, what)
    ids, note = (coder.continuation(text), "") if coder.following is None else coder.following(prompt, text)
    if note:
        notes.append(f"{what} {text!r} {note}")
    return _single(text, ids, coder, what)


def single_token(text: Any, coder: Coder, what: str) -> int:
    """Return the id of a continuation of any text that must be exactly one token.

    Raises PromptError otherwise.
    """
    if not isinstance(text, str):
        _refuse(text, what)
    return _single(text, coder.continuation(text), coder, what)


def _single(text: str, ids: list[int], coder: Coder, what: str) -> int:
    if ids == [coder.unknown] and coder.texts(ids) != [text]:
        raise PromptError(f"{what} {text!r} is not in the model's vocabulary: choose another word")
    if len(ids) == 1:
        return ids[0]
    hint = "" if text.startswith(" ") else f" (did you mean {' ' + text!r}, with a leading space?)"
    raise PromptError(
        f"{what} {text!r} is {len(ids)} tokens {coder.texts(ids)}, but must be exactly one{hint}. "
        "Metrics read one next-token logit; choose another word. For the log-probability of several tokens, write them "
        "at the end of both prompts as a span, and read it with metric='seq_logprob' and at= the span's name."
    )


def _refuse(text: Any, what: str) -> NoReturn:
    raise PromptError(f"{what} must be a word, with its leading space, got {text!r:.80} (a token id is taken too)")


def _refuse_one_space(prompt: Any, answer: Any, foil: Any, coder: Coder, what: str) -> None:
    """Raise PromptError for two words of which one alone has a leading space, if the space makes another token."""
    words = [w for w in (answer, foil) if isinstance(w, str) and w.strip()[:1].isalpha()]
    bare = [w for w in words if not w[:1].isspace()]
    if len(words) < 2 or len(bare) != 1 or coder.following is None or not isinstance(prompt, str):
        return
    if coder.following(prompt, bare[0])[0] != coder.following(prompt, f" {bare[0]}")[0]:
        raise PromptError(
            f"{what}: one of answer {answer!r} and foil {foil!r} has a leading space and the other has none, so that "
            "they are tokens of different kinds: a new word, and the rest of the prompt's last word. Write both with "
            "the space, or both without. If you mean it, give token ids: PromptPair(…, answer=1234)"
        )
