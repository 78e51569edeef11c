"""Ranges of characters and of tokens: find words in a text, convert one kind of range to the other."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence

from interp.errors import PromptError

Span = tuple[int, int]  # [start, stop) in characters of the text, or in tokens once encoded

# Scripts that do not put spaces between words, besides the wide characters of Chinese, Japanese and Korean.
UNSPACED = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF))  # Thai and Lao, Burmese, Khmer


def find_words(text: str, words: str) -> list[Span]:
    """Find every place where ``words`` stand in a text as whole words, not as parts of longer ones."""
    return [(a, b) for a, b in find_all(text, words) if _is_edge(text, a) and _is_edge(text, b)]


def find_all(text: str, words: str) -> list[Span]:
    """Find every place where ``words`` stand in a text, also inside longer words; places may overlap."""
    places, start = [], text.find(words) if words else -1
    while start >= 0:
        places.append((start, start + len(words)))
        start = text.find(words, start + 1)
    return places


def find_span(text: str, words: str, occurrence: int = 0) -> Span:
    """Find the character range of an occurrence of ``words``, counted from 0 (or from the end, −1).

    Whole words count; only if there are none, parts of longer words. Raises PromptError if it does not exist.
    """
    places = find_words(text, words) or find_all(text, words)
    return _chosen(places, text, words, occurrence)


def find_subject(text: str, words: str, occurrence: int | None = None) -> Span:
    """Find the character range of whole ``words``: the only one, or the given occurrence.

    Raises PromptError, which says where the words are, if they stand in several places and ``occurrence`` is None, or
    only inside longer words.
    """
    places = find_words(text, words)
    if not places and (inside := find_all(text, words)):
        longer = sorted({_word_around(text, *place) for place in inside})
        raise PromptError(
            f"{words!r} stands in {text!r} only inside a longer word: {', '.join(map(repr, longer[:5]))}. "
            "A subject is whole words"
        )
    if occurrence is None and len(places) > 1:
        raise PromptError(
            f"{words!r} stands {len(places)} times in {text!r}, at characters {', '.join(str(a) for a, _ in places)}: "
            "say which with occurrence=0 (the first), 1, … or -1 (the last)"
        )
    return _chosen(places, text, words, occurrence or 0)


def _chosen(places: Sequence[Span], text: str, words: str, occurrence: int) -> Span:
    if not isinstance(occurrence, int) or isinstance(occurrence, bool):
        raise PromptError(f"occurrence={occurrence!r}: a whole number expected, 0 for the first")
    if not -len(places) <= occurrence < len(places):
        raise PromptError(
            f"{words!r} (occurrence {occurrence}) is not in the prompt {text!r}"
            + (f", which holds it {len(places)} times" if places else "")
        )
    return places[occurrence]


def _is_edge(text: str, at: int) -> bool:
    """Whether no word goes on across a place between two characters."""
    return not 0 < at < len(text) or not (_joins(text[at - 1]) and _joins(text[at]))


def _joins(character: str) -> bool:
    """Whether a character is part of a word in a script that puts spaces between words."""
    if unicodedata.category(character).startswith("M"):
        return True  # an accent of its own belongs to the letter before it
    is_word = character.isalnum() or character == "_"
    is_wide = unicodedata.east_asian_width(character) in "WF"
    return is_word and not is_wide and not any(a <= ord(character) <= b for a, b in UNSPACED)


def continues_word(before: str, after: str) -> bool:
    """Whether two texts, one behind the other, make one word of letters across their boundary."""
    edge = before[-1:] + after[:1]
    return len(edge) == 2 and edge.isalpha() and all(map(_joins, edge))


def _word_around(text: str, start: int, stop: int) -> str:
    while not _is_edge(text, start):
        start -= 1
    while not _is_edge(text, stop):
        stop += 1
    return text[start:stop]


def check_token_ranges(spans: Mapping[str, Span], n_tokens: int) -> dict[str, Span]:
    """Return named token ranges. Raises PromptError for one that is not a range of a prompt's tokens."""
    for name, span in spans.items():
        is_range = isinstance(span, Sequence) and len(span) == 2 and all(type(x) is int for x in span)
        if not is_range or not 0 <= span[0] < span[1] <= n_tokens:
            raise PromptError(f"span {name!r} is {span!r:.60}: a range (start, stop) of the {n_tokens} tokens expected")
    return {name: (start, stop) for name, (start, stop) in spans.items()}


def token_spans(spans: Mapping[str, Span], offsets: Sequence[Span]) -> dict[str, Span]:
    """Convert character ranges to token ranges.

    A range includes every token that overlaps its characters.
    """
    ranges: dict[str, Span] = {}
    for name, (start, stop) in spans.items():
        if not isinstance(start, int) or not isinstance(stop, int):
            raise PromptError(f"span {name!r} is ({start!r}, {stop!r}): the range of its characters expected")
        inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start and b > a]
        if not inside:
            raise PromptError(f"span {name!r} (characters {start} to {stop}) covers no token of its prompt")
        ranges[name] = (inside[0], inside[-1] + 1)
    return ranges
