"""Division of a prompt's tokens into spans, of which no two share a token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from interp.errors import PromptError
from interp.prompts.coder import Coder
from interp.prompts.model_input import ModelInput
from interp.prompts.pairs import spans_of, text_of
from interp.prompts.ranges import Span, token_spans
from interp.prompts.spans import sentence_spans

OTHER = "(other)"  # the tokens that are in none of the spans
KINDS = ("span", "sentence")


@dataclass(frozen=True)
class Division:
    """The spans of one prompt, in the order in which they begin; `OTHER`, if there is one, is the last.

    ``numbers``: for each token the number of its span. ``spans``: all spans that the prompt has, by which tokens can be
    named.
    """

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    spans: Mapping[str, Span] = field(default_factory=dict)

    @property
    def rows(self) -> list[list[int]]:
        """The tokens of each span."""
        of_spans: list[list[int]] = [[] for _ in self.names]
        for row, number in enumerate(self.numbers):
            of_spans[number].append(row)
        return of_spans


def divide(spans: Mapping[str, Span], n_tokens: int, what: str) -> Division:
    """Divide a prompt's tokens by named token ranges; tokens in none of them are the span `OTHER`.

    Raises PromptError, which names ``what``, for spans that share a token, for none, and for one that is named `OTHER`.
    """
    if not spans:
        raise PromptError(
            f"{what} has no named span: name some (Prompt(text).span('question', 'words of it'), interp.spans), or "
            "divide a text by='sentence'"
        )
    if OTHER in spans:
        raise PromptError(f"{what} has a span named {OTHER!r}, which is the name of the tokens in no span: rename it")
    ordered = sorted(spans.items(), key=lambda item: item[1])
    owner = [-1] * n_tokens
    for number, (name, (start, stop)) in enumerate(ordered):
        for row in range(start, stop):
            if owner[row] >= 0:
                raise PromptError(
                    f"{what}: the spans {ordered[owner[row]][0]!r} and {name!r} share token {row}, so that its weight "
                    "would count twice: say with spans=[…] which of the prompt's spans divide it "
                    f"({', '.join(repr(n) for n, _ in ordered)}), and use one call for each division"
                )
            owner[row] = number
    names = [name for name, _ in ordered]
    if -1 in owner:
        owner = [len(names) if number < 0 else number for number in owner]
        names.append(OTHER)
    return Division(tuple(names), tuple(owner))


def division_of(
    prompt: Any, n_tokens: int, coder: Coder, by: str, names: Sequence[str] | None, what: str, first: int = 0
) -> Division:
    """Divide a prompt by its named spans, or ``by`` sentence.

    ``names``: which of the spans (None: all). ``first``: number of tokens in front of those that ``coder`` knows.
    Raises PromptError, which names ``what``, for a prompt that lacks one of the spans, and as `divide` does.
    """
    named = prompt.spans if isinstance(prompt, ModelInput) else spans_of(prompt, coder)
    spans = _sentences(prompt, coder, what) if by == "sentence" else named
    named, spans = ({name: (a + first, b + first) for name, (a, b) in x.items()} for x in (named, spans))
    division = divide(choose(spans, names, what), n_tokens, what)
    return replace(division, spans={**named, **spans})


def choose(spans: Mapping[str, Span], names: Sequence[str] | None, what: str) -> Mapping[str, Span]:
    """Return the spans of these names (None: all).

    Raises PromptError, which names ``what``, for one that it does not have.
    """
    if names is None:
        return spans
    if lacking := [name for name in names if name not in spans]:
        raise PromptError(
            f"{what} has no span {lacking[0]!r}; its spans: {', '.join(map(repr, spans)) or 'none'}. Prompts with "
            "other spans take a call of their own"
        )
    return {name: spans[name] for name in names}


def _sentences(prompt: Any, coder: Coder, what: str) -> dict[str, Span]:
    """The sentences of a text as token ranges; a token that belongs to two is the earlier one's."""
    text = None if isinstance(prompt, ModelInput) else text_of(prompt)
    if not isinstance(text, str):
        raise PromptError(f"{what} is not a text, in which sentences can be found: name its spans, and use by='span'")
    sentences = sentence_spans(text)
    if not sentences:
        raise PromptError(f"{what} holds no sentence: {text!r:.60}")
    ranges = token_spans(sentences, coder.offsets(text))
    spans, end = {}, 0
    for name, (start, stop) in ranges.items():
        start = max(start, end)
        if start < stop:
            spans[name], end = (start, stop), stop
    return spans


def check_names(spans: Iterable[str] | str | None) -> list[str] | None:
    """Return names of spans as a list; None: all spans. Raises PromptError for what names none."""
    if spans is None:
        return None
    names = [spans] if isinstance(spans, str) else list(spans) if isinstance(spans, Iterable) else []
    if isinstance(spans, Mapping) or not names or not all(isinstance(name, str) for name in names):
        raise PromptError(
            f"spans={spans!r:.60}: names of the prompts' spans expected. Prompt(text, spans) says where they are"
        )
    return list(dict.fromkeys(names))
