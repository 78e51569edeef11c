"""Which part of a prompt carries the answer: leave each span out, or put other words in its place.

Leave-one-out over the segments of a prompt, as in CausalArmor (arXiv 2602.07918): Δ_S = log P(Y | C) − log P(Y | C
without S), which is minus ``raw`` of metric logprob here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from interp.engine import Engine
from interp.errors import PromptError
from interp.metrics import Metric, MetricFn, Readout, as_metric, logprob
from interp.model.model import Model
from interp.prompts.model_input import Given
from interp.prompts.pairs import Encoded, Fact, PromptPair, encode_any
from interp.recipes.sweep_loop import (
    Rows,
    asked_of,
    check_metric,
    chunks,
    provenance_of,
    readout,
    score_runs,
    tell_of_equal,
)
from interp.results.effects import Effects
from interp.sites import Site
from interp.utils.progress import progress


def leave_out(
    model: Model,
    prompts: PromptPair | Fact | Iterable[PromptPair | Fact],
    spans: Iterable[str] | str | None = None,
    *,
    instead: Mapping[str, str] | None = None,
    metric: Metric | MetricFn | str = logprob,
    show_progress: bool | None = None,
    memory: int | str | None = None,
) -> Effects:
    """The metric of the clean prompt with each named span's tokens left out, or replaced, one span at a time.

    ``spans``: names; default all spans of each prompt.  ``instead``: words to stand in a span's place (by its name),
    tokenised as a continuation; other spans are left out. Later tokens move up: positions change with the length, so
    that each cell is a full forward. One row per (prompt, span), with the span's name as ``role``: ``raw`` is patched −
    clean in the metric's units, ``effect`` its share of corrupt − clean (NaN for a Fact).

    Raises PromptError for a span that a prompt lacks, or that is the whole prompt; InterpError for a ``memory`` (bytes
    beside the weights, or ``"4GiB"``) that does not hold one prompt.
    """
    listed = asked_of(model, prompts)
    metric = as_metric(metric)
    encoded, pairs = encode_any(listed, model.coder)
    check_metric(metric, encoded, model)
    if instead is not None and not (
        isinstance(instead, Mapping) and all(isinstance(text, str) for text in instead.values())
    ):
        raise PromptError(f"instead={instead!r:.60}: words by the names of spans expected, {{'subject': 'Mary'}}")
    words = {name: model.coder.continuation(text) for name, text in (instead or {}).items()}
    wanted = [spans] if isinstance(spans, str) else None if spans is None else list(spans)
    plan = _shortened(encoded, wanted, words, model.n_ctx)
    runner = Engine(model, "naive", memory)
    runner.reason = "tokens move, so that nothing can be reused"
    rows = Rows("leave out" if not words else "leave out or replace", "noise", metric)
    with progress(rows.intervention, sum(map(len, plan)), show_progress) as advance:
        for chunk in chunks(encoded, runner, [], runs_per_example=2):
            here = [encoded[i] for i in chunk]
            clean = runner.record([p.clean for p in here])
            read = readout(here, [r.logits for r in clean])
            scores = score_runs(metric, clean, read).tolist()
            corrupt = [float("nan")] * len(here)
            if pairs:
                corrupt = score_runs(metric, runner.record([p.corrupt for p in here]), read).tolist()
                tell_of_equal(metric, scores, corrupt)
            asked = [(n, name, ids) for n, i in enumerate(chunk) for name, ids in plan[i]]

            def score(logits: Tensor, which: Sequence[int], read: Readout = read, asked: list = asked) -> Tensor:
                return metric(logits, read.rows(torch.tensor([asked[i][0] for i in which])))

            values = runner.score_prompts(clean, [ids for *_, ids in asked], score, advance).tolist()
            for (n, name, _), value in zip(asked, values, strict=True):
                rows.add(chunk[n], Site("embed", position=name), here[n], scores[n], corrupt[n], value)
    return rows.effects(
        model, listed, engine=runner.describe(), instead=dict(instead or {}), **provenance_of(prompts)
    )  # fmt: skip


def _shortened(
    prompts: Sequence[Encoded], wanted: Sequence[str] | None, words: Mapping[str, Sequence[int]], most: int
) -> list[list[tuple[str, tuple[int, ...]]]]:
    """For each prompt the names of its spans, with the ids that are left without each: at most ``most``."""
    plan = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt.clean, Given):
            raise PromptError(f"prompt {i} has an image: what follows a left-out span would no longer be where it was")
        mine = []
        for name in prompt.spans if wanted is None else wanted:
            if name not in prompt.spans:
                known = ", ".join(map(repr, prompt.spans)) or "none"
                raise PromptError(f"prompt {i} has no span {name!r}; its spans: {known}")
            start, stop = prompt.spans[name]
            left = (*prompt.clean[:start], *words.get(name, ()), *prompt.clean[stop:])
            if not left:
                raise PromptError(f"prompt {i}: span {name!r} is the whole prompt, and nothing would be left")
            if len(left) > most:
                raise PromptError(f"prompt {i} has {len(left)} tokens with the words for {name!r}: more than {most}")
            mine.append((name, left))
        plan.append(mine)
    unused = set(words) - {name for mine in plan for name, _ in mine}
    if unused and any(plan):
        raise PromptError(f"instead= names spans that are not left out: {', '.join(sorted(map(repr, unused)))}")
    if not any(plan):
        raise PromptError("no prompt has a named span: PromptPair(…).span('subject', 'words') names one")
    return plan
