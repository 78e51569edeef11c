"""Attention statistics of encoder–decoder models.

Of the encoder, of the decoder, and of what decoder heads read of the source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import headstats
import torch
from torch import Tensor

from interp.errors import PromptError
from interp.model.loaded_model import LoadedModel
from interp.model.prompt_provenance import hash_of_prompts
from interp.prompts.listing import TokenIds, listed
from interp.prompts.pairs import Prompt, text_of
from interp.prompts.text_encoder import no_tokenizer
from interp.results.attention_stats import KEY_STATISTICS, AttentionStats
from interp.utils.progress import progress
from interp.utils.provenance import now


@torch.no_grad()
def stack_stats(
    model: LoadedModel, sources: Any, targets: Any, stack: str | None, spec: headstats.StatSpec
) -> AttentionStats:
    """Compute per-head statistics of one stack for pairs of source and target.

    See `Model.attention_stats`. Raises PromptError if the model has one stack only, or if the numbers of sources and
    targets differ.
    """
    stack = checked_stack(model, stack)
    pairs = [(source, target) for _, _, source, target in paired(model, sources, targets)]
    left_out = [n for n in KEY_STATISTICS if stack == "cross" and getattr(spec, n)]  # one number per key, not per query
    shapes = {s.name: s.shape for s in headstats.STATISTICS}
    left_out += [n for n in spec.requested() if shapes[n] not in ("B H M", "B H N")]
    spec = dataclasses.replace(spec, **dict.fromkeys(left_out, False))
    instrument = model.instruments[stack]
    tokens, keys, values = [], [], {}
    with progress(f"attention statistics ({stack})", len(pairs)) as advance:
        for source, target in pairs:
            with instrument.collecting(spec) as collected:
                run_pair(model, source, target)
            layers = [collected[i].as_dict() for i in sorted(collected)]
            for name in layers[0]:
                values.setdefault(name, []).append(torch.stack([x[name][0] for x in layers]).cpu().numpy())
            source_texts, target_texts = source_names(model, source), model.coder.texts(target[0].tolist())
            tokens.append(source_texts if stack == "encoder" else target_texts)
            keys.append(target_texts if stack == "decoder" else source_texts)
            advance(1)
    definitions = {s.name: f"{s.definition} ({s.unit})" for s in headstats.STATISTICS if s.name in values}
    provenance = pairs_provenance(model, pairs, tokens, keys)
    provenance |= {"definitions": definitions, "left_out": left_out}
    backends = {i: instrument.record(i).statistics_by for i in collected}
    return AttentionStats(tokens, values, backends, provenance, stack, keys)


def checked_stack(model: LoadedModel, stack: str | None) -> str:
    """Return a stack's name; default: cross. Raises PromptError for one that the model does not have."""
    stack = stack or "cross"
    if stack not in model.stacks:
        names = ", ".join(map(repr, model.stacks)) or "none: it is not an encoder–decoder; leave out stack= and target="
        raise PromptError(f"stack={stack!r}: {model.name} has the stacks {names}")
    return stack


def paired(model: LoadedModel, sources: Any, targets: Any) -> list[tuple[Any, Any, dict[str, Tensor], Tensor]]:
    """Return each source and target as given, and as the model's inputs.

    Raises PromptError for what is neither, and if their numbers differ.
    """
    all_sources = _listed_sources(sources)
    expected = "targets (texts, Prompts or token ids)"
    all_targets = [] if targets is None else listed(targets, (str, Prompt), expected, takes_ids=True)
    if not all_sources or len(all_sources) != len(all_targets):
        raise PromptError(
            f"{len(all_sources)} source(s) and {len(all_targets)} target(s) were given; an encoder–decoder is run on "
            "pairs: pass as many of target= as of sources"
        )
    pairs = zip(all_sources, all_targets, strict=True)
    return [(s, t, _source(model, _words(s)), _target(model, _words(t))) for s, t in pairs]


def _words(item: Any) -> Any:
    return text_of(item) if isinstance(item, Prompt) else item


def run_pair(model: LoadedModel, source: dict[str, Tensor], target: Tensor) -> None:
    """Run one forward of the model."""
    model.bridge.original_model(**source, decoder_input_ids=target, use_cache=False)


def pairs_provenance(
    model: LoadedModel, pairs: Sequence[tuple[dict[str, Tensor], Tensor]], tokens: Sequence[Any], keys: Sequence[Any]
) -> dict[str, Any]:
    """Return the provenance of a result on pairs of inputs, whose queries are ``tokens`` and read ``keys``."""
    read = [source.get("input_ids", target)[0].tolist() + target[0].tolist() for source, target in pairs]
    return {
        **model.provenance(), "prompts": hash_of_prompts(list(zip(keys, tokens, strict=True)), read),
        "n_prompts": len(read), "created": now(),
    }  # fmt: skip


def _listed_sources(sources: Any) -> list[Any]:
    """Return sources as texts, Prompts, `TokenIds` or tensors of features."""
    expected = "sources (texts, Prompts, token ids, or input features)"
    items: list[Any] = []
    for source in listed(sources, (str, Prompt, Tensor), expected, takes_ids=True):
        is_features = isinstance(source, Tensor) and source.is_floating_point()
        items += [source] if is_features else listed(source, (str, Prompt), expected, takes_ids=True)
    return items


def _source(model: LoadedModel, source: str | TokenIds | Tensor) -> dict[str, Tensor]:
    reads_features = model.bridge.original_model.main_input_name == "input_features"
    if reads_features and isinstance(source, Tensor) and source.ndim == 2:
        return {"input_features": source[None].to(model.device, model.dtype)}
    if not reads_features and isinstance(source, str | TokenIds) and source:
        return {"input_ids": torch.tensor([model.coder.encode(source)], device=model.device)}
    expected = "input features, a tensor [mel bins, frames]" if reads_features else "a non-empty text, or token ids"
    raise PromptError(f"{model.name} takes as its source {expected}; got {type(source).__name__}")


def _target(model: LoadedModel, target: str | TokenIds) -> Tensor:
    """The decoder's input: its start token, then the target's tokens.

    Special tokens are not added.
    """
    if not target:
        raise PromptError(f"a target must be a non-empty string, got {target!r}")
    start = model.bridge.original_model.config.decoder_start_token_id
    if isinstance(target, TokenIds):
        ids = model.coder.encode(target)
    elif model.tokenizer is None:
        raise no_tokenizer(model.name)
    else:
        ids = model.tokenizer(target, add_special_tokens=False)["input_ids"]
    return torch.tensor([[start, *ids]], device=model.device)


def source_names(model: LoadedModel, source: dict[str, Tensor]) -> list[str]:
    """One string for each position of the encoder; frames of sound are numbered."""
    if "input_ids" in source:
        return model.coder.texts(source["input_ids"][0].tolist())
    return [f"frame {i}" for i in range(model.bridge.original_model.config.max_source_positions)]
