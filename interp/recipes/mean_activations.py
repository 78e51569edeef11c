"""Mean activations of a set of prompts: over everything, by position, or by position and token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine import Engine
from interp.engine.cells import rows_of
from interp.errors import PromptError
from interp.model.layer_progress import by_layer
from interp.prompts.coder import Coder, Encoded
from interp.prompts.embeddings import refuse_vectors
from interp.prompts.listing import listed
from interp.prompts.model_input import as_hashable
from interp.prompts.pairs import Prompt, PromptPair, encode_pairs, encode_prompt
from interp.sites import Site, Sites
from interp.utils.progress import progress

Ids = tuple[int, ...]
TOKENS_AT_ONCE = 4096  # of reference prompts whose activations are held at one time

# Tokens with the same key share one mean: all tokens, those at the same place, or the same token at the same place.
MEAN_KEYS: dict[str, Callable[[Ids, int], tuple[int, ...]]] = {
    "mean": lambda ids, i: (),
    "position_mean": lambda ids, i: (len(ids), i),
    "cama": lambda ids, i: (len(ids), i, ids[i]),
}


def means_of(
    runner: Engine, reference: Sequence[Ids], sites: Sites, kind: str, shared: dict[Any, Any] | None = None
) -> Means:
    """Return `Means`.

    ``shared``: means computed earlier for the same model, reference, sites and kind, which are used again and added to.
    """
    if shared is None or runner.planner is not None:
        return Means(runner, reference, sites, kind)
    key = id(runner.model), kind, tuple(reference), tuple(sites)
    if key not in shared:
        shared[key] = Means(runner, reference, sites, kind)
    return shared[key]


class Means:
    """Mean activations at ``sites`` over the tokens of ``reference`` that share a key, summed in float64."""

    def __init__(self, runner: Engine, reference: Sequence[Ids], sites: Sites, kind: str):
        self.runner, self.kind = runner, kind
        keys = dict.fromkeys(MEAN_KEYS[kind](ids, i) for ids in reference for i in range(len(ids)))
        self.number = {key: n for n, key in enumerate(keys)}
        self.count = torch.zeros(len(keys), dtype=torch.float64)
        self.numbers_of_rows: dict[tuple[Ids, int, int], Tensor] = {}
        self.totals: dict[tuple[str, int | None], Tensor] = {}
        addresses = list(dict.fromkeys((s.component, s.layer) for s in sites))
        components = sorted({c for c, _ in addresses})
        with progress("mean activations", len(reference)) as advance:
            for chunk in _chunks(reference, self._at_once(components)):
                with by_layer(runner.model, advance, len(chunk)):
                    runs = runner.record(chunk, components)
                for run in runs:
                    self._add(run.ids, {address: run.whole(*address) for address in addresses})

    def _add(self, ids: Ids, activations: dict[tuple[str, int | None], Tensor]) -> None:
        rows = self._numbers(ids, 0, len(ids))
        self.count.index_add_(0, rows, torch.ones(len(ids), dtype=torch.float64))
        for address, x in activations.items():
            x = x.cpu().double()  # on the CPU: MPS has no float64
            if address not in self.totals:
                self.totals[address] = x.new_zeros(len(self.number), *x.shape[1:])
            self.totals[address].index_add_(0, rows, x)

    def _at_once(self, components: Sequence[str]) -> int:
        """Return how many tokens of reference prompts may be recorded together."""
        budget = self.runner.budget
        if budget.limit is None:
            return TOKENS_AT_ONCE
        return min(TOKENS_AT_ONCE, int(budget.limit / 2 / (budget.run(1, components) + budget.row)))

    def _numbers(self, ids: Ids, start: int, stop: int) -> Tensor:
        """Return the number of the mean that each of the rows [start, stop) belongs to."""
        if (ids, start, stop) not in self.numbers_of_rows:
            numbers = [self.number[MEAN_KEYS[self.kind](ids, i)] for i in range(start, stop)]
            self.numbers_of_rows[ids, start, stop] = torch.tensor(numbers)
        return self.numbers_of_rows[ids, start, stop]

    def value(self, site: Site, ids: Ids, start: int, stop: int) -> Float[Tensor, "rows width"]:
        """Return the mean for rows [start, stop) of a prompt."""
        rows = self._numbers(ids, start, stop)
        total = self.totals[site.component, site.layer]
        total = total[rows] if site.head is None else total[rows, site.head]
        mean = total / self.count[rows][:, None]
        model = self.runner.model
        return mean.to(model.device, torch.float64 if model.dtype == torch.float64 else torch.float32)


def check_support(kind: str, prompts: Sequence[Encoded], reference: Sequence[Ids], sites: Sites) -> None:
    """Raise PromptError for means that would be the activations themselves: a place (and token) in only one prompt.

    Where all prompts of a length are equal before a token, its activation has no context to average over: one prompt is
    enough.
    """
    if kind == "mean":
        return
    if kind == "cama":
        refuse_vectors([p.clean for p in prompts], "using='cama' averages over the same token")
    counts: dict[tuple[int, ...], int] = {}
    before: dict[tuple[int, int], set[Ids]] = {}
    for ids in reference:
        for i in range(len(ids)):
            key = MEAN_KEYS[kind](ids, i)
            counts[key] = counts.get(key, 0) + 1
            before.setdefault((len(ids), i), set()).add(ids[: i + 1 if kind == "position_mean" else i])
    distinct = Counter(len(ids) for ids in set(reference))
    lacking = []
    for n, prompt in enumerate(prompts):
        rows = {i for s in sites for i in range(*_rows(s, prompt))}
        for i in sorted(rows):
            alike = {prompt.clean[: i + 1 if kind == "position_mean" else i]}
            free = distinct[len(prompt)] > 1 and before.get((len(prompt), i)) == alike
            if counts.get(MEAN_KEYS[kind](prompt.clean, i), 0) < (1 if free else 2):
                lacking.append((n, i))
    if lacking:
        n, i = lacking[0]
        what = "" if kind == "position_mean" else f" with {prompts[n].tokens[i]!r} at that place"
        raise PromptError(
            f"using={kind!r}: {len(lacking)} token(s) (first: token {i} of pair {n}) lack a second reference prompt of "
            f"the same length{what}, so that their mean would be their own activation. Give reference= more "
            "prompts of the same template"
        )


def _rows(site: Site, prompt: Encoded) -> tuple[int, int]:
    return (0, len(prompt)) if site.position == "each" else rows_of(site, prompt)


def listed_reference(reference: Any) -> list[Any] | None:
    """Return ``reference=`` as a list, or None. Raises PromptError if it is not a list of prompts."""
    if reference is None:
        return None
    expected = "reference=: a list of prompts"
    if isinstance(reference, str):
        raise PromptError(f"{expected} expected, got {reference!r:.60}")
    return listed(reference, (str, Prompt, PromptPair), expected, takes_ids=True)


def reference_ids(
    reference: Iterable[str | Prompt | PromptPair] | None,
    prompts: Sequence[Encoded],
    coder: Coder,
) -> list[Ids]:
    """Return the token ids of the prompts to average over; by default the clean prompts themselves."""
    if reference is None:
        return [p.clean for p in prompts]
    if isinstance(reference, str):
        raise PromptError("reference= takes several prompts; got one string")
    reference = list(reference)
    if not reference:
        raise PromptError("reference= is empty: give prompts to average over, or leave it out")
    return [
        encode_pairs(r, coder, strings=True)[0].clean
        if isinstance(r, PromptPair)
        else as_hashable(encode_prompt(r, coder))
        for r in reference
    ]


def _chunks(reference: Sequence[Ids], tokens: int) -> Iterable[list[Ids]]:
    """Yield lists of prompts that have at most ``tokens`` tokens together (a longer prompt stands alone)."""
    chunk: list[Ids] = []
    for ids in reference:
        if chunk and sum(map(len, chunk)) + len(ids) > tokens:
            yield chunk
            chunk = []
        chunk.append(ids)
    yield chunk
