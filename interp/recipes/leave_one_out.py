"""Leave-one-out: remove each named span of a prompt, or replace it by other words, and read the metric.

Leave-one-out over the segments of a prompt, as in CausalArmor (arXiv 2602.07918): Δ_S = log P(Y | C) − log P(Y | C
without S), which is minus ``raw`` of metric logprob here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from interp.errors import InterpError, PromptError
from interp.metrics import Metric, MetricFn, Readout, logprob
from interp.model.model import Model
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.model_input import ModelInput
from interp.prompts.pairs import Fact, PromptPair
from interp.recipes.scoring import Value
from interp.recipes.sweep_loop import WHOLE_SET, Batch, CellRow, CellSource, Subset, SweepLoop
from interp.results.effects import Effects
from interp.sites import Site
from interp.utils.progress import Advance

ShortenedPrompt = tuple[str, tuple[int, ...]]  # a span's name, and the token ids that remain without the span


@in_session
def leave_out(
    model: Model,
    prompts: PromptPair | Fact | Iterable[PromptPair | Fact],
    spans: Iterable[str] | str | None = None,
    *,
    instead: Mapping[str, str] | None = None,
    metric: Metric | MetricFn | str = logprob,
    show_progress: bool | None = None,
    memory: int | str | None = None,
    subset: Subset = WHOLE_SET,
) -> Effects:
    """Measure the clean prompt with each named span's tokens left out, or replaced, one span at a time.

        pair = interp.PromptPair(clean, corrupt, " Mary", " John").span("place", " at the store")
        interp.leave_out(model, pair).summary()
        interp.leave_out(model, pair, "place", instead={"place": " at home"})

    ``spans``: names; default all spans of each prompt.  ``instead``: words that take a span's place (by its name),
    tokenised as a continuation; other spans are left out. Later tokens move up: positions change with the length, so
    each cell is a full forward. One row per (prompt, span), with the span's name as ``role``: ``raw`` is patched −
    clean in the metric's units, ``effect`` its share of corrupt − clean (NaN for a Fact). ``subset``: for
    `interp.sweep`.

    Raises PromptError for a span that a prompt does not have, or that is the whole prompt; InterpError for a ``memory``
    (bytes besides the weights, or ``"4GiB"``) that does not hold one prompt.
    """
    loop = SweepLoop(model, prompts, metric, "naive", memory, subset, show_progress, takes_facts=True)
    if loop.outs is not None:
        raise InterpError(
            f"interp.leave_out moves tokens, and metric {loop.metric.name!r} compares positions: use a metric of the "
            "last position, such as interp.logprob or interp.kl"
        )
    loop.runner.reason = "tokens move, so that nothing can be reused"
    if instead is not None and not (
        isinstance(instead, Mapping) and all(isinstance(text, str) for text in instead.values())
    ):
        raise PromptError(f"instead={instead!r:.60}: words by the names of spans expected, {{'subject': 'Mary'}}")
    replacements = {name: model.coder.continuation(text) for name, text in (instead or {}).items()}
    if spans is None:
        names = None
    else:
        names = [spans] if isinstance(spans, str) else list(spans)
    cells = _LeaveOutCells(_shortened(loop.prompts, names, replacements, model.n_ctx), bool(replacements))
    return loop.run(cells, cells.title, "noise", instead=dict(instead or {}))


class _LeaveOutCells(CellSource):
    """One cell per prompt and span; a cell is a whole prompt, so that rows have none of the engine's cells."""

    def __init__(self, shortened: list[list[ShortenedPrompt]], is_replacing: bool):
        self.shortened = shortened
        self.title = "leave out or replace" if is_replacing else "leave out"
        self.size = sum(map(len, shortened))

    def batch(self, loop: SweepLoop, numbers: range) -> Batch:
        """Clean runs, then corrupt runs if there are any."""
        return loop.record_clean_first(numbers)

    def rows(self, batch: Batch) -> Iterator[list[CellRow]]:
        """Every span of every prompt, in one group."""
        yield [
            CellRow(n, Site("embed", position=name), None)
            for n, i in enumerate(batch.numbers)
            for name, _ in self.shortened[i]
        ]

    def evaluate(self, loop: SweepLoop, batch: Batch, rows: Sequence[CellRow], advance: Advance) -> list[Value]:
        """Return the metric of every shortened prompt."""
        ids = [remaining for i in batch.numbers for _, remaining in self.shortened[i]]

        read = batch.read
        assert isinstance(read, Readout)  # checked above

        def score(logits: Tensor, indices: Sequence[int]) -> Tensor:
            return loop.metric(logits, read.rows(torch.tensor([rows[i].index for i in indices])))

        return loop.runner.score_prompts(batch.clean_runs, ids, score, advance).tolist()


def _shortened(
    prompts: Sequence[Encoded], names: Sequence[str] | None, replacements: Mapping[str, Sequence[int]], most: int
) -> list[list[ShortenedPrompt]]:
    """Return for each prompt the names of its spans, with the ids that remain without each: at most ``most`` ids."""
    shortened = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt.clean, ModelInput):
            raise PromptError(f"prompt {i} has an image: what follows a left-out span would no longer be where it was")
        of_prompt = []
        for name in prompt.spans if names is None else names:
            if name not in prompt.spans:
                spans = ", ".join(map(repr, prompt.spans)) or "none"
                raise PromptError(f"prompt {i} has no span {name!r}; its spans: {spans}")
            start, stop = prompt.spans[name]
            remaining = (*prompt.clean[:start], *replacements.get(name, ()), *prompt.clean[stop:])
            if not remaining:
                raise PromptError(f"prompt {i}: span {name!r} is the whole prompt, and nothing would be left")
            if len(remaining) > most:
                raise PromptError(
                    f"prompt {i} has {len(remaining)} tokens with the words for {name!r}: more than {most}"
                )
            of_prompt.append((name, remaining))
        shortened.append(of_prompt)
    unused = set(replacements) - {name for of_prompt in shortened for name, _ in of_prompt}
    if unused and any(shortened):
        raise PromptError(f"instead= names spans that are not left out: {', '.join(sorted(map(repr, unused)))}")
    if not any(shortened):
        raise PromptError("no prompt has a named span: PromptPair(…).span('subject', 'words') names one")
    return shortened
