"""Find named spans: messages of a chat, sentences of a text, images."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from interp.errors import PromptError
from interp.prompts.pairs import Prompt, PromptPair
from interp.prompts.ranges import Span

Message = Mapping[str, str]  # {"role": "user", "content": "…"}
P = TypeVar("P", Prompt, PromptPair)

ABBREVIATIONS = {
    "mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "cf", "fig", "eq", "no", "al", "approx",
}  # fmt: skip
MARK = "\ue000\ue0ff\ue000"  # private characters, which neither templates nor messages contain
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
    if not isinstance(text, str):
        raise PromptError(f"sentences are found in a text, and this prompt is token ids: {text!r:.60}")
    return replace(prompt, spans={**prompt.spans, **sentence_spans(text)})


def chat_prompt(tokenizer: Any, messages: Sequence[Message], *, answering: bool = True) -> Prompt:
    """Write a conversation by the tokenizer's chat template.

    Each message's content is a span named by role. A role that occurs more than once is numbered: ``user_1``,
    ``user_2``. ``answering`` opens the assistant's next turn. Where a message stands is found by writing the
    conversation again with another text in its place, so that words of the template are never taken for a message.
    Raises PromptError if the tokenizer has no template, or if it drops, repeats or rewrites a message.
    """
    for message in messages:
        is_message = isinstance(message, Mapping) and {"role", "content"} <= set(message)
        if not is_message or not isinstance(message["content"], str):
            raise PromptError(f"a message is {{'role': …, 'content': a text}}, got {message!r:.80}")
    if not messages or not getattr(tokenizer, "chat_template", None):
        raise PromptError("a chat needs at least one message and a tokenizer that has a chat template")

    def write(conversation: Sequence[Message]) -> str:
        return _written(tokenizer, conversation, answering)

    text = write(messages)
    counts = Counter(m["role"] for m in messages)
    seen: Counter[str] = Counter()
    spans: dict[str, Span] = {}
    for i, message in enumerate(messages):
        role = message["role"]
        seen[role] += 1
        name = role if counts[role] == 1 else f"{role}_{seen[role]}"
        place = _place_of_message(write, messages, i, text)
        if place is None:
            raise PromptError(
                f"the chat template does not show the {name} message {message['content']!r:.60} once, as it was written"
            )
        spans[name] = place
    return Prompt(text, spans)


def _written(tokenizer: Any, messages: Sequence[Message], answering: bool) -> str:
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # a template raises what it likes, jinja2's errors among them
        raise PromptError(f"the chat template refuses these messages: {error}") from error


def _place_of_message(
    write: Callable[[Sequence[Message]], str], messages: Sequence[Message], index: int, text: str
) -> Span | None:
    """Return the range of one message's content (without space around it) in the conversation's ``text``.

    None if the template does not show it once as it was written.
    """
    content = messages[index]["content"]
    for mark in (MARK, MARK + content + MARK):  # some templates look at what a message says
        marked = [{**m, "content": mark} if i == index else m for i, m in enumerate(messages)]
        try:
            pieces = write(marked).split(MARK)
        except PromptError:
            continue
        if len(pieces) != len(mark.split(MARK)):  # dropped or repeated
            continue
        before, after = pieces[0], pieces[-1]
        shown = text[len(before) : len(text) - len(after)]
        is_same = text.startswith(before) and text.endswith(after) and len(before) + len(after) <= len(text)
        if is_same and content.strip() and shown.strip() == content.strip():
            start = len(before) + len(shown) - len(shown.lstrip())
            return start, start + len(content.strip())
    return None


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
