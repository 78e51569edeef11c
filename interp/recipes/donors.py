"""Resample ablation: which other prompt an example's activations are replaced from, and which of its rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from interp.engine import Run
from interp.errors import PromptError
from interp.prompts.coder import Encoded
from interp.recipes.mean_activations import Ids
from interp.sites import Site


def resample_donors(prompts: Sequence[Encoded], reference: Sequence[Ids], is_own_set: bool, seed: int) -> list[Ids]:
    """Return for each example the token ids of the prompt that it is resampled from.

    The donor has the same length, or else the nearest.  ``is_own_set``: ``reference`` are the examples themselves, and
    each takes another one, in a random cyclic order within each token length.
    """
    if is_own_set and len(prompts) < 2:
        raise PromptError(
            "resample ablation draws from another example, and there is only one: add some, give reference= prompts, "
            "or use 'mean'"
        )
    rng = np.random.default_rng(seed)
    by_length: dict[int, list[int]] = {}
    for i, ids in enumerate(reference):
        by_length.setdefault(len(ids), []).append(i)
    if not is_own_set:
        nearest = [min(by_length, key=lambda n, p=p: abs(n - len(p))) for p in prompts]
        return [reference[int(rng.choice(by_length[n]))] for n in nearest]
    donors = [0] * len(prompts)
    for length, members in by_length.items():
        if len(members) == 1:
            nearest = min((n for n in by_length if n != length), key=lambda n: abs(n - length))
            donors[members[0]] = int(rng.choice(by_length[nearest]))
            continue
        order = rng.permutation(members).tolist()
        for taker, giver in zip(order, order[1:] + order[:1], strict=True):
            donors[taker] = giver
    return [reference[i] for i in donors]


def source_rows(donor: int, start: int, stop: int, length: int) -> Tensor:
    """Return the rows of a prompt of ``donor`` tokens that stand for rows [start, stop) of one of ``length`` tokens.

    They are aligned at the last token. A shorter donor repeats its first row; a longer one's first rows are not used.
    """
    return (torch.arange(start, stop) + donor - length).clamp(min=0)


def aligned_rows(donor: Run, site: Site, start: int, stop: int, length: int) -> Tensor:
    """Return the donor's activation for rows [start, stop) of a prompt of ``length`` tokens (`source_rows`)."""
    rows = source_rows(len(donor), start, stop, length)
    return donor.value(site, 0, len(donor))[rows.to(donor.resid.device)]
