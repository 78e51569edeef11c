"""Attention statistics of encoder–decoder models by span: of the encoder, of the decoder, and of cross-attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import headstats
import torch
from torch import Tensor

from interp.errors import PromptError
from interp.model.collect_by_span import SpanRequest, SpanTable
from interp.model.encoder_decoder import checked_stack, paired, pairs_provenance, run_pair, source_names
from interp.model.loaded_model import LoadedModel
from interp.prompts.coder import Coder
from interp.prompts.division import Division, division_of
from interp.prompts.ranges import Span
from interp.results.attention_stats import KEY_STATISTICS
from interp.results.span_stats import SpanStats
from interp.utils.progress import progress


@torch.no_grad()
def stack_span_stats(
    model: LoadedModel, sources: Any, targets: Any, stack: str | None, spec: headstats.StatSpec, request: SpanRequest
) -> SpanStats:
    """Compute statistics by span of one stack for pairs of source and target.

    In cross-attention the query spans are the target's, and the key spans the source's. See `Model.attention_stats`.
    """
    stack = checked_stack(model, stack)
    if stack == "cross" and (of_keys := [name for name in KEY_STATISTICS if getattr(spec, name)]):
        raise PromptError(f"{', '.join(of_keys)}: numbers of the source's tokens, which stack='cross' has no rows for")
    pairs = paired(model, sources, targets)
    texts = {
        "source": [source_names(model, inputs) for _, _, inputs, _ in pairs],
        "target": [model.coder.texts(row[0].tolist()) for *_, row in pairs],
    }
    sides = {"encoder": ("source", "source"), "decoder": ("target", "target"), "cross": ("target", "source")}[stack]
    divisions = {
        side: [_division(model, request, side, i, *pair) for i, pair in enumerate(pairs)] for side in set(sides)
    }
    queries, keys = sides
    table = SpanTable(spec, request, divisions[queries], divisions[keys], texts[queries], texts[keys])
    instrument = model.instruments[stack]
    with progress(f"attention statistics ({stack})", len(pairs)) as advance:
        for i, (_, _, source, target) in enumerate(pairs):
            with instrument.collecting(table.spec, table.reader([i])) as collected:
                run_pair(model, source, target)
            table.add([i], collected, len(collected))
            advance(1)
    backends = {i: instrument.record(i).statistics_by for i in collected}
    inputs = [(source, target) for _, _, source, target in pairs]
    return table.stats(backends, pairs_provenance(model, inputs, texts[queries], texts[keys]), stack)


def _division(
    model: LoadedModel, request: SpanRequest, side: str, number: int, source: Any, target: Any,
    inputs: dict[str, Tensor], row: Tensor,
) -> Division:  # fmt: skip
    """Divide the source's positions, or the decoder's: its start token is in no span."""
    what = f"{side} {number}"
    if side == "target":
        coder = replace(model.coder, offsets=lambda text: _bare_offsets(model.coder, text, row[0, 1:].tolist()))
        return division_of(target, row.shape[1], coder, request.by, request.names, what, first=1)
    if "input_ids" not in inputs:
        raise PromptError(f"{what} is sound, whose frames have no spans: use stack='decoder'")
    return division_of(source, inputs["input_ids"].shape[1], model.coder, request.by, request.names, what)


def _bare_offsets(coder: Coder, text: str, bare: list[int]) -> list[Span]:
    """The character ranges of a text's tokens without the special tokens around them."""
    ids, n = coder.encode(text), len(bare)
    first = next(i for i in range(len(ids) - n + 1) if ids[i : i + n] == bare)
    return coder.offsets(text)[first : first + n]
