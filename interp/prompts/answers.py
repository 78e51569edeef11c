"""The tokens of an answer: those that continue the prompt at hand.

The same letters are other tokens after other text: "x" is one token after "f(" and another after "the ", and " x" is a
third. So the answer is tokenised together with its prompt, and what follows the prompt's own tokens is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NoReturn

from interp.errors import PromptError
from interp.prompts.coder import Coder, Following
from interp.prompts.listing import TokenIds

Ids = tuple[int, ...]
_NEXT_TOKEN = "one next-token logit is read here, so choose another word"


def answer_ids(
    prompts: Sequence[Any], answer: Any, foil: Any, coder: Coder, what: str, notes: list[str], several: bool = False
) -> tuple[Ids, Ids]:
    """Return the tokens of answer and foil after each of the prompts (texts or token ids); () without a foil.

    ``several``: whether they may be several tokens, which must then be the same after each of the prompts. ``what``
    names the first prompt in messages. ``notes`` receives what a user should know, one sentence each. Raises
    PromptError for an answer or foil that cannot be read, if both are the same, or if only one of two words has a
    leading space.
    """
    first = _tokens(prompts, answer, coder, f"{what}: answer", notes, several)
    if foil is None:
        return first, ()
    second = _tokens(prompts, foil, coder, f"{what}: foil", notes, several)
    _refuse_one_space(prompts[0], answer, foil, coder, what)
    if first == second:
        tokens = f"the same token {answer!r}" if len(first) == 1 else f"the same tokens {coder.texts(first)}"
        raise PromptError(f"{what}: answer and foil are {tokens}")
    if all(a is None or b is None or a == b for a, b in zip_longest(first, second)):
        longer, shorter = (answer, foil) if len(first) > len(second) else (foil, answer)
        notes.append(f"{what}: {longer!r} begins with {shorter!r}, and so it is never the more probable of the two")
    return first, second


def _tokens(prompts: Sequence[Any], text: Any, coder: Coder, what: str, notes: list[str], several: bool) -> Ids:
    """Return the ids of a text (or of token ids, which stay as they are) after each of the prompts."""
    if not isinstance(text, str):
        return _token_ids(text, coder, what, several)
    following = _following(prompts[0], text, coder)
    if len(following.ids) == 1 or not several or coder.one_token:
        ids: Ids = (_single(text, following.ids, coder, what, coder.one_token if several else _NEXT_TOKEN),)
    else:
        ids = tuple(following.ids)
        _check_string(prompts, text, following, coder, what)
    if following.note:
        notes.append(f"{what} {text!r} {following.note}")
    return ids


def _token_ids(given: Any, coder: Coder, what: str, several: bool) -> Ids:
    ids = [given] if isinstance(given, int) else given
    is_list = isinstance(ids, list | tuple) and len(ids) > 0
    if not is_list or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        _refuse(given, what)
    if len(ids) > 1 and (coder.one_token or not several):
        raise PromptError(_not_one(given, ids, coder, what, coder.one_token if several else _NEXT_TOKEN))
    return tuple(coder.encode(TokenIds((i,)))[0] for i in ids)


def _following(prompt: Any, text: str, coder: Coder) -> Following:
    return Following(coder.continuation(text)) if coder.following is None else coder.following(prompt, text)


def _check_string(prompts: Sequence[Any], text: str, following: Following, coder: Coder, what: str) -> None:
    """Raise PromptError for an answer of several tokens, or none, that are not clearly those after the prompts."""
    if not following.ids:
        raise PromptError(f"{what} {text!r} has no tokens")
    if coder.unknown is not None and coder.unknown in following.ids:
        raise PromptError(
            f"{what} {text!r} is the tokens {coder.texts(following.ids)}, and not all of its words are in the model's "
            "vocabulary: choose other words"
        )
    if not following.is_exact:
        raise PromptError(
            f"{what} {text!r} is several tokens that depend on the prompt: it {following.note}. Begin the answer where "
            "a token begins (with its leading space, say), or give token ids"
        )
    for other in prompts[1:]:
        there = _following(other, text, coder)
        if there.ids != following.ids or not there.is_exact:
            raise PromptError(
                f"{what} {text!r} is the tokens {coder.texts(following.ids)} after the clean prompt and others, "
                f"{coder.texts(there.ids)}, after the corrupt one: give token ids"
            )


def single_token(text: Any, coder: Coder, what: str) -> int:
    """Return the id of a continuation of any text that must be exactly one token.

    Raises PromptError otherwise.
    """
    if not isinstance(text, str):
        _refuse(text, what)
    return _single(text, coder.continuation(text), coder, what, _NEXT_TOKEN)


def _single(text: str, ids: list[int], coder: Coder, what: str, why: str) -> int:
    if ids == [coder.unknown] and coder.texts(ids) != [text]:
        raise PromptError(f"{what} {text!r} is not in the model's vocabulary: choose another word")
    if len(ids) == 1:
        return ids[0]
    raise PromptError(_not_one(text, ids, coder, what, why))


def _not_one(given: Any, ids: Sequence[int], coder: Coder, what: str, why: str) -> str:
    hint = ""
    if isinstance(given, str) and not given.startswith(" "):
        hint = f" (did you mean {' ' + given!r}, with a leading space?)"
    return f"{what} {given!r} is {len(ids)} tokens {coder.texts(ids)}, but must be exactly one{hint}: {why}"


def _refuse(text: Any, what: str) -> NoReturn:
    raise PromptError(
        f"{what} must be text, with its leading space, got {text!r:.80} (a token id, or a list of them, is taken too)"
    )


def _refuse_one_space(prompt: Any, answer: Any, foil: Any, coder: Coder, what: str) -> None:
    """Raise PromptError for two words of which one alone has a leading space, if the space makes another token."""
    words = [w for w in (answer, foil) if isinstance(w, str) and w.strip()[:1].isalpha()]
    bare = [w for w in words if not w[:1].isspace()]
    if len(words) < 2 or len(bare) != 1 or coder.following is None or not isinstance(prompt, str):
        return
    if coder.following(prompt, bare[0]).ids != coder.following(prompt, f" {bare[0]}").ids:
        raise PromptError(
            f"{what}: one of answer {answer!r} and foil {foil!r} has a leading space and the other has none, so that "
            "they are tokens of different kinds: a new word, and the rest of the prompt's last word. Write both with "
            "the space, or both without. If you mean it, give token ids: PromptPair(…, answer=1234)"
        )
