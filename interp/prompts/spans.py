"""Find named spans: messages of a chat, sentences of a text, images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from interp.errors import PromptError
from interp.prompts.pairs import Prompt, PromptPair, Span

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
P = TypeVar("P", Prompt, PromptPair)

ABBREVIATIONS = {
    "mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "cf", "fig", "eq", "no", "al", "approx",
}  # fmt: skip
_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+|\n+")


def sentence_spans(text: str) -> dict[str, Span]:
    """Character ranges ``sentence_1``, ``sentence_2``, …, of the sentences.

    They leave out the space between; line ends divide too. A full stop after a common abbreviation, a single initial or
    a list number does not end a sentence.
    """
    ranges: list[Span] = []
    start = 0
    for end in (*_END.finditer(text), None):
        stop = len(text) if end is None else end.end()
        if end is not None and end[0] == "." and _abbreviates(text[start : end.start()]):
            continue
        stripped = text[start:stop].strip()
        if stripped:
            begin = text.index(stripped, start)
            ranges.append((begin, begin + len(stripped)))
        start = stop
    return {f"sentence_{i}": span for i, span in enumerate(ranges, 1)}


def _abbreviates(before: str) -> bool:
    words = before.split()
    last = words[-1].lstrip("([\"'“") if words else ""
    return last.lower() in ABBREVIATIONS or (len(last) == 1 and last.isupper()) or (len(words) == 1 and last.isdigit())


def with_sentences(prompt: P) -> P:
    """Copy a Prompt or PromptPair with every sentence as a named span.

    For a PromptPair these are the sentences of the clean text.
    """
    text = prompt.clean if isinstance(prompt, PromptPair) else prompt.text
    return replace(prompt, spans={**prompt.spans, **sentence_spans(text)})


def chat_prompt(tokenizer: Any, messages: Sequence[Message], *, answering: bool = True) -> Prompt:
    """Write a conversation by the tokenizer's chat template.

    Each message's content is a span named by role. A role that occurs more than once is numbered: ``user_1``,
    ``user_2``. ``answering`` opens the assistant's next turn. Raises PromptError if the tokenizer has no template, or
    if it drops or rewrites a message.
    """
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise PromptError(f"a message is {{'role': …, 'content': …}}, got {message!r:.80}")
    if not messages or not getattr(tokenizer, "chat_template", None):
        raise PromptError("a chat needs at least one message and a tokenizer that has a chat template")
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
    counts = Counter(m["role"] for m in messages)
    seen: Counter[str] = Counter()
    spans: dict[str, Span] = {}
    at = 0
    for message in messages:
        role, content = message["role"], message["content"].strip()
        seen[role] += 1
        name = role if counts[role] == 1 else f"{role}_{seen[role]}"
        start = text.find(content, at)
        if start < 0 or not content:
            raise PromptError(f"the chat template does not show the {name} message {content!r:.60} as it was written")
        at = start + len(content)
        spans[name] = (start, at)
    return Prompt(text, spans)


def chat_pair(
    tokenizer: Any, clean: Sequence[Message], corrupt: Sequence[Message], answer: str, foil: str | None = None
) -> PromptPair:
    """Make a PromptPair of two conversations awaiting the assistant's answer.

    It has the clean conversation's spans.
    """
    first, second = chat_prompt(tokenizer, clean), chat_prompt(tokenizer, corrupt)
    return PromptPair(first.text, second.text, answer, foil, first.spans)


def image_spans(ids: Sequence[int], image_token: int) -> dict[str, Span]:
    """Token ranges of images.

    Each is a run of the placeholder token that a processor inserts for an image: ``image`` for a single one, else
    ``image_1``, ``image_2``, … (adjacent images count as one). Raises PromptError without any.
    """
    runs: list[Span] = []
    for i, token in enumerate(ids):
        if token != image_token:
            continue
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    if not runs:
        raise PromptError(f"no token of the {len(ids)} is the image token {image_token}: was the image given?")
    return {"image": runs[0]} if len(runs) == 1 else {f"image_{i}": run for i, run in enumerate(runs, 1)}
