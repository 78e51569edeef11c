"""Resolve attention masks: layers for one model, rules on token rows for one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from interp.errors import PromptError
from interp.interventions import AttentionMask
from interp.model.layer_masks import LayerMask
from interp.model.mask_rules import Blocks, Closed, Opened, OpenedPast, Rows, Rule, Segments, Strided
from interp.prompts.positions import NamedTokens, token_rows
from interp.sites import Tokens


def mask_rules(mask: AttentionMask, prompt: NamedTokens) -> tuple[Rule, ...]:
    """Return a mask's rules on the token rows of one prompt, without its window.

    Raises PromptError for tokens that the prompt does not have, and for segments and blocks that overlap.
    """
    rules: list[Rule] = []
    for queries, keys in mask.open:
        rules.append(_opened(_rows(queries, prompt, "open"), _rows(keys, prompt, "open"), mask.future))
    if mask.prefix is not None:
        rows = token_rows(mask.prefix, prompt, f"AttentionMask(prefix={mask.prefix!r})")
        rules.append(Opened(rows, rows))
    if isinstance(mask.blocks, int):
        rules.append(Blocks(mask.blocks))
    elif mask.blocks is not None:
        rules.append(Blocks(_spans(mask.blocks, prompt, "blocks")))
    for queries, keys in mask.close:
        rules.append(Closed(_rows(queries, prompt, "close"), _rows(keys, prompt, "close")))
    if mask.segments is not None:
        rules.append(Segments(_segments(mask, prompt), frozenset(mask.sees), len(prompt.tokens) - 1))
    if mask.stride is not None:
        rules.append(Strided(mask.stride, mask.window))
    return tuple(rules)


def layer_masks(mask: AttentionMask, layers: Iterable[int], prompt: NamedTokens) -> list[LayerMask]:
    """Return a mask's changes of several layers for one prompt; none if it changes no row."""
    changed = LayerMask(0, mask, mask_rules(mask, prompt), len(prompt.tokens))
    return [LayerMask(layer, mask, changed.rules, changed.length) for layer in layers] if changed.rows else []


def _rows(tokens: Tokens | None, prompt: NamedTokens, field: str) -> Rows | None:
    if tokens is None:
        return None
    rows = token_rows(tokens, prompt, f"AttentionMask({field}={tokens!r})")
    return None if len(rows) == len(prompt.tokens) else rows


def _opened(queries: Rows | None, keys: Rows | None, future: bool | None) -> Rule:
    """One pair of ``open``: both directions, or only keys that do not come after the query."""
    shares = queries is None or keys is None or not set(queries).isdisjoint(keys)
    is_same = queries == keys or (queries is not None and keys is not None and set(queries) == set(keys))
    opens_later = (not shares or is_same) if future is None else future
    return Opened(queries, keys) if opens_later else OpenedPast(queries, keys)


def _spans(spans: Sequence[Tokens], prompt: NamedTokens, field: str) -> tuple[Rows, ...]:
    rows = tuple(token_rows(span, prompt, f"AttentionMask({field}=…), {span!r}") for span in spans)
    seen: set[int] = set()
    for span, tokens in zip(spans, rows, strict=True):
        if not seen.isdisjoint(tokens):
            raise PromptError(f"AttentionMask({field}=…): {span!r} shares tokens with another of them")
        seen.update(tokens)
    return rows


def _segments(mask: AttentionMask, prompt: NamedTokens) -> tuple[Rows, ...]:
    assert mask.segments is not None  # the caller has asked
    if not mask.numbers_tokens:
        return _spans(mask.segments, prompt, "segments")
    n = len(prompt.tokens)
    if len(mask.segments) != n:
        raise PromptError(
            f"AttentionMask(segments=…) numbers {len(mask.segments)} tokens, and the prompt has {n}: "
            f"{list(prompt.tokens)}"
        )
    return tuple(tuple(i for i, s in enumerate(mask.segments) if s == number) for number in range(mask.n_segments))
