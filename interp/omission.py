"""Which part of a prompt carries the answer: leave each span out, or put other words in its place.

Leave-one-out over the segments of a prompt, as in CausalArmor (arXiv 2602.07918): Δ_S = log P(Y | C) − log P(Y | C
without S), which is minus ``raw`` of metric logprob here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from interp.effects import Effects
from interp.errors import PromptError
from interp.metrics import Metric, MetricFn, as_metric, logprob
from interp.model import Model
from interp.prompts import Fact, PromptPair, encode_any
from interp.recipes import Rows, check_metric, provenance_of, readout
from interp.sites import Site


def leave_out(
    model: Model,
    prompts: PromptPair | Fact | Iterable[PromptPair | Fact],
    spans: Iterable[str] | None = None,
    *,
    instead: Mapping[str, str] | None = None,
    metric: Metric | MetricFn | str = logprob,
) -> Effects:
    """The metric of the clean prompt with each named span's tokens left out, or replaced, one span at a time.

    ``spans``: names; default all spans of each prompt.  ``instead``: words to stand in a span's place (by its name),
    tokenised as a continuation; other spans are left out. Later tokens move up: positions change with the length. One
    row per (prompt, span), with the span's name as ``role``: ``raw`` is patched − clean in the metric's units,
    ``effect`` its share of corrupt − clean (NaN for a Fact).

    Raises PromptError for a span that a prompt lacks, or that is the whole prompt.
    """
    metric = as_metric(metric)
    listed = [prompts] if isinstance(prompts, PromptPair | Fact) else list(prompts)
    encoded, pairs = encode_any(listed, model.coder)
    check_metric(metric, encoded)
    words = {name: model.coder.continuation(text) for name, text in (instead or {}).items()}
    wanted = None if spans is None else list(spans)
    asked: list[tuple[int, str]] = []
    ids: list[tuple[int, ...]] = []
    for i, prompt in enumerate(encoded):
        for name in prompt.spans if wanted is None else wanted:
            if name not in prompt.spans:
                known = ", ".join(map(repr, prompt.spans)) or "none"
                raise PromptError(f"prompt {i} has no span {name!r}; its spans: {known}")
            start, stop = prompt.spans[name]
            left = (*prompt.clean[:start], *words.get(name, ()), *prompt.clean[stop:])
            if not left:
                raise PromptError(f"prompt {i}: span {name!r} is the whole prompt, and nothing would be left")
            asked.append((i, name))
            ids.append(left)
    if not asked:
        raise PromptError("no prompt has a named span: PromptPair(…).span('subject', 'words') names one")
    base = model.next_token_logits([p.clean for p in encoded])
    read = readout(encoded, list(base))
    clean = metric(base, read).double()
    corrupt = torch.full_like(clean, torch.nan)
    if pairs:
        corrupt = metric(model.next_token_logits([p.corrupt for p in encoded]), read).double()
    values = metric(model.next_token_logits(ids), read.rows(torch.tensor([i for i, _ in asked]))).double()
    rows = Rows("leave out" if not words else "leave out or replace", "noise", metric)
    for (i, name), value in zip(asked, values.tolist(), strict=True):
        rows.add(i, Site("embed", position=name), encoded[i], float(clean[i]), float(corrupt[i]), value)
    return rows.effects(model, listed, instead=dict(instead or {}), **provenance_of(prompts))
