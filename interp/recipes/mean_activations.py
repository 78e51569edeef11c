"""Mean activations of a set of prompts: over everything, by position, or by position and token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.engine import Engine
from interp.engine.cells import rows_of
from interp.errors import PromptError
from interp.prompts.pairs import Coder, Encoded, Prompt, PromptPair, encode_pairs
from interp.sites import Site, Sites

Ids = tuple[int, ...]
TOKENS_AT_ONCE = 4096  # of reference prompts whose activations exist at one time

# What tokens share one mean: all of them, those at the same place, or the same token at the same place.
KEYS: dict[str, Callable[[Ids, int], tuple[int, ...]]] = {
    "mean": lambda ids, i: (),
    "position_mean": lambda ids, i: (len(ids), i),
    "cama": lambda ids, i: (len(ids), i, ids[i]),
}


SHARED: ContextVar[dict[Any, Any] | None] = ContextVar("shared", default=None)  # means to be used again, by `means_of`


def means_of(runner: Engine, reference: Sequence[Ids], sites: Sites, kind: str) -> Means:
    """`Means`; inside a sweep, those worked out before for the same model, reference, sites and kind."""
    kept = SHARED.get()
    if kept is None or runner.planner is not None:
        return Means(runner, reference, sites, kind)
    key = id(runner.model), kind, tuple(reference), tuple(sites)
    if key not in kept:
        kept[key] = Means(runner, reference, sites, kind)
    return kept[key]


class Means:
    """Mean activations at ``sites`` over the tokens of ``reference`` that share a key, summed in float64."""

    def __init__(self, runner: Engine, reference: Sequence[Ids], sites: Sites, kind: str):
        self.runner, self.kind = runner, kind
        keys = dict.fromkeys(KEYS[kind](ids, i) for ids in reference for i in range(len(ids)))
        self.number = {key: n for n, key in enumerate(keys)}
        self.count = torch.zeros(len(keys), dtype=torch.float64)
        self.known: dict[tuple[Ids, int, int], Tensor] = {}
        self.totals: dict[tuple[str, int | None], Tensor] = {}
        places = list(dict.fromkeys((s.component, s.layer) for s in sites))
        components = sorted({c for c, _ in places})
        for part in _parts(reference, self._at_once(components)):
            for run in runner.record(part, components):
                self._add(run.ids, {place: run.whole(*place) for place in places})

    def _add(self, ids: Ids, found: dict[tuple[str, int | None], Tensor]) -> None:
        where = self._numbers(ids, 0, len(ids))
        self.count.index_add_(0, where, torch.ones(len(ids), dtype=torch.float64))
        for place, x in found.items():
            x = x.cpu().double()  # on the CPU: MPS has no float64
            if place not in self.totals:
                self.totals[place] = x.new_zeros(len(self.number), *x.shape[1:])
            self.totals[place].index_add_(0, where, x)

    def _at_once(self, components: Sequence[str]) -> int:
        """Tokens of reference prompts that may be recorded together."""
        budget = self.runner.budget
        if budget.limit is None:
            return TOKENS_AT_ONCE
        return min(TOKENS_AT_ONCE, int(budget.limit / 2 / (budget.run(1, components) + budget.row)))

    def _numbers(self, ids: Ids, start: int, stop: int) -> Tensor:
        """Which mean each of the rows [start, stop) belongs to."""
        if (ids, start, stop) not in self.known:
            numbers = [self.number[KEYS[self.kind](ids, i)] for i in range(start, stop)]
            self.known[ids, start, stop] = torch.tensor(numbers)
        return self.known[ids, start, stop]

    def value(self, site: Site, ids: Ids, start: int, stop: int) -> Float[Tensor, "rows width"]:
        """The mean for rows [start, stop) of a prompt."""
        where = self._numbers(ids, start, stop)
        total = self.totals[site.component, site.layer]
        total = total[where] if site.head is None else total[where, site.head]
        mean = total / self.count[where][:, None]
        model = self.runner.model
        return mean.to(model.device, torch.float64 if model.dtype == torch.float64 else torch.float32)


def check_support(kind: str, prompts: Sequence[Encoded], reference: Sequence[Ids], sites: Sites) -> None:
    """Refuse means that would be the activations themselves: a place (and token) that only one prompt has.

    Where all prompts of a length agree before a token, its activation has no context to average over: one is enough.
    """
    if kind == "mean":
        return
    counts: dict[tuple[int, ...], int] = {}
    before: dict[tuple[int, int], set[Ids]] = {}
    for ids in reference:
        for i in range(len(ids)):
            key = KEYS[kind](ids, i)
            counts[key] = counts.get(key, 0) + 1
            before.setdefault((len(ids), i), set()).add(ids[: i + 1 if kind == "position_mean" else i])
    distinct = Counter(len(ids) for ids in set(reference))
    lacking = []
    for n, prompt in enumerate(prompts):
        rows = {i for s in sites for i in range(*_rows(s, prompt))}
        for i in sorted(rows):
            alike = {prompt.clean[: i + 1 if kind == "position_mean" else i]}
            free = distinct[len(prompt)] > 1 and before.get((len(prompt), i)) == alike
            if counts.get(KEYS[kind](prompt.clean, i), 0) < (1 if free else 2):
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
    """``reference=`` as a list; None stays None. PromptError for what is no prompts, a bare string too."""
    if reference is None:
        return None
    found = [reference] if isinstance(reference, str) or not isinstance(reference, Iterable) else list(reference)
    if isinstance(reference, str) or not all(isinstance(p, str | Prompt | PromptPair) for p in found):
        raise PromptError(f"reference={reference!r:.60}: a list of prompts expected (texts, Prompts or PromptPairs)")
    return found


def reference_ids(
    reference: Iterable[str | Prompt | PromptPair] | None,
    prompts: Sequence[Encoded],
    coder: Coder,
) -> list[Ids]:
    """Token ids of the prompts to average over; by default the clean prompts themselves."""
    if reference is None:
        return [p.clean for p in prompts]
    if isinstance(reference, str):
        raise PromptError("reference= takes several prompts; got one string")
    listed = list(reference)
    if not listed:
        raise PromptError("reference= is empty: give prompts to average over, or leave it out")
    return [
        encode_pairs(r, coder)[0].clean
        if isinstance(r, PromptPair)
        else tuple(coder.encode(r.text if isinstance(r, Prompt) else r))
        for r in listed
    ]


def _parts(reference: Sequence[Ids], tokens: int) -> Iterable[list[Ids]]:
    part: list[Ids] = []
    for ids in reference:
        if part and sum(map(len, part)) + len(ids) > tokens:
            yield part
            part = []
        part.append(ids)
    yield part
