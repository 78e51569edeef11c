"""Attention patterns of prompts, collected while a model runs on them: rebuilt tile by tile, never n×n."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import headstats
import numpy as np
import torch
from headstats.patterns import pattern_rows, pooled_pattern, segment_mass
from torch import Tensor

from interp.errors import PromptError, SiteError
from interp.model.attention_call import AttentionCall
from interp.model.collect_statistics import texts_of
from interp.model.instrument import attend
from interp.model.loaded_model import LoadedModel
from interp.prompts.pairs import Prompt, PromptPair, encode_pairs
from interp.prompts.spans import sentence_spans
from interp.results.attention_patterns import (
    AttentionPatterns,
    Head,
    PatternExample,
    PatternRun,
    Segment,
    chunked,
    head_name,
    partition,
    roots,
)  # fmt: skip
from interp.sites import Site
from interp.utils.provenance import now, prompt_hash

MOST_SEGMENTS = 64


@dataclass(frozen=True)
class Wanted:
    """What to keep of every layer's attention."""

    heads: list[Head]
    exact: list[Head]
    resolution: int
    topk: int
    rows: int


@torch.no_grad()
def prompt_patterns(
    model: LoadedModel, prompts: Any, heads: Any, exact: Any, resolution: int, topk: int, rows: int
) -> AttentionPatterns:
    """Patterns of chosen heads; see `Model.attention_patterns`."""
    if model.stacks or model.reads != "text":
        raise PromptError(f"{model.name}: attention patterns are collected of models of one stack that read text")
    if min(resolution, topk) < 1 or rows < 0:
        raise PromptError(f"resolution={resolution}, topk={topk}, rows={rows}: at least 1, 1 and 0 expected")
    listed = [prompts] if isinstance(prompts, str | Prompt | PromptPair) else list(prompts)
    every = [(layer, head) for layer in model.attention_layers for head in range(model.n_heads)]
    chosen = every if heads is None else _heads(heads, every)
    sharp = _heads(exact, every)
    wanted = Wanted(list(dict.fromkeys([*chosen, *sharp])), sharp, resolution, topk, rows)
    texts_of(listed)  # refuses what is no text
    examples = [_example(model, prompt, wanted) for prompt in listed]
    provenance = {
        **model.provenance(), "prompts": prompt_hash([getattr(p, "text", p) for p in listed]), "created": now(),
        "pooling": f"largest weight of each cell, at most {resolution} × {resolution} cells",
    }  # fmt: skip
    return AttentionPatterns(wanted.heads, sharp, model.n_layers, model.n_heads, examples, provenance)


def _heads(heads: Iterable[Any], every: Sequence[Head]) -> list[Head]:
    """Heads given as (layer, head), ``"L9H6"``, a Site or its text."""
    found: list[Head] = []
    for item in [heads] if isinstance(heads, str | Site) else heads:
        text = str(item)
        match = re.search(r"L(\d+)H(\d+)", text)
        given = (match[1], match[2]) if match else item
        head = (int(given[0]), int(given[1])) if isinstance(given, tuple | list) and len(given) == 2 else (-1, -1)
        if head not in every:
            raise SiteError(f"{text!r} is no head of this model: write (9, 6), 'L9H6' or a site of z, up to "
                            f"{head_name(every[-1])}")  # fmt: skip
        found.append(head)
    return list(dict.fromkeys(found))


def _example(model: LoadedModel, prompt: Any, wanted: Wanted) -> PatternExample:
    """Runs of one prompt."""
    coder = model.coder
    if isinstance(prompt, PromptPair):
        encoded = encode_pairs(prompt, coder)[0]
        ids, spans, text = {"clean": encoded.clean, "corrupt": encoded.corrupt}, dict(encoded.spans), prompt.clean
    else:
        text = prompt.text if isinstance(prompt, Prompt) else getattr(prompt, "prompt", prompt)
        spans = prompt.token_spans(coder) if isinstance(prompt, Prompt) else {}
        ids = {"clean": coder.encode(text)}
    n = len(ids["clean"])
    if not spans:
        sentences = sentence_spans(text)
        if 1 < len(sentences) <= MOST_SEGMENTS:
            spans = Prompt(text, sentences).token_spans(coder)
    segments = partition(spans, n) if spans else chunked(n)
    if len(segments) > MOST_SEGMENTS:
        segments = chunked(n)
    bins = min(wanted.resolution, n)
    width, longer = divmod(n, bins)
    edges = np.concatenate([[0], np.cumsum(width + (np.arange(bins) < longer))])
    runs = {name: _run(model, list(row), segments, edges, wanted) for name, row in ids.items()}
    return PatternExample(segments, edges, runs)


def _run(model: LoadedModel, ids: list[int], segments: list[Segment], edges: np.ndarray, wanted: Wanted) -> PatternRun:
    """One forward, in which every layer's attention is computed as ever and then looked at."""
    n = len(ids)
    numbers = torch.empty(n, dtype=torch.int64, device=model.device)
    for i, (_, start, stop) in enumerate(segments):
        numbers[start:stop] = i
    pooled = len(edges) - 1 < n
    queries = _spread(n, wanted.rows) if pooled else np.zeros(0, dtype=np.int64)
    collect = _Collector(wanted, numbers, edges, queries, pooled, model.instrument.backend)
    with model.instrument.handled_by(collect):
        model.forward([ids])
    sharp = wanted.exact if pooled else []  # of a short prompt the maps are exact
    found = collect.found

    def stacked(name: str, heads: list[Head], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        parts = [found[h][name] for h in heads]
        return np.stack(parts).astype(dtype) if parts else np.zeros((0, *shape), dtype=dtype)

    return PatternRun(
        model.coder.texts(ids),
        stacked("map", wanted.heads, (0, 0), np.uint8),
        stacked("blocks", wanted.heads, (0, 0), np.float32),
        stacked("received", wanted.heads, (0,), np.float32),
        stacked("entropy", wanted.heads, (0,), np.float32),
        stacked("top_index", sharp, (n, wanted.topk), np.int32),
        stacked("top_value", sharp, (n, wanted.topk), np.float32),
        queries,
        stacked("rows", sharp, (len(queries), n), np.uint8),
    )  # fmt: skip


def _spread(n: int, rows: int) -> np.ndarray:
    """Queries whose rows are kept: evenly spaced, the last always among them."""
    return (
        np.unique(np.linspace(n - 1, 0, min(rows, n) + 1)[:-1].round().astype(np.int64)) if rows else np.zeros(0, int)
    )


class _Collector:
    """Stands in for a model's attention: computes it, and keeps what is wanted of it."""

    def __init__(
        self, wanted: Wanted, numbers: Tensor, edges: np.ndarray, queries: np.ndarray, pooled: bool, backend: str
    ) -> None:
        self.wanted, self.numbers, self.edges, self.queries = wanted, numbers, edges, queries
        self.pooled, self.backend = pooled, backend
        self.found: dict[Head, dict[str, np.ndarray]] = {}

    def __call__(self, call: AttentionCall) -> Tensor:
        done = attend(call, spec=headstats.StatSpec.none(), backend=self.backend)
        here = [h for layer, h in self.wanted.heads if layer == call.layer]
        if here:
            self._maps(call, here)
        sharp = [h for layer, h in self.wanted.exact if layer == call.layer and self.pooled]
        if sharp:
            self._exact(call, sharp)
        return done.out

    def _maps(self, call: AttentionCall, heads: list[int]) -> None:
        part, how = _of_heads(call, heads)
        spec = replace(headstats.StatSpec.none(), received=True, entropy=True)
        stats = attend(part, spec=spec, backend=self.backend)
        size = (len(self.edges) - 1, len(self.edges) - 1)
        seen = pooled_pattern(part.q, part.k, stats.lse, resolution=size, reduce="max", **how)
        received, entropy = stats.stats.received, stats.stats.entropy
        assert received is not None and entropy is not None  # asked for above
        mass = segment_mass(part.q, part.k, stats.lse, self.numbers, self.numbers, **how)
        for i, head in enumerate(heads):
            self.found[call.layer, head] = {
                "map": roots(_numpy(seen.values[0, i])),
                "blocks": _numpy(mass[0, i]),
                "received": self._binned(_numpy(received[0, i])),
                "entropy": self._binned(_numpy(entropy[0, i])),
            }

    def _exact(self, call: AttentionCall, heads: list[int]) -> None:
        part, how = _of_heads(call, heads)
        spec = replace(headstats.StatSpec.none(), topk=min(self.wanted.topk, part.k.shape[2]))
        stats = attend(part, spec=spec, backend=self.backend)
        assert stats.stats.topk is not None  # asked for above
        values, indices = stats.stats.topk
        chosen = torch.from_numpy(self.queries).to(part.q.device)
        rows = pattern_rows(part.q, part.k, stats.lse, chosen, **how) if len(chosen) else None
        for i, head in enumerate(heads):
            kept = self.found[call.layer, head]
            kept["top_index"], kept["top_value"] = _numpy(indices[0, i]), _numpy(values[0, i])
            n = part.k.shape[2]
            kept["rows"] = np.zeros((0, n), np.uint8) if rows is None else roots(_numpy(rows[0, i]))

    def _binned(self, values: np.ndarray) -> np.ndarray:
        """Means over the tokens of each bin."""
        return np.add.reduceat(values.astype(float), self.edges[:-1]) / np.diff(self.edges)


def _of_heads(call: AttentionCall, heads: list[int]) -> tuple[AttentionCall, dict[str, Any]]:
    """The same attention of some query heads alone, each with its own key head; and what shapes its weights."""
    groups = call.q.shape[1] // call.k.shape[1]
    own = [h // groups for h in heads]
    bias = call.bias
    if bias is not None and bias.ndim == 4 and bias.shape[1] > 1:
        bias = bias[:, heads]
    sinks = None if call.sinks is None else call.sinks[heads]
    part = replace(call, q=call.q[:, heads], k=call.k[:, own], v=call.v[:, own], bias=bias, sinks=sinks)
    names = ("causal", "window", "softcap", "scale", "bias", "sinks", "key_padding")
    return part, {name: getattr(part, name) for name in names}


def _numpy(x: Tensor) -> np.ndarray:
    return x.float().cpu().numpy()
