"""Generate text after prompts, batch by batch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interp.model.generation.loop import BatchRow, Loop, has_cache
from interp.model.generation.request import GenerationRequest, check_length
from interp.model.generation.result import Generation, Generations
from interp.model.loaded_model import LoadedModel
from interp.model.prompt_provenance import prompt_provenance
from interp.prompts.embeddings import refuse_vectors
from interp.prompts.pairs import encode_prompt, listed_of_any_kind, spans_of, text_of
from interp.prompts.ranges import Span
from interp.results.attention_stats import AttentionStats
from interp.utils.progress import progress

log = logging.getLogger("interp")


def generate(model: LoadedModel, prompts: Any, request: GenerationRequest) -> Generations:
    """Generate ``request.n`` texts after each prompt; see `Model.generate`."""
    items = listed_of_any_kind(prompts)
    ids = [tuple(encode_prompt(p, model.coder)) for p in items]
    refuse_vectors([encode_prompt(p, model.coder) for p in items], "generation continues tokens")
    check_length(model, ids, request.max_new_tokens)
    rows = _rows(ids, [spans_of(p, model.coder) for p in items], request)
    with progress("generate", len(rows) * request.max_new_tokens) as advance:
        try:
            for batch in _batches(model, ids, request):
                longest = max(len(ids[i]) for i in batch)
                members = [row for i in batch for row in rows[i * request.n : (i + 1) * request.n]]
                for row in members:
                    row.padding = longest - len(row.out.prompt)
                Loop(model, request, [ids[i] for i in batch], members).run(advance)
        except KeyboardInterrupt:
            unfinished = sum(not row.is_done for row in rows)
            log.warning("generation was interrupted: %d of %d rows are not finished", unfinished, len(rows))
    for row in rows:
        _name_tokens(model, row.out, request.stop)
    provenance = {**prompt_provenance(model, [text_of(p) for p in items], ids), **_settings(request)}
    return Generations([row.out for row in rows], _stats(model, rows, request, provenance), _kept(rows), provenance)


def _batches(model: LoadedModel, ids: Sequence[Sequence[int]], request: GenerationRequest) -> Iterator[list[int]]:
    """Yield numbers of prompts, short ones first.

    Statistics and edits count keys from the first real one, which a sliding cache of padded prompts forgets: with them,
    prompts of one length stand together.
    """
    step = max(1, request.batch_size // request.n)
    is_edited = model.instrument.edited is not None
    apart = request.stats is not None or (is_edited and _has_sliding_cache(model)) or not has_cache(model)
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for _, group in groupby(by_length, key=lambda i: len(ids[i]) if apart else 0):
        members = list(group)
        yield from (members[start : start + step] for start in range(0, len(members), step))


def _has_sliding_cache(model: LoadedModel) -> bool:
    config: Any = getattr(model.bridge.original_model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = getattr(config, "layer_types", None) or ()
    return getattr(config, "sliding_window", None) is not None or any("full" not in str(k) for k in kinds)


def _rows(
    ids: Sequence[tuple[int, ...]], spans: Sequence[Mapping[str, Span]], request: GenerationRequest
) -> list[BatchRow]:
    repeats: Counter[tuple[int, ...]] = Counter()
    rows = []
    for example, (prompt, names) in enumerate(zip(ids, spans, strict=True)):
        for sample in range(request.n):
            draws = request.sampling.draws_of(prompt, sample, repeats[prompt])
            rows.append(BatchRow(Generation(example, sample, prompt, names), draws, 0))
        repeats[prompt] += 1
    return rows


def _name_tokens(model: LoadedModel, out: Generation, stop: Sequence[str]) -> None:
    """Give a row its tokens' texts and its text, which ends before a stop string."""
    out.tokens = model.coder.texts(out.ids)
    if model.tokenizer is None:
        return
    text = model.tokenizer.decode(out.ids, skip_special_tokens=True)
    found = [text.index(s) for s in stop if s in text]
    out.text = text[: min(found)] if found else text


def _stats(
    model: LoadedModel, rows: Sequence[BatchRow], request: GenerationRequest, provenance: dict[str, Any]
) -> AttentionStats | None:
    like = next((row.stats for row in rows if row.stats), None)
    if request.stats is None or like is None:
        return None
    values = {name: [_steps(row, name, steps[0]) for row in rows] for name, steps in like.items()}
    backends = {i: model.instrument.record(i).statistics_by for i in range(model.n_layers)}
    tokens = [row.out.tokens for row in rows]
    return AttentionStats(tokens, values, backends, {**provenance, "left_out": list(request.left_out)})


def _steps(row: BatchRow, name: str, like: np.ndarray) -> np.ndarray:
    """The numbers of a row's tokens along a last axis; none of one that an interruption left unfinished."""
    steps = row.stats.get(name, [])[: len(row.out.ids)]
    return np.stack(steps, axis=-1) if steps else np.zeros((*like.shape, 0), dtype=like.dtype)


def _kept(rows: Sequence[BatchRow]) -> dict[str, list[Tensor]]:
    like = next((row.kept for row in rows if row.kept), {})
    kept: dict[str, list[Tensor]] = {}
    for name, (step, *_) in like.items():
        of_rows = [row.kept.get(name, [])[: len(row.out.ids)] for row in rows]
        kept[name] = [torch.stack(steps) if steps else step.new_empty(0, *step.shape) for steps in of_rows]
    return kept


def _settings(request: GenerationRequest) -> dict[str, Any]:
    s = request.sampling
    return {
        "max_new_tokens": request.max_new_tokens, "n": request.n, "temperature": s.temperature, "top_k": s.top_k,
        "top_p": s.top_p, "seed": s.seed, "stop": list(request.stop),
    }  # fmt: skip
