"""Numbers that a caller gives for the tokens of prompts: targets and features of keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor

from interp.errors import PromptError
from interp.prompts.positions import NamedTokens, row_range


@dataclass(frozen=True)
class TokenNumbers:
    """Named numbers of every token: a tensor [tokens, names] for each prompt."""

    names: tuple[str, ...]
    values: Sequence[Num[Tensor, "tokens names"]]

    def stacked(self, numbers: Sequence[int]) -> Num[Tensor, "prompts tokens names"]:
        """The numbers of some prompts of equal length."""
        return torch.stack([self.values[i] for i in numbers])


def read_targets(targets: Any, prompts: Sequence[NamedTokens], n_queries: Sequence[int]) -> TokenNumbers | None:
    """Return for each query the keys whose weights are wanted.

    ``targets``: positions or ends of spans, which are the same keys for all queries, or ``{name: keys}`` with a key
    number for each query (-1: none). ``prompts``: the tokens that are keys. ``n_queries``: number of queries of each
    prompt. Raises PromptError for anything else.
    """
    if targets is None:
        return None
    if isinstance(targets, Mapping):
        columns = _by_name("targets", targets, n_queries)
        for name, of_prompts in columns.items():
            for column, prompt in zip(of_prompts, prompts, strict=True):
                if (column != column.round()).any() or column.min() < -1 or column.max() >= len(prompt.tokens):
                    raise PromptError(
                        f"targets: {name!r} must hold a key number for each query, from 0 to {len(prompt.tokens) - 1}, "
                        "or -1 for none"
                    )
        return _stacked(columns, torch.int64)
    places = [targets] if isinstance(targets, Integral | str) else targets
    if not isinstance(places, Iterable) or not (places := list(places)):
        raise PromptError(f"targets={targets!r:.60}: positions, ends of spans ('subject:last'), or {{name: keys}}")
    keys = {
        str(place): [np.full(n, _key(place, p), float) for n, p in zip(n_queries, prompts, strict=True)]
        for place in places
    }
    return _stacked(keys, torch.int64)


def _key(place: Any, prompt: NamedTokens) -> int:
    place = int(place) if isinstance(place, np.integer) else place
    if isinstance(place, bool) or not isinstance(place, int | str):
        raise PromptError(f"targets: a position or the end of a span ('subject:last') expected, got {place!r:.60}")
    start, stop = row_range(place, prompt, "targets")
    if stop - start != 1:
        raise PromptError(
            f"targets: the span {place!r} has {stop - start} tokens, and a target is one key: '{place}:first', "
            f"'{place}:last', or the mass on the whole span, which is the statistic segments"
        )
    return start


def read_features(features: Any, prompts: Sequence[NamedTokens]) -> TokenNumbers | None:
    """Return numbers of each key, ``{name: numbers}``, to be averaged. Raises PromptError for anything else."""
    if features is None:
        return None
    if not isinstance(features, Mapping):
        raise PromptError("key_features: {name: numbers} expected, with a number for each token of each prompt")
    return _stacked(_by_name("key_features", features, [len(p.tokens) for p in prompts]), torch.float64)


def _by_name(what: str, named: Mapping[Any, Any], lengths: Sequence[int]) -> dict[str, list[np.ndarray]]:
    if not named or not all(isinstance(name, str) for name in named):
        raise PromptError(f"{what}: {{name: numbers}} expected, with text as names, got {dict(named)!r:.60}")
    return {name: _of_prompts(f"{what}: {name!r}", rows, lengths) for name, rows in named.items()}


def _of_prompts(what: str, rows: Any, lengths: Sequence[int]) -> list[np.ndarray]:
    """One array of numbers for each prompt."""
    expected = "a list of numbers, one for each token, for each of the prompts"
    if not isinstance(rows, Iterable) or isinstance(rows, str):
        raise PromptError(f"{what}: {expected} expected, got {rows!r:.60}")
    of_prompts = list(rows)
    if len(lengths) == 1 and all(np.ndim(row) == 0 for row in of_prompts):
        of_prompts = [of_prompts]
    if len(of_prompts) != len(lengths):
        raise PromptError(f"{what} has {len(of_prompts)} lists for {len(lengths)} prompt(s): {expected} expected")
    arrays = []
    for i, (row, n) in enumerate(zip(of_prompts, lengths, strict=True)):
        try:
            array = np.asarray(row, dtype=float)
        except (TypeError, ValueError):
            raise PromptError(f"{what} of prompt {i}: numbers expected, got {row!r:.60}") from None
        if array.shape != (n,) or not np.isfinite(array).all():
            raise PromptError(
                f"{what} of prompt {i}: {n} finite numbers expected, one for each token, got an array "
                f"{list(array.shape)}"
            )
        arrays.append(array)
    return arrays


def _stacked(columns: Mapping[str, Sequence[np.ndarray]], dtype: torch.dtype) -> TokenNumbers:
    rows = zip(*columns.values(), strict=True)
    return TokenNumbers(tuple(columns), [torch.tensor(np.stack(row, 1), dtype=dtype) for row in rows])
