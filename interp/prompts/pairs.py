"""Prompts that can be compared: pairs, facts with a subject, named spans.

`PromptPair` and `Fact` hold plain text. `encode_pairs` and `encode_facts` turn them into aligned token ids for one
tokenizer; they raise PromptError, with an explanation, for prompts that cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from interp.errors import PromptError
from interp.utils.html_card import card

Span = tuple[int, int]  # [start, stop) in characters of the text, or in tokens once encoded


@dataclass(frozen=True)
class Prompt:
    """One text with named spans by character range.

    `interp.spans` makes them from chats and sentences.
    """

    text: str
    spans: Mapping[str, Span] = field(default_factory=dict)

    def span(self, name: str, words: str | None = None, *, occurrence: int = 0) -> Prompt:
        """Return a copy in which ``words`` (default: the name itself) is a named span."""
        return Prompt(self.text, {**self.spans, name: find_span(self.text, words or name, occurrence)})

    def token_spans(self, coder: Coder) -> dict[str, Span]:
        """The spans as token ranges of one tokenizer (``model.coder``)."""
        return token_spans(self.spans, coder.offsets(self.text))


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupt prompt of equal token length, answer and foil.

        pair = interp.PromptPair("Paris is in", "Rome is in", " France", " Italy")
        pair = pair.span("city", "Paris")
        effects = interp.patch(model, pair, model.sites("resid_pre", positions="each"))

    Answer and foil are single tokens, written with their leading space. ``spans`` names stretches of the clean text by
    character range, e.g. ``{"subject": (4, 16)}``; `span` adds one by its words.
    """

    clean: str
    corrupt: str
    answer: str
    foil: str | None = None
    spans: Mapping[str, Span] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        spans = ", ".join(f"{name}: {str(self.clean)[a:b]!r}" for name, (a, b) in self.spans.items())
        facts = {"clean": self.clean, "corrupt": self.corrupt, "answer": repr(self.answer), "foil": repr(self.foil)}
        return card("PromptPair", {**facts, "spans": spans or "–"})

    def span(self, name: str, words: str | None = None, *, occurrence: int = 0) -> PromptPair:
        """Return a copy in which ``words`` of the clean text are a named span.

        ``words`` defaults to the name itself.
        """
        return PromptPair(
            self.clean, self.corrupt, self.answer, self.foil,
            {**self.spans, name: find_span(self.clean, words or name, occurrence)},
        )  # fmt: skip


@dataclass(frozen=True)
class Fact:
    """A prompt that a fact completes, for causal tracing.

    For example ``Fact("… Paris is in", "Paris", " France")``.
    """

    prompt: str
    subject: str
    answer: str

    @property
    def subject_span(self) -> Span:
        """Character range of the subject in the prompt (its first occurrence)."""
        return find_span(self.prompt, self.subject)


def find_span(text: str, words: str, occurrence: int = 0) -> Span:
    """Find the character range of an occurrence of ``words``.

    Raises PromptError if it does not exist.
    """
    start = -1
    for _ in range(occurrence + 1):
        start = text.find(words, start + 1)
        if start < 0:
            raise PromptError(f"{words!r} (occurrence {occurrence}) is not in the prompt {text!r}")
    return start, start + len(words)


class PairSet(Sequence[PromptPair]):
    """An immutable list of PromptPairs, with its task's name and seed."""

    def __init__(self, pairs: Iterable[PromptPair], *, task: str = "custom", seed: int | None = None):
        self._pairs = tuple(pairs)
        self.task = task
        self.seed = seed

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> PromptPair: ...
    @overload
    def __getitem__(self, index: slice) -> PairSet: ...
    def __getitem__(self, index: int | slice) -> PromptPair | PairSet:
        if isinstance(index, slice):
            return PairSet(self._pairs[index], task=self.task, seed=self.seed)
        return self._pairs[index]

    def __iter__(self) -> Iterator[PromptPair]:
        return iter(self._pairs)

    def __repr__(self) -> str:
        first = f"; first: {self[0].clean!r} → {self[0].answer!r}" if self._pairs else ""
        return f"PairSet({self.task}, {len(self)} pairs{first})"


@dataclass(frozen=True)
class Encoded:
    """One prompt (or aligned pair) as token ids of one tokenizer.

    ``spans`` are token ranges. For a `Fact` the corrupt ids equal the clean ones; noise is added later.
    ``changed_from``: the first position whose input differs although the ids agree (where another image begins).
    """

    clean: tuple[int, ...]
    corrupt: tuple[int, ...]
    answer: int
    foil: int | None
    tokens: tuple[str, ...]
    spans: Mapping[str, Span]
    changed_from: int | None = None

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def first_difference(self) -> int:
        """First position at which clean and corrupt differ.

        Returns their length if they are the same.
        """
        first = first_difference(self.clean, self.corrupt)
        return first if self.changed_from is None else min(first, self.changed_from)

    def role(self, position: int) -> str:
        """Name of the shortest span that covers a token, or ''."""
        inside = [(b - a, name) for name, (a, b) in self.spans.items() if a <= position < b]
        return min(inside)[1] if inside else ""


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """First index at which two equally long rows of token ids differ.

    Returns their length if they are the same.
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


@dataclass(frozen=True)
class Coder:
    """The functions of a tokenizer that encoding needs; `Model.coder` provides them.

    ``encode(text)`` gives ids with the model's usual special tokens; ``texts(ids)`` gives one string per
    token; ``offsets(text)`` the character range of each token of ``encode(text)``, (0, 0) for specials;
    ``continuation(text)`` the ids of a continuation, without special tokens. ``encode_image_pair(index, pair)``
    encodes a pair of prompts with images, for a model that reads images. ``unknown``: the id that stands for every word
    that the vocabulary lacks; None if it can spell all words.
    """

    encode: Callable[[str], list[int]]
    texts: Callable[[Sequence[int]], list[str]] = field(repr=False)
    offsets: Callable[[str], list[Span]] = field(repr=False)
    continuation: Callable[[str], list[int]] = field(repr=False)
    encode_image_pair: Callable[[int, PromptPair], Encoded] | None = field(default=None, repr=False)
    unknown: int | None = None


def listed_prompts(prompts: Any) -> list[Any]:
    """Return one prompt, or several, as a list; PromptError for anything else."""
    if isinstance(prompts, PromptPair | Fact):
        return [prompts]
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise PromptError(f"PromptPairs (or, for tracing, Facts) expected, got {prompts!r:.80}")
    return list(prompts)


def encode_pairs(pairs: PromptPair | Iterable[PromptPair], coder: Coder) -> list[Encoded]:
    """Tokenise and check every pair.

    A PromptError names the pair and shows both tokenisations.
    """
    pair_list = listed_prompts(pairs)
    if not pair_list:
        raise PromptError("there are no prompt pairs: pass at least one PromptPair")
    wrong = next((p for p in pair_list if not isinstance(p, PromptPair)), None)
    if wrong is not None:
        raise PromptError(f"expected PromptPair objects, got {type(wrong).__name__}: {wrong!r:.80}")
    return [_encode_pair(i, pair, coder) for i, pair in enumerate(pair_list)]


def _encode_pair(index: int, pair: PromptPair, coder: Coder) -> Encoded:
    if coder.encode_image_pair is not None and not isinstance(pair.clean, str):
        return coder.encode_image_pair(index, pair)
    clean, corrupt = (_nonempty(text, coder) for text in (pair.clean, pair.corrupt))
    if len(clean) != len(corrupt):
        raise PromptError(
            f"pair {index}: clean and corrupt have different lengths ({len(clean)} and {len(corrupt)} tokens), "
            "so positions do not correspond. Reword one of them; the tokens, side by side:\n"
            + _side_by_side(coder.texts(clean), coder.texts(corrupt))
        )
    answer = single_token(pair.answer, coder, f"pair {index}: answer")
    foil = None if pair.foil is None else single_token(pair.foil, coder, f"pair {index}: foil")
    if answer == foil:
        raise PromptError(f"pair {index}: answer and foil are the same token {pair.answer!r}")
    spans = token_spans(pair.spans, coder.offsets(pair.clean))
    return Encoded(tuple(clean), tuple(corrupt), answer, foil, tuple(coder.texts(clean)), spans)


def encode_facts(facts: Fact | Iterable[Fact], coder: Coder) -> list[Encoded]:
    """Tokenise facts; each gets the token span ``subject``."""
    fact_list = listed_prompts(facts)
    if not fact_list:
        raise PromptError("there are no facts: pass at least one Fact(prompt, subject, answer)")
    encoded = []
    for i, fact in enumerate(fact_list):
        if not isinstance(fact, Fact):
            raise PromptError(f"expected Fact objects, got {type(fact).__name__}: {fact!r:.80}")
        ids = _nonempty(fact.prompt, coder)
        answer = single_token(fact.answer, coder, f"fact {i}: answer")
        spans = token_spans({"subject": fact.subject_span}, coder.offsets(fact.prompt))
        encoded.append(Encoded(tuple(ids), tuple(ids), answer, None, tuple(coder.texts(ids)), spans))
    return encoded


def encode_any(prompts: Sequence[PromptPair | Fact], coder: Coder) -> tuple[list[Encoded], bool]:
    """Tokenise pairs or facts.

    Returns also whether they are pairs. Raises PromptError for a mixture.
    """
    facts = [p for p in prompts if isinstance(p, Fact)]
    if facts and len(facts) < len(prompts):
        raise PromptError("give PromptPairs or Facts, not both in one call")
    return (encode_facts(facts, coder), False) if facts else (encode_pairs(prompts, coder), True)  # type: ignore[arg-type]


def single_token(text: str, coder: Coder, what: str) -> int:
    """Return the id of a continuation that must be exactly one token.

    Raises PromptError otherwise.
    """
    ids = coder.continuation(text) if isinstance(text, str) else []
    if ids == [coder.unknown] and coder.texts(ids) != [text]:
        raise PromptError(f"{what} {text!r} is not in the model's vocabulary: choose another word")
    if len(ids) == 1:
        return ids[0]
    if not isinstance(text, str):
        raise PromptError(f"{what} must be a word, with its leading space, got {text!r}")
    hint = "" if text.startswith(" ") else f" (did you mean {' ' + text!r}, with a leading space?)"
    raise PromptError(
        f"{what} {text!r} is {len(ids)} tokens {coder.texts(ids)}, but must be exactly one{hint}. "
        "Metrics read one next-token logit; choose another word."
    )


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


def _nonempty(text: str, coder: Coder) -> list[int]:
    if not isinstance(text, str) or not text:
        raise PromptError(f"a prompt must be a non-empty string, got {text!r}")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise PromptError(f"{text!r:.80} holds half of a character (a lone surrogate), which no tokenizer reads")
    return coder.encode(text)


def _side_by_side(left: Sequence[str], right: Sequence[str]) -> str:
    """Write two tokenisations as an aligned table with differing rows marked."""
    width = max([5, *(len(repr(t)) for t in left)])
    rows = [f"  {'':>3}  {'clean':<{width}}  corrupt"]
    for i in range(max(len(left), len(right))):
        a, b = (repr(x[i]) if i < len(x) else "—" for x in (left, right))
        rows.append(f"{'*' if a != b else ' '} {i:>3}  {a:<{width}}  {b}")
    return "\n".join(rows)
