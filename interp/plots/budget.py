"""Fit a page into its size by adding examples until the budget is used.

The page states what was left out.

Means, intervals, tables of effects and circuits are always complete. Attention makes a page large: statistics of every
head at every token, and patterns. The page contains a few examples of these; the result files contain all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from interp.plots import payload
from interp.plots.pattern_payload import encode_pattern_example, expected_bytes
from interp.results.attention_patterns import AttentionPatterns
from interp.results.attention_stats import AttentionStats

SHORT_BYTES, LONG_BYTES = 1_500_000, 5_000_000
LONG_TOKENS = 64  # with longer prompts a page may be larger, and its maps may be made smaller
# Ways to make patterns smaller: (factor by which maps are coarser, levels of √p, largest weights of each query). Levels
# are reduced first: readers distinguish few colours, but they see coarse maps.
REDUCTIONS = (
    (1, 256, 99), (1, 32, 99), (1, 16, 99), (1, 16, 4), (2, 256, 4), (2, 32, 4), (4, 256, 1), (4, 32, 0),
)  # fmt: skip
SHARE = 0.8  # of the remaining budget, for the patterns of one prompt if the page contains statistics too


def default_bytes(results: list[Any]) -> int:
    """Return 5 MB if a prompt has more than 64 tokens, else 1.5 MB."""
    lengths = [e.n_tokens for r in results if isinstance(r, AttentionPatterns) for e in r.examples]
    lengths += [len(t) for r in results if isinstance(r, AttentionStats) for t in r.tokens]
    return LONG_BYTES if max(lengths, default=0) > LONG_TOKENS else SHORT_BYTES


def add_examples(results: list[Any], encoded: list[dict[str, Any]], n_bytes: int) -> None:
    """Fill ``examples`` of encoded results in turns while they fit, at least one each."""
    attention = [
        (r, d) for r, d in zip(results, encoded, strict=True) if isinstance(r, AttentionStats | AttentionPatterns)
    ]
    attention.sort(key=lambda item: isinstance(item[0], AttentionStats))  # patterns first; statistics fill the rest
    for i in range(max((len(r) for r, _ in attention), default=0)):
        for result, data in attention:
            if i >= len(result) or len(data["examples"]) < i:
                continue
            share = SHARE if isinstance(result, AttentionPatterns) and len(attention) > 1 else 1.0
            versions = _versions(result, i, share * n_bytes)
            example, size = _largest_that_fits(versions, share * n_bytes, is_required=i == 0)
            if example is not None:
                data["examples"].append(example)
                n_bytes -= size


def _largest_that_fits(
    versions: Iterator[Callable[[], dict[str, Any]]], n_bytes: float, is_required: bool
) -> tuple[dict[str, Any] | None, int]:
    """Return the first version of an example that fits, and its size.

    If none fits, return the last version of an example that is required. Other examples are complete or left out.
    """
    example, size = None, 0
    for encode_version in versions:
        example = encode_version()
        size = len(payload.dump(example)) + 1
        if size <= n_bytes:
            return example, size
        if not is_required:
            return None, 0
    return example, size


def _versions(
    result: AttentionStats | AttentionPatterns, i: int, n_bytes: float
) -> Iterator[Callable[[], dict[str, Any]]]:
    """Yield functions that encode an example in full, then with less and less detail."""
    if isinstance(result, AttentionPatterns):
        reductions = REDUCTIONS if result.examples[i].n_tokens > LONG_TOKENS else REDUCTIONS[:1]
        for reduction in reductions:
            if reduction != reductions[-1] and expected_bytes(result, i, *reduction) > n_bytes:
                continue  # encoding all maps takes seconds, so the size is estimated from a few of them
            yield partial(encode_pattern_example, result, i, *reduction)
    else:
        every = 1
        while every == 1 or every <= len(result.tokens[i]) // 64:
            yield partial(payload.encode_example, result, i, every)
            every *= 2


def sizes_of(encoded: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Return name and bytes of each result in the page, largest first."""
    sizes = [(f"result {i} ({d.get('name') or d['kind']})", len(payload.dump(d))) for i, d in enumerate(encoded, 1)]
    return sorted(sizes, key=lambda item: -item[1])
