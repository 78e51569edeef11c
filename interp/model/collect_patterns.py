"""Collect attention patterns of prompts, tile by tile and never n×n.

They are collected while the model runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import headstats
import numpy as np
import torch
from headstats.patterns import pattern_rows, pooled_pattern, segment_mass
from torch import Tensor

from interp.errors import InterpError, PromptError, SiteError
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend, weight_options
from interp.model.layer_progress import by_layer
from interp.model.loaded_model import LoadedModel
from interp.model.prompt_provenance import prompt_provenance
from interp.prompts.coder import Coder, Encoded
from interp.prompts.embeddings import Embeddings
from interp.prompts.listing import listed
from interp.prompts.pairs import Fact, Prompt, PromptPair, encode_pairs, encode_prompt, text_of
from interp.prompts.ranges import Span
from interp.prompts.spans import sentence_spans
from interp.results.attention_patterns import (
    AttentionPatterns,
    Head,
    PatternExample,
    PatternRun,
    Segment,
    as_head,
    chunked,
    head_name,
    partition,
    roots,
)  # fmt: skip
from interp.sites import Site
from interp.utils.progress import progress

MOST_SEGMENTS = 64


@dataclass(frozen=True)
class PatternRequest:
    """What to store of every layer's attention.

    ``heads``: whose maps. ``exact``: heads with ``topk`` weights per query and ``rows`` whole rows as well.
    """

    heads: list[Head]
    exact: list[Head]
    resolution: int
    topk: int
    rows: int


@torch.no_grad()
def prompt_patterns(
    model: LoadedModel, prompts: Any, heads: Any, exact: Any, resolution: int, topk: int, rows: int
) -> AttentionPatterns:
    """Collect patterns of some heads; see `Model.attention_patterns`."""
    if model.stacks or model.reads != "text":
        raise PromptError(f"{model.name}: attention patterns need a model with one stack that reads text")
    if min(resolution, topk) < 1 or rows < 0:
        raise PromptError(f"resolution={resolution}, topk={topk}, rows={rows}: at least 1, 1 and 0 are expected")
    kinds = (str, Prompt, PromptPair, Fact)
    several = listed(prompts, kinds, "prompts (strings, Prompts or PromptPairs)", takes_ids=True)
    if not several:
        raise PromptError("there are no prompts: pass a string, a PromptPair or a list of them")
    all_heads = [(layer, head) for layer in model.attention_layers for head in range(model.n_heads)]
    map_heads = all_heads if heads is None else _parse_heads(heads, all_heads)
    exact_heads = _parse_heads(exact, all_heads)
    request = PatternRequest(list(dict.fromkeys([*map_heads, *exact_heads])), exact_heads, resolution, topk, rows)
    encoded = [_encoded(model, prompt) for prompt in several]
    examples = []
    with progress("attention patterns", len(several)) as advance:
        for prompt, ids in zip(several, encoded, strict=True):
            with by_layer(model, advance, 1, forwards=2 if isinstance(prompt, PromptPair) else 1):
                examples.append(_example(model, prompt, ids, request))
    provenance = {
        **prompt_provenance(model, [getattr(p, "text", p) for p in several], encoded),
        "pooling": f"largest weight of each cell, at most {resolution} × {resolution} cells",
    }  # fmt: skip
    return AttentionPatterns(request.heads, exact_heads, model.n_layers, model.n_heads, examples, provenance)


def _parse_heads(heads: Iterable[Any], all_heads: Sequence[Head]) -> list[Head]:
    """Read heads written as (layer, head), ``"L9H6"``, a Site or its text.

    SiteError for one that does not exist.
    """
    parsed: list[Head] = []
    for item in [heads] if isinstance(heads, str | Site) else heads:
        head = (-1, -1)
        with suppress(InterpError):
            head = as_head(item)
        if head not in all_heads:
            raise SiteError(f"{str(item)!r} is no head of this model: write (9, 6), 'L9H6' or a site of z, up to "
                            f"{head_name(all_heads[-1])}")  # fmt: skip
        parsed.append(head)
    return list(dict.fromkeys(parsed))


def _encoded(model: LoadedModel, prompt: Any) -> Encoded | list[int]:
    if isinstance(prompt, PromptPair):
        return encode_pairs(prompt, model.coder, strings=True)[0]
    return encode_prompt(prompt, model.coder)


def _spans(prompt: Any, coder: Coder) -> dict[str, Span]:
    if isinstance(prompt, Prompt):
        return prompt.token_spans(coder)
    return dict(prompt.spans) if isinstance(prompt, Embeddings) else {}


def _example(model: LoadedModel, prompt: Any, encoded: Encoded | list[int], request: PatternRequest) -> PatternExample:
    """Collect the patterns of one prompt, or of both prompts of a pair."""
    coder, text = model.coder, text_of(prompt)
    if isinstance(encoded, Encoded):
        ids, spans = {"clean": encoded.clean, "corrupt": encoded.corrupt}, dict(encoded.spans)
    else:
        ids, spans = {"clean": encoded}, _spans(prompt, coder)
    n = len(ids["clean"])
    if not spans and isinstance(text, str):
        sentences = sentence_spans(text)
        if 1 < len(sentences) <= MOST_SEGMENTS:
            spans = Prompt(text, sentences).token_spans(coder)
    segments = partition(spans, n) if spans else chunked(n)
    if len(segments) > MOST_SEGMENTS:
        segments = chunked(n)
    bins = min(request.resolution, n)
    width, n_longer = divmod(n, bins)
    edges = np.concatenate([[0], np.cumsum(width + (np.arange(bins) < n_longer))])
    runs = {name: _run(model, row, segments, edges, request) for name, row in ids.items()}
    return PatternExample(segments, edges, runs)


def _run(
    model: LoadedModel, ids: Sequence[int], segments: list[Segment], edges: np.ndarray, request: PatternRequest
) -> PatternRun:
    """Run one forward and collect the patterns of every layer's attention.

    Attention itself is computed as usual.
    """
    n = len(ids)
    numbers = torch.empty(n, dtype=torch.int64, device=model.device)
    for i, (_, start, stop) in enumerate(segments):
        numbers[start:stop] = i
    is_pooled = len(edges) - 1 < n
    queries = _spread(n, request.rows) if is_pooled else np.zeros(0, dtype=np.int64)
    collect = _Collector(request, numbers, edges, queries, is_pooled, model.instrument.backend)
    with model.instrument.handled_by(collect):
        model.forward([ids])
    exact_heads = request.exact if is_pooled else []  # the maps of a short prompt are exact already
    arrays = collect.arrays

    def stacked(name: str, heads: list[Head], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        parts = [arrays[h][name] for h in heads]
        return np.stack(parts).astype(dtype) if parts else np.zeros((0, *shape), dtype=dtype)

    return PatternRun(
        model.coder.texts(ids),
        stacked("map", request.heads, (0, 0), np.uint8),
        stacked("blocks", request.heads, (0, 0), np.float32),
        stacked("received", request.heads, (0,), np.float32),
        stacked("entropy", request.heads, (0,), np.float32),
        stacked("top_index", exact_heads, (n, request.topk), np.int32),
        stacked("top_value", exact_heads, (n, request.topk), np.float32),
        queries,
        stacked("rows", exact_heads, (len(queries), n), np.uint8),
    )  # fmt: skip


def _spread(n: int, rows: int) -> np.ndarray:
    """Queries whose rows are stored: evenly spaced, the last one always included."""
    if not rows:
        return np.zeros(0, int)
    return np.unique(np.linspace(n - 1, 0, min(rows, n) + 1)[:-1].round().astype(np.int64))


class _Collector:
    """Handler that computes attention and stores what is requested of its patterns."""

    def __init__(
        self,
        request: PatternRequest,
        numbers: Tensor,
        edges: np.ndarray,
        queries: np.ndarray,
        is_pooled: bool,
        backend: str,
    ) -> None:
        self.request, self.numbers, self.edges, self.queries = request, numbers, edges, queries
        self.is_pooled, self.backend = is_pooled, backend
        self.arrays: dict[Head, dict[str, np.ndarray]] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        result = attend(call, spec=headstats.StatSpec.none(), backend=self.backend)
        map_heads = [h for layer, h in self.request.heads if layer == call.layer]
        if map_heads:
            self._store_maps(call, map_heads)
        exact_heads = [h for layer, h in self.request.exact if layer == call.layer and self.is_pooled]
        if exact_heads:
            self._store_exact(call, exact_heads)
        return result.out

    def _store_maps(self, call: AttentionCall, heads: list[int]) -> None:
        part, options, numbers = _of_heads(call, heads)
        spec = replace(headstats.StatSpec.none(), received=True, entropy=True)
        stats = attend(part, spec=spec, backend=self.backend)
        size = (len(self.edges) - 1, len(self.edges) - 1)
        pooled = pooled_pattern(part.q, part.k, stats.lse, resolution=size, reduce="max", **options)
        received, entropy = stats.stats.received, stats.stats.entropy
        assert received is not None and entropy is not None  # requested above
        mass = segment_mass(part.q, part.k, stats.lse, self.numbers, self.numbers, **options)
        for i, head in zip(numbers, heads, strict=True):
            self.arrays[call.layer, head] = {
                "map": roots(_numpy(pooled.values[0, i])),
                "blocks": _numpy(mass[0, i]),
                "received": self._binned(_numpy(received[0, i])),
                "entropy": self._binned(_numpy(entropy[0, i])),
            }

    def _store_exact(self, call: AttentionCall, heads: list[int]) -> None:
        part, options, numbers = _of_heads(call, heads)
        spec = replace(headstats.StatSpec.none(), topk=min(self.request.topk, part.k.shape[2]))
        stats = attend(part, spec=spec, backend=self.backend)
        assert stats.stats.topk is not None  # requested above
        values, indices = stats.stats.topk
        queries = torch.from_numpy(self.queries).to(part.q.device)
        rows = pattern_rows(part.q, part.k, stats.lse, queries, **options) if len(queries) else None
        for i, head in zip(numbers, heads, strict=True):
            arrays = self.arrays[call.layer, head]
            arrays["top_index"], arrays["top_value"] = _numpy(indices[0, i]), _numpy(values[0, i])
            n = part.k.shape[2]
            arrays["rows"] = np.zeros((0, n), np.uint8) if rows is None else roots(_numpy(rows[0, i]))

    def _binned(self, values: np.ndarray) -> np.ndarray:
        """Means over the tokens of each bin."""
        return np.add.reduceat(values.astype(float), self.edges[:-1]) / np.diff(self.edges)


def _of_heads(call: AttentionCall, heads: list[int]) -> tuple[AttentionCall, dict[str, Any], list[int]]:
    """Restrict attention to some query heads, each with its own key head; edited attention keeps all heads.

    Also returns the options of its weights, and the numbers of the heads in it.
    """
    if any(call.edits):
        return call, weight_options(call), heads
    groups = call.q.shape[1] // call.k.shape[1]
    key_heads = [h // groups for h in heads]
    bias = call.bias
    if bias is not None and bias.ndim == 4 and bias.shape[1] > 1:
        bias = bias[:, heads]
    sinks = None if call.sinks is None else call.sinks[heads]
    part = replace(call, q=call.q[:, heads], k=call.k[:, key_heads], v=call.v[:, key_heads], bias=bias, sinks=sinks)
    return part, weight_options(part), list(range(len(heads)))


def _numpy(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()
