"""Encoder–decoder models: what their heads do in each stack, and what decoder heads read of the source."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import headstats
import torch
from torch import Tensor

from interp.errors import PromptError
from interp.model.loaded_model import LoadedModel
from interp.results.attention_stats import KEY_STATISTICS, AttentionStats
from interp.utils.provenance import now, prompt_hash


@torch.no_grad()
def stack_stats(
    model: LoadedModel, sources: Any, targets: Any, stack: str | None, spec: headstats.StatSpec
) -> AttentionStats:
    """Per-head statistics of one stack, for pairs of a source and a target; see `Model.attention_stats`.

    Raises PromptError if the model has one stack only, or sources and targets do not pair up.
    """
    stack = stack or "cross"
    if stack not in model.stacks:
        known = ", ".join(map(repr, model.stacks)) or "none: it is not an encoder–decoder; leave out stack= and target="
        raise PromptError(f"stack={stack!r}: {model.name} has the stacks {known}")
    pairs = _pairs(model, sources, targets)
    crossing = stack == "cross"
    left_out = [n for n in KEY_STATISTICS if crossing and getattr(spec, n)]  # one number for a key, not for a query
    shapes = {s.name: s.shape for s in headstats.STATISTICS}
    left_out += [n for n in spec.requested() if shapes[n] not in ("B H M", "B H N")]
    spec = dataclasses.replace(spec, **dict.fromkeys(left_out, False))
    instrument = model.instruments[stack]
    tokens, keys, values = [], [], {}
    for source, target in pairs:
        with instrument.collecting(spec) as collected:
            model.bridge.original_model(**source, decoder_input_ids=target, use_cache=False)
        layers = [collected[i].as_dict() for i in sorted(collected)]
        for name in layers[0]:
            values.setdefault(name, []).append(torch.stack([x[name][0] for x in layers]).cpu().numpy())
        read = _texts(model, source)
        written = [model.tokenizer.decode([i]) for i in target[0].tolist()]
        tokens.append(read if stack == "encoder" else written)
        keys.append(written if stack == "decoder" else read)
    definitions = {s.name: f"{s.definition} ({s.unit})" for s in headstats.STATISTICS if s.name in values}
    provenance = {
        **model.provenance(), "prompts": prompt_hash([repr(k) + repr(t) for k, t in zip(keys, tokens, strict=True)]),
        "created": now(), "definitions": definitions, "left_out": left_out,
    }  # fmt: skip
    backends = {i: ", ".join(instrument.record(i).backends) for i in collected}
    return AttentionStats(tokens, values, backends, provenance, stack, keys)


def _pairs(model: LoadedModel, sources: Any, targets: Any) -> list[tuple[dict[str, Tensor], Tensor]]:
    listed = [sources] if isinstance(sources, str | Tensor) else list(sources)
    wanted = [targets] if isinstance(targets, str) else list(targets or [])
    if not listed or len(listed) != len(wanted):
        raise PromptError(
            f"{len(listed)} source(s) and {len(wanted)} target(s) were given; an encoder–decoder is run on pairs: pass "
            "as many of target= as of sources"
        )
    return [(_source(model, s), _target(model, t)) for s, t in zip(listed, wanted, strict=True)]


def _source(model: LoadedModel, source: str | Tensor) -> dict[str, Tensor]:
    features = model.bridge.original_model.main_input_name == "input_features"
    if features and isinstance(source, Tensor) and source.ndim == 2:
        return {"input_features": source[None].to(model.device, model.dtype)}
    if not features and isinstance(source, str) and source:
        return {"input_ids": torch.tensor([model.tokenizer(source)["input_ids"]], device=model.device)}
    takes = "input features, a tensor [mel bins, frames]" if features else "text, a non-empty string"
    raise PromptError(f"{model.name} takes as its source {takes}; got {type(source).__name__}")


def _target(model: LoadedModel, target: Sequence[str] | str) -> Tensor:
    """The decoder's input: its start token, then the target's tokens (special tokens: none)."""
    if not isinstance(target, str) or not target:
        raise PromptError(f"a target must be a non-empty string, got {target!r}")
    start = model.bridge.original_model.config.decoder_start_token_id
    ids = model.tokenizer(target, add_special_tokens=False)["input_ids"]
    return torch.tensor([[start, *ids]], device=model.device)


def _texts(model: LoadedModel, source: dict[str, Tensor]) -> list[str]:
    """One string for each position of the encoder; frames of sound have numbers."""
    if "input_ids" in source:
        return [model.tokenizer.decode([i]) for i in source["input_ids"][0].tolist()]
    return [f"frame {i}" for i in range(model.bridge.original_model.config.max_source_positions)]
