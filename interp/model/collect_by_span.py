"""Attention statistics of prompts by span: `Model.attention_stats` with by="span" and by="sentence"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import headstats
import numpy as np
import torch
from torch import Tensor

from interp.errors import PromptError
from interp.model.attention_call import AttentionCall
from interp.model.batching import equal_length_batches
from interp.model.collect_statistics import encoded, listed_inputs, tower_inputs
from interp.model.edited import TokenNames
from interp.model.layer_progress import by_layer
from interp.model.loaded_model import LoadedModel
from interp.model.prompt_provenance import prompt_provenance
from interp.model.span_statistics import BETWEEN, SpanReader, check_spec, definitions
from interp.model.token_numbers import read_features, read_targets
from interp.prompts.division import KINDS, Division, check_names, choose, divide, division_of
from interp.prompts.images import layout_of
from interp.prompts.model_input import ModelInput
from interp.prompts.pairs import text_of
from interp.results.span_stats import SpanStats
from interp.utils.progress import progress


@dataclass(frozen=True)
class SpanRequest:
    """How prompts are divided, and which further numbers of their tokens statistics read."""

    by: str
    names: list[str] | None
    targets: Any
    features: Any


def span_request(by: str, names: Any, targets: Any, features: Any) -> SpanRequest | None:
    """Return the arguments of `Model.attention_stats` that concern spans; None for statistics of tokens.

    Raises PromptError for another ``by`` than token, span and sentence, and for arguments that it does not read.
    """
    if by in KINDS:
        return SpanRequest(by, check_names(names), targets, features)
    if by != "token":
        raise PromptError(f"by={by!r}: 'token', 'span' or 'sentence' expected")
    given = {"spans": names, "targets": targets, "key_features": features}
    if unread := [name for name, value in given.items() if value is not None]:
        raise PromptError(f"{unread[0]}= is read with by='span' or by='sentence', and not by='token'")
    return None


@torch.no_grad()
def prompt_span_stats(model: LoadedModel, prompts: Any, spec: headstats.StatSpec, request: SpanRequest) -> SpanStats:
    """Compute statistics by span of every layer and head of a model with one stack.

    See `Model.attention_stats`.
    """
    inputs = listed_inputs(model, prompts)
    ids = [encoded(model, p) for p in inputs]
    divisions = [
        division_of(prompt, len(row), model.coder, request.by, request.names, f"prompt {i}")
        for i, (prompt, row) in enumerate(zip(inputs, ids, strict=True))
    ]
    table = SpanTable.of(spec, request, divisions, [_texts(model, row) for row in ids])
    with progress("attention statistics", len(ids)) as advance:
        for batch in equal_length_batches(ids):
            reader = table.reader(batch)
            with model.instrument.collecting(table.spec, reader) as collected, by_layer(model, advance, len(batch)):
                model.forward([ids[i] for i in batch])
            table.add(batch, collected, model.n_layers)
    backends = {i: model.instrument.record(i).statistics_by for i in range(model.n_layers)}
    items = [p.digest.hex() if isinstance(p, ModelInput) else text_of(p) for p in inputs]
    return table.stats(backends, prompt_provenance(model, items, ids))


def _texts(model: LoadedModel, ids: Sequence[int]) -> Sequence[str]:
    return ids.texts if isinstance(ids, ModelInput) else model.coder.texts(ids)


@torch.no_grad()
def tower_span_stats(model: LoadedModel, prompts: Any, spec: headstats.StatSpec, request: SpanRequest) -> SpanStats:
    """Compute statistics of a vision–language model's vision tower by its spans: cls, registers and patches.

    There is one example for each image (or tile) of each prompt. Raises PromptError for targets and key features, which
    are of tokens.
    """
    if request.targets is not None or request.features is not None or request.by != "span":
        raise PromptError(
            "stack='vision' has by='span' (cls, registers and patches), without targets= and key_features="
        )
    instrument = model.instruments["vision"]
    table = SpanTable(spec, request, [], [], [], [])
    inputs = tower_inputs(model, prompts)
    with progress("attention statistics", len(inputs)) as advance:
        for prompt in inputs:
            reader = _TowerReader(model.bridge.original_model.config, request.names, table.reads_segments)
            with instrument.collecting(table.spec, reader) as collected, by_layer(model, advance, 1):
                model.forward([prompt])
            first, tiles = len(table.queries), reader.tiles.queries
            table.queries = table.keys = [*table.queries, *tiles]
            table.add(range(first, first + len(tiles)), collected, len(collected))
    backends = {i: instrument.record(i).statistics_by for i in collected}
    return table.stats(backends, prompt_provenance(model, [p.digest.hex() for p in inputs], inputs), "vision")


class _TowerReader:
    """Reads statistics of the tiles of one prompt, whose positions are known when the tower runs."""

    tiles: SpanReader

    def __init__(self, config: Any, names: list[str] | None, reads_segments: bool):
        self.config, self.names, self.reads_segments = config, names, reads_segments

    def arguments(self, call: AttentionCall) -> dict[str, Tensor]:
        """Divide the tower's positions; see `SpanReader.arguments`."""
        layout = layout_of(self.config, call.k.shape[2])
        spans = choose(layout.spans(*layout.size), self.names, "an image")
        tiles = [divide(spans, call.k.shape[2], "an image")] * call.q.shape[0]
        self.tiles = SpanReader(tiles, tiles, self.reads_segments)
        return self.tiles.arguments(call)

    def reduced(self, stats: headstats.AttentionStats) -> list[dict[str, np.ndarray]]:
        """Return the means over spans of each tile."""
        return self.tiles.reduced(stats)


class SpanTable:
    """Statistics of all prompts by span, filled batch by batch."""

    def __init__(
        self, spec: headstats.StatSpec, request: SpanRequest, queries: Sequence[Division], keys: Sequence[Division],
        query_texts: Sequence[Sequence[str]], key_texts: Sequence[Sequence[str]],
    ):  # fmt: skip
        """Read and check what the request says of tokens. Raises PromptError for what does not fit the prompts."""
        named_keys = [TokenNames(t, d.spans) for t, d in zip(key_texts, keys, strict=True)]
        self.queries, self.keys, self.request = queries, keys, request
        lengths = [len(t) for t in query_texts]
        self.targets = read_targets(request.targets, named_keys, lengths)
        self.features = read_features(request.features, named_keys)
        self.spec, self.reads_segments = check_spec(spec, self.targets, self.features)
        self.values: dict[str, dict[int, np.ndarray]] = {}

    @classmethod
    def of(
        cls, spec: headstats.StatSpec, request: SpanRequest, divisions: Sequence[Division],
        texts: Sequence[Sequence[str]],
    ) -> SpanTable:  # fmt: skip
        """Return the table of prompts that attend to themselves."""
        return cls(spec, request, divisions, divisions, texts, texts)

    def reader(self, batch: Sequence[int]) -> SpanReader:
        """Return what reads the statistics of some prompts of equal length."""
        return SpanReader(
            [self.queries[i] for i in batch], [self.keys[i] for i in batch], self.reads_segments,
            None if self.targets is None else self.targets.stacked(batch),
            None if self.features is None else self.features.stacked(batch),
        )  # fmt: skip

    def add(self, batch: Sequence[int], collected: Mapping[int, list[dict[str, np.ndarray]]], n_layers: int) -> None:
        """Add the statistics of some prompts; a layer that computed none holds NaN."""
        like = next(iter(collected.values()))
        for place, number in enumerate(batch):
            for name, array in like[place].items():
                missing = np.full_like(array, np.nan)
                layers = [collected[i][place][name] if i in collected else missing for i in range(n_layers)]
                self.values.setdefault(name, {})[number] = np.stack(layers)

    def stats(self, backends: dict[int, str], provenance: dict[str, Any], stack: str = "") -> SpanStats:
        """Return the table's numbers with the provenance of the run."""
        values = {name: [arrays[i] for i in range(len(self.queries))] for name, arrays in self.values.items()}
        between = {name: values[name] for name in BETWEEN if name in values}
        within = {name: arrays for name, arrays in values.items() if name not in BETWEEN}
        for name, numbers in (("targets", self.targets), ("key_features", self.features)):
            if numbers is not None:
                arrays = within.pop(name)
                for column, label in enumerate(numbers.names):
                    within[f"{name}[{label}]"] = [array[..., column] for array in arrays]
        provenance = {
            **provenance, "by": self.request.by, "definitions": definitions([*between, *within]),
            "other": "the tokens of a prompt that are in none of its spans",
        }  # fmt: skip
        queries, keys = ([_sizes(division) for division in side] for side in (self.queries, self.keys))
        return SpanStats(queries, keys, between, within, backends, provenance, stack)


def _sizes(division: Division) -> Mapping[str, int]:
    return {name: len(rows) for name, rows in zip(division.names, division.rows, strict=True)}
