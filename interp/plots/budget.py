"""What fits in a page: examples are added until it is full, and what was left out is said on it.

Means, intervals, tables of effects and circuits always go in whole. What makes a page large is attention: statistics
of every head at every token, and patterns. A handful of examples shows what there is to see; files keep the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from interp.plots import payload
from interp.plots.pattern_payload import encode_pattern_example, expected_bytes
from interp.results.attention_patterns import AttentionPatterns
from interp.results.attention_stats import AttentionStats

SHORT_BYTES, LONG_BYTES = 1_500_000, 5_000_000
LONG_TOKENS = 64  # a page about longer prompts may be larger, and its maps may lose lines rather than the page a prompt
# What does not fit is made smaller: (times fewer lines of maps, levels of √p, largest weights of each query). Eye and
# colour map tell few levels apart, but see lines.
ALTERNATIVES = (
    (1, 256, 99), (1, 32, 99), (1, 16, 99), (1, 16, 4), (2, 256, 4), (2, 32, 4), (4, 256, 1), (4, 32, 0),
)  # fmt: skip
SHARE = 0.8  # of what is left, that one prompt's patterns may take


def default_bytes(results: list[Any]) -> int:
    """5 MB for prompts of more than 64 tokens, else 1.5 MB."""
    lengths = [e.n_tokens for r in results if isinstance(r, AttentionPatterns) for e in r.examples]
    lengths += [len(t) for r in results if isinstance(r, AttentionStats) for t in r.tokens]
    return LONG_BYTES if max(lengths, default=0) > LONG_TOKENS else SHORT_BYTES


def add_examples(results: list[Any], encoded: list[dict[str, Any]], room: int) -> None:
    """Fill ``examples`` of what `payload.encode` made, in turns, at least one of each result."""
    waiting = [
        (r, d) for r, d in zip(results, encoded, strict=True) if isinstance(r, AttentionStats | AttentionPatterns)
    ]
    waiting.sort(key=lambda item: isinstance(item[0], AttentionStats))  # patterns first: statistics fill what is left
    for i in range(max((len(r) for r, _ in waiting), default=0)):
        for result, data in waiting:
            if i >= len(result) or len(data["examples"]) < i:
                continue
            share = SHARE if isinstance(result, AttentionPatterns) and len(waiting) > 1 else 1.0
            example, size = _largest(_versions(result, i, share * room), share * room, must=i == 0)
            if example is not None:
                data["examples"].append(example)
                room -= size


def _largest(versions: Iterator[Callable[[], dict[str, Any]]], room: float, must: bool) -> tuple[Any, int]:
    """The first version that fits; the last one if something must be shown. Other examples come whole or not at all."""
    example, size = None, 0
    for make in versions:
        example = make()
        size = len(payload.dump(example)) + 1
        if size <= room:
            return example, size
        if not must:
            return None, 0
    return example, size


def _versions(
    result: AttentionStats | AttentionPatterns, i: int, room: float
) -> Iterator[Callable[[], dict[str, Any]]]:
    """An example in full, then with less in it."""
    if isinstance(result, AttentionPatterns):
        ways = ALTERNATIVES if result.examples[i].n_tokens > LONG_TOKENS else ALTERNATIVES[:1]
        for how in ways:
            if how != ways[-1] and expected_bytes(result, i, *how) > room:
                continue  # to encode all maps takes seconds, a few of them tell
            yield lambda how=how: encode_pattern_example(result, i, *how)
    else:
        every = 1
        while every == 1 or every <= len(result.tokens[i]) // 64:
            yield lambda every=every: payload.encode_example(result, i, every)
            every *= 2


def parts(encoded: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Name and bytes of each result in the page, largest first."""
    sizes = [(f"result {i} ({d.get('name') or d['kind']})", len(payload.dump(d))) for i, d in enumerate(encoded, 1)]
    return sorted(sizes, key=lambda item: -item[1])
