"""Collect per-head attention statistics of prompts while a model runs on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import headstats
import torch
from headstats.stats import tensors

from interp.errors import PromptError
from interp.model.batching import equal_length_batches
from interp.model.layer_progress import by_layer
from interp.model.loaded_model import LoadedModel
from interp.model.prompt_provenance import prompt_provenance
from interp.prompts.embeddings import Embeddings
from interp.prompts.images import layout_of
from interp.prompts.model_input import ModelInput
from interp.prompts.pairs import encode_prompt, listed_of_any_kind, text_of
from interp.results.attention_stats import AttentionStats
from interp.utils.progress import progress


@torch.no_grad()
def prompt_stats(model: LoadedModel, prompts: Any, spec: headstats.StatSpec) -> AttentionStats:
    """Compute statistics of every layer and head of a model with one stack.

    See `Model.attention_stats`.
    """
    inputs = listed_inputs(model, prompts)
    spec, left_out = one_number_each(spec)
    ids = [encoded(model, p) for p in inputs]
    values: dict[str, list[Any]] = {}
    with progress("attention statistics", len(ids)) as advance:
        for batch in equal_length_batches(ids):
            with model.instrument.collecting(spec) as collected, by_layer(model, advance, len(batch)):
                model.forward([ids[i] for i in batch])
            for name, stacked in stack_layers(collected, model.n_layers).items():
                rows = values.setdefault(name, [None] * len(ids))
                for i, row in zip(batch, stacked, strict=True):
                    rows[i] = row
    backends = {i: model.instrument.record(i).statistics_by for i in range(model.n_layers)}
    definitions = {s.name: f"{s.definition} ({s.unit})" for s in headstats.STATISTICS if s.name in values}
    items = [p.digest.hex() if isinstance(p, ModelInput) else text_of(p) for p in inputs]
    provenance = {**prompt_provenance(model, items, ids), "definitions": definitions, "left_out": left_out}
    tokens = [list(p.texts) if isinstance(p, ModelInput) else model.coder.texts(p) for p in ids]
    return AttentionStats(tokens, values, backends, provenance)


def listed_inputs(model: LoadedModel, prompts: Any) -> list[Any]:
    """Return one prompt or several, of text or with images, as a list. Raises PromptError for anything else."""
    return listed_of_any_kind(prompts) if model.pictures is None else model.pictures.prompts(prompts)


def encoded(model: LoadedModel, prompt: Any) -> Sequence[int]:
    """Token ids of a prompt, of which edits of `Model.edited` know the named spans."""
    if isinstance(prompt, Embeddings) or not isinstance(prompt, ModelInput):
        return encode_prompt(prompt, model.coder)
    if (edited := model.instrument.edited) is not None:
        edited.name_tokens(prompt, prompt.texts, prompt.spans)
    return prompt


@torch.no_grad()
def tower_stats(model: LoadedModel, prompts: Any, spec: headstats.StatSpec) -> AttentionStats:
    """Compute statistics of a vision–language model's vision tower.

    There is one example for each image (or tile) of each prompt.
    """
    instrument = model.instruments["vision"]
    spec, left_out = one_number_each(spec)
    values: dict[str, list[Any]] = {}
    inputs = tower_inputs(model, prompts)
    with progress("attention statistics", len(inputs)) as advance:
        for prompt in inputs:
            with instrument.collecting(spec) as collected, by_layer(model, advance, 1):
                model.forward([prompt])
            for name, stacked in stack_layers(collected, len(collected)).items():
                values.setdefault(name, []).extend(stacked)
    positions = next(iter(values.values()))
    layouts = [layout_of(model.bridge.original_model.config, x.shape[-1]) for x in positions]
    tokens = [layout.texts(*layout.size) for layout in layouts]
    definitions = {s.name: f"{s.definition} ({s.unit})" for s in headstats.STATISTICS if s.name in values}
    items = [p.digest.hex() for p in inputs]
    provenance = {**prompt_provenance(model, items, inputs), "definitions": definitions, "left_out": left_out}
    backends = {i: instrument.record(i).statistics_by for i in collected}
    return AttentionStats(tokens, values, backends, provenance, "vision", tokens)


def tower_inputs(model: LoadedModel, prompts: Any) -> list[ModelInput]:
    """Return the prompts that hold images. Raises PromptError if none does."""
    inputs = [p for p in listed_inputs(model, prompts) if isinstance(p, ModelInput)]
    if not inputs:
        raise PromptError("the vision tower reads images, and no prompt holds one")
    return inputs


def check_kind(spec: Any) -> headstats.StatSpec:
    """Return a spec; None: the default one. Raises PromptError for anything else."""
    spec = headstats.StatSpec() if spec is None else spec
    if not isinstance(spec, headstats.StatSpec):
        raise PromptError(f"spec={spec!r}: a headstats.StatSpec is expected, e.g. StatSpec(entropy=True, sink=4)")
    return spec


def one_number_each(spec: headstats.StatSpec) -> tuple[headstats.StatSpec, list[str]]:
    """Return the spec with only one-number statistics, and the omitted names.

    Omitted are statistics with more than one number per position.
    """
    shapes = {s.name: s.shape for s in headstats.STATISTICS}
    left_out = [name for name in spec.requested() if shapes[name] not in ("B H M", "B H N")]
    reduced = dataclasses.replace(spec, **dict.fromkeys(left_out, False))
    if not reduced.requested():
        raise PromptError(
            f"spec asks for {', '.join(left_out) or 'nothing'}: attention_stats keeps statistics with one number for a "
            "position; the others come from headstats.attend"
        )
    return reduced, left_out


def stack_layers(collected: dict[int, headstats.AttentionStats], n_layers: int) -> dict[str, Any]:
    """Stack the kernel's statistics of all layers.

    Returns {name: array [batch, layers, heads, position]}.
    """
    by_layer = {i: {n: tensors(x)[0] for n, x in stats.as_dict().items()} for i, stats in collected.items()}
    like = next(iter(by_layer.values()))
    missing = {n: torch.full_like(x, float("nan") if x.is_floating_point() else -1) for n, x in like.items()}
    layers = [by_layer.get(i, missing) for i in range(n_layers)]
    return {n: torch.stack([layer[n] for layer in layers], dim=1).cpu().numpy() for n in like}
