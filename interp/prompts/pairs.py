"""Prompts that can be compared: pairs, facts with a subject, named spans.

`PromptPair` and `Fact` hold plain text. `encode_pairs` and `encode_facts` turn them into aligned token ids for one
tokenizer; they raise PromptError, with an explanation, for prompts that cannot be compared.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

from interp.errors import PromptError
from interp.prompts.answers import answer_ids
from interp.prompts.coder import Coder, Encoded
from interp.prompts.embeddings import Embeddings, first_changed
from interp.prompts.listing import TokenIds, check_text, listed
from interp.prompts.model_input import as_hashable
from interp.prompts.ranges import Span, check_token_ranges, find_all, find_span, find_subject, find_words, token_spans
from interp.utils.html_card import card

log = logging.getLogger("interp")

MOST_SHOWN = 10  # problems that one message describes
Align = Literal["position", "span"]
PairLengths = Align | Literal["declared"]
Encode = Callable[[int, Any, Coder, list[str]], Encoded]


@dataclass(frozen=True)
class Prompt:
    """One text with named spans by character range; or token ids with spans by token range.

    `interp.spans` makes them from chats and sentences.
    """

    text: str
    spans: Mapping[str, Span] = field(default_factory=dict)

    def span(self, name: str, words: str | None = None, *, occurrence: int | None = None) -> Prompt:
        """Return a copy in which ``words`` (default: the name itself) is a named span; see `PromptPair.span`."""
        text = _words_only(self.text, name)
        return Prompt(self.text, {**self.spans, name: _named_span(text, name, words, occurrence)})

    def token_spans(self, coder: Coder) -> dict[str, Span]:
        """The spans as token ranges of one tokenizer (``model.coder``)."""
        return _token_ranges(self.spans, text_of(self), coder)


@dataclass(frozen=True)
class PromptPair:
    """A clean and a corrupt prompt of equal token length, answer and foil.

        pair = interp.PromptPair("Paris is in", "Rome is in", " France", " Italy")
        pair = pair.span("city", "Paris")
        effects = interp.patch(model, pair, model.sites("resid_pre", positions="each"))

    Answer and foil are written with their leading space (or as token ids): words of one token or of several, which
    recipes read as a whole (`interp.metrics`). Prompts are texts, or token ids with their special tokens. ``spans``
    names stretches of the clean prompt: of a text by character range, e.g. ``{"subject": (4, 16)}`` (`span` adds one by
    its words), of token ids by token range, ``{"subject": (1, 4)}``. ``corrupt_spans`` names those of the corrupt
    prompt, for `interp.patch` with ``align="span"``, which alone takes prompts of different lengths.
    """

    clean: str
    corrupt: str
    answer: str | int | Sequence[int]
    foil: str | int | Sequence[int] | None = None
    spans: Mapping[str, Span] = field(default_factory=dict)
    corrupt_spans: Mapping[str, Span] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        spans = ", ".join(f"{name}: {self.clean[a:b]!r}" for name, (a, b) in self.spans.items())
        facts = {"clean": self.clean, "corrupt": self.corrupt, "answer": repr(self.answer), "foil": repr(self.foil)}
        return card("PromptPair", {**facts, "spans": spans or "–"})

    def span(
        self, name: str, words: str | None = None, *, occurrence: int | None = None, corrupt: str | None = None,
        corrupt_occurrence: int | None = None,
    ) -> PromptPair:  # fmt: skip
        """Return a copy in which ``words`` of the clean text are a named span.

        ``corrupt``: the words that are this span in the corrupt text, with their own occurrence. ``words`` defaults to
        the name itself. Whole words count; only where there are none, parts of longer words. ``occurrence``: which
        place, if the words stand in several: 0 for the first (the default, with a warning), −1 for the last. Raises
        PromptError if the words are not in the text.
        """
        spans = {**self.spans, name: _named_span(_words_only(self.clean, name), name, words, occurrence)}
        if corrupt is None:
            return replace(self, spans=spans)
        place = _named_span(_words_only(self.corrupt, name), name, corrupt, corrupt_occurrence)
        return replace(self, spans=spans, corrupt_spans={**self.corrupt_spans, name: place})


def _words_only(text: Any, name: str) -> str:
    """Return a text; raise PromptError for token ids, which have no words to name a span by."""
    if not isinstance(text, str):
        raise PromptError(
            f"span {name!r}: the prompt is token ids, in which no words can be found: name its range of tokens, "
            f"spans={{{name!r}: (start, stop)}}"
        )
    return text


def _named_span(text: str, name: str, words: str | None, occurrence: int | None) -> Span:
    words = words or name
    if occurrence is None and (n := len(find_words(text, words) or find_all(text, words))) > 1:
        log.warning(
            "%r stands %d times in the prompt %.60r, and span %r is the first of them: say which with occurrence=0, 1, "
            "… or -1; in a .jsonl file with [%s, -1]", words, n, text, name, json.dumps(words),
        )  # fmt: skip
    return find_span(text, words, occurrence or 0)


@dataclass(frozen=True)
class Fact:
    """A prompt that a fact completes, for causal tracing.

        interp.Fact("The Eiffel Tower is in the city of", "Eiffel Tower", " Paris")
        interp.Fact("In Paris, the mayor of Paris is", "Paris", " Anne", occurrence=-1)

    ``subject``: whole words of the prompt. ``occurrence``: which of them, if they stand in several places: 0 for the
    first, −1 for the last.
    """

    prompt: str
    subject: str
    answer: str | int | Sequence[int]
    occurrence: int | None = None

    @property
    def subject_span(self) -> Span:
        """Character range of the subject in the prompt.

        Raises PromptError if it is not there as whole words, or in several places without ``occurrence``.
        """
        return find_subject(self.prompt, self.subject, self.occurrence)


def listed_prompts(prompts: Any, expected: str = "PromptPairs (or, for tracing, Facts)") -> list[Any]:
    """Return one prompt, or several, as a list.

    Which kinds the caller takes is checked later; here they are PromptPair, Fact, Prompt and str.
    Raises PromptError, which names ``expected``, for anything that is no prompt, and for token ids.
    """
    if isinstance(prompts, str):
        raise PromptError(f"{expected} expected, got {prompts!r:.80}")
    return listed(prompts, (PromptPair, Fact, Prompt, str), expected)


def listed_texts(prompts: Any, expected: str = "prompts (strings, Prompts or PromptPairs)") -> list[str | TokenIds]:
    """Return the texts, or token ids, of one prompt or several: of a pair those of its clean prompt.

    Raises PromptError, which names ``expected``, for anything that is no prompt, and if there are none.
    """
    return [text_of(p) for p in listed_of_any_kind(prompts, expected)]


def listed_of_any_kind(prompts: Any, expected: str = "prompts (strings, Prompts or PromptPairs)") -> list[Any]:
    """Return one prompt or several as a list, of those kinds whose ids `encode_prompt` returns.

    Raises PromptError, which names ``expected``, for anything that is no prompt, and if there are none.
    """
    items = listed(prompts, (str, Prompt, PromptPair, Fact), expected, takes_ids=True)
    if not items:
        raise PromptError(f"there are no prompts: {expected} expected")
    return items


def text_of(prompt: Any) -> Any:
    """Return the text, or the token ids, that a model reads of a prompt: of a pair, those of the clean prompt."""
    text = (
        prompt.clean if isinstance(prompt, PromptPair) else getattr(prompt, "prompt", getattr(prompt, "text", prompt))
    )
    return text if isinstance(text, str | TokenIds) else listed(text, (str,), "a text", takes_ids=True)[0]


def encode_prompt(prompt: Any, coder: Coder) -> list[int]:
    """Return the token ids that a model reads of a text, token ids, a Prompt, a Fact or a pair (its clean prompt).

    Inside `Model.edited`, edits find the prompt's named spans.
    """
    ids = coder.encode(text_of(prompt))
    if coder.name is not None:
        coder.name(ids, coder.texts(ids), spans_of(prompt, coder))
    return ids


def spans_of(prompt: Any, coder: Coder) -> dict[str, Span]:
    """Return the named spans of what `encode_prompt` takes as token ranges; of a Fact, its subject."""
    spans = {"subject": prompt.subject_span} if isinstance(prompt, Fact) else getattr(prompt, "spans", {})
    return _token_ranges(spans, text_of(prompt), coder)


def encode_pairs(
    pairs: PromptPair | Iterable[PromptPair], coder: Coder, align: PairLengths = "position", strings: bool = False
) -> list[Encoded]:
    """Tokenise and check every pair.

    ``strings``: answers and foils may be several tokens, which the caller then reads as a whole.
    ``align="span"``: prompts of a pair may differ in length, and `Encoded.corrupt_side` holds the corrupt one's spans.
    ``"declared"``: they may if they name spans of the corrupt prompt.
    A PromptError names all pairs that cannot be used, and shows both tokenisations of the first whose lengths differ.
    """
    pair_list = listed_prompts(pairs)
    if not pair_list:
        raise PromptError("there are no prompt pairs: pass at least one PromptPair")
    wrong = next((p for p in pair_list if not isinstance(p, PromptPair)), None)
    if wrong is not None:
        raise PromptError(f"expected PromptPair objects, got {type(wrong).__name__}: {wrong!r:.80}")
    return _encoded(pair_list, partial(_encode_pair, align=align, strings=strings), coder, "pairs")


def _encoded(prompts: Sequence[Any], encode: Encode, coder: Coder, what: str) -> list[Encoded]:
    """Encode every prompt; raise one PromptError for all that cannot be, log one warning for all notes."""
    encoded, problems, notes = [], [], []
    for i, prompt in enumerate(prompts):
        try:
            encoded.append(encode(i, prompt, coder, notes))
        except PromptError as error:
            problems.append(str(error))
            continue
        if coder.name is None:
            continue
        try:
            one = encoded[-1]
            for ids, side in {one.corrupt: one.corrupt_side or one, one.clean: one}.items():
                coder.name(ids, side.tokens, side.spans)
        except PromptError as error:
            problems.append(f"{what.removesuffix('s')} {i}: {error}")
    if problems:
        raise PromptError(in_one_message(problems, f"{len(problems)} of {len(prompts)} {what} cannot be used"))
    if notes:
        more = f" (and {len(notes) - 1} more like it)" if len(notes) > 1 else ""
        log.warning("%s%s", notes[0], more)
    return encoded


def _encode_pair(
    index: int, pair: PromptPair, coder: Coder, notes: list[str], align: PairLengths = "position", strings: bool = False
) -> Encoded:
    if coder.encode_image_pair is not None and not isinstance(pair.clean, str):
        if align == "span":
            raise PromptError(f'pair {index}: align="span" takes prompts of text or token ids, not images')
        return coder.encode_image_pair(index, pair)
    what = f"pair {index}"
    texts = [_text_or_ids(text, what) for text in (pair.clean, pair.corrupt)]
    clean, corrupt = (coder.encode(text) for text in texts)
    if len(clean) != len(corrupt) and (align == "position" or (align == "declared" and not pair.corrupt_spans)):
        raise PromptError(
            f"{what}: clean and corrupt have different lengths ({len(clean)} and {len(corrupt)} tokens), "
            "so positions do not correspond. Reword one of them, or patch named spans with align='span'; the tokens, "
            "side by side:\n" + _side_by_side(coder.texts(clean), coder.texts(corrupt))
        )
    answer, foil = answer_ids(texts, pair.answer, pair.foil, coder, what, notes, strings)
    spans = _token_ranges(pair.spans, texts[0], coder)
    encoded = _with_answers((clean, corrupt), answer, foil, spans, coder, what)
    if align != "span" and len(clean) == len(corrupt):
        return encoded
    names = _token_ranges(pair.corrupt_spans, texts[1], coder)
    return replace(encoded, corrupt_side=_with_answers((corrupt, corrupt), answer, foil, names, coder, what))


def _with_answers(
    ids: Sequence[Sequence[int]], answer: tuple[int, ...], foil: tuple[int, ...], spans: Mapping[str, Span],
    coder: Coder, what: str,
) -> Encoded:  # fmt: skip
    """Return two prompts with an answer and a foil; PromptError if the model cannot read them behind the prompts."""
    clean, corrupt = map(as_hashable, ids)
    longest = max(answer, foil, key=len)[:-1]
    if longest:
        if isinstance(clean, Embeddings) or isinstance(corrupt, Embeddings):
            raise PromptError(
                f"{what}: its answer or foil is several tokens, which cannot stand behind a prompt of vectors: use one "
                "token"
            )
        try:
            coder.encode(TokenIds((*max(clean, corrupt, key=len), *longest)))
        except PromptError as error:
            raise PromptError(f"{what}, with its answer or foil: {error}") from None
    return Encoded(
        clean, corrupt, answer[0], foil[0] if foil else None, tuple(coder.texts(clean)), spans,
        first_changed(clean, corrupt), answer_rest=answer[1:], foil_rest=foil[1:],
    )  # fmt: skip


def _token_ranges(spans: Mapping[str, Span], text: str | TokenIds, coder: Coder) -> dict[str, Span]:
    """Return named spans as token ranges: of token ids they are ranges of tokens already."""
    if isinstance(text, str):
        return token_spans(spans, coder.offsets(text)) if spans else {}
    return check_token_ranges({**getattr(text, "spans", {}), **spans}, len(text))


def encode_facts(facts: Fact | Iterable[Fact], coder: Coder, strings: bool = False) -> list[Encoded]:
    """Tokenise facts; each gets the token span ``subject``. A PromptError names all facts that cannot be used.

    ``strings``: see `encode_pairs`.
    """
    fact_list = listed_prompts(facts)
    if not fact_list:
        raise PromptError("there are no facts: pass at least one Fact(prompt, subject, answer)")
    wrong = next((f for f in fact_list if not isinstance(f, Fact)), None)
    if wrong is not None:
        raise PromptError(f"expected Fact objects, got {type(wrong).__name__}: {wrong!r:.80}")
    return _encoded(fact_list, partial(_encode_fact, strings=strings), coder, "facts")


def _encode_fact(index: int, fact: Fact, coder: Coder, notes: list[str], strings: bool = False) -> Encoded:
    what = f"fact {index}"
    check_text(fact.prompt)
    ids = coder.encode(fact.prompt)
    answer, foil = answer_ids([fact.prompt], fact.answer, None, coder, what, notes, strings)
    spans = token_spans({"subject": fact.subject_span}, coder.offsets(fact.prompt))
    return _with_answers((ids, ids), answer, foil, spans, coder, what)


def encode_any(
    prompts: Sequence[PromptPair | Fact], coder: Coder, align: PairLengths = "position", strings: bool = False
) -> tuple[list[Encoded], bool]:
    """Tokenise pairs or facts.

    ``align``, ``strings``: see `encode_pairs`. Returns also whether they are pairs. Raises PromptError for a mixture.
    """
    facts = [p for p in prompts if isinstance(p, Fact)]
    if facts and len(facts) < len(prompts):
        raise PromptError("give PromptPairs or Facts, not both in one call")
    if facts:
        return encode_facts(facts, coder, strings), False
    return encode_pairs(prompts, coder, align, strings), True  # type: ignore[arg-type]


def _text_or_ids(text: Any, what: str) -> str | TokenIds:
    if isinstance(text, str):
        check_text(text)
        return text
    rows = listed(text, (), f"{what}: a text", takes_ids=True)
    if len(rows) != 1:
        raise PromptError(f"{what}: a non-empty string, or the ids of one prompt, expected, got {len(rows)} prompts")
    return rows[0]


def in_one_message(problems: Sequence[str], headline: str) -> str:
    """Join problems into one message: the first in full, of at most `MOST_SHOWN` others the first line."""
    if len(problems) == 1:
        return problems[0]
    others = [line.split("\n")[0].removesuffix("; the tokens, side by side:") for line in problems[1:MOST_SHOWN]]
    n_more = len(problems) - MOST_SHOWN
    more = [f"… and {n_more} more"] if n_more > 0 else []
    return "\n".join([f"{headline}:", problems[0], *others, *more])


def _side_by_side(left: Sequence[str], right: Sequence[str]) -> str:
    """Write two tokenisations as an aligned table with differing rows marked."""
    width = max([5, *(len(repr(t)) for t in left)])
    rows = [f"  {'':>3}  {'clean':<{width}}  corrupt"]
    for i in range(max(len(left), len(right))):
        a, b = (repr(x[i]) if i < len(x) else "—" for x in (left, right))
        rows.append(f"{'*' if a != b else ' '} {i:>3}  {a:<{width}}  {b}")
    return "\n".join(rows)
