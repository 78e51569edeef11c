"""Cells: one question each, "what if these activations of this run were different?"."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import PromptError
from interp.prompts import Encoded
from interp.sites import Site


@dataclass(frozen=True, eq=False)
class Write:
    """Replace the activation at ``site`` in token rows [start, stop) by ``value`` (broadcast over rows).

    ``site.position`` plays no part here: `rows_of` has resolved it to rows.
    """

    site: Site
    start: int
    stop: int
    value: Float[Tensor, "#rows width"]


@dataclass(frozen=True, eq=False)
class Cell:
    """Run number ``run``, with all ``writes`` applied in one forward."""

    run: int
    writes: tuple[Write, ...]

    @property
    def first_row(self) -> int:
        """The first position that is written; under causal attention nothing before it can change."""
        return min(w.start for w in self.writes)

    @property
    def first_layer(self) -> int:
        """The first block that has to run (resid_post of layer l is the input of block l + 1)."""
        return min(entry_layer(w.site) for w in self.writes)


def entry_layer(site: Site) -> int:
    """The first block whose computation a write at this site can change."""
    if site.layer is None:
        return 0
    return site.layer + 1 if site.component == "resid_post" else site.layer


def rows_of(site: Site, prompt: Encoded) -> tuple[int, int]:
    """Token rows [start, stop) of a site's position in one prompt. Raises PromptError if it is not there."""
    position, n = site.position, len(prompt)
    if position is None:
        return 0, n
    if isinstance(position, str):
        if position not in prompt.spans:
            known = ", ".join(map(repr, prompt.spans)) or "none"
            raise PromptError(f"site {site} names the span {position!r}, but the prompt's spans are: {known}")
        return prompt.spans[position]
    if not -n <= position < n:
        raise PromptError(f"site {site}: position {position} is outside a prompt of {n} tokens {list(prompt.tokens)}")
    return position % n, position % n + 1


def write_into(activation: Tensor, site: Site, rows: slice | Tensor, value: Tensor) -> Tensor:
    """A copy of ``activation`` [batch, position, (head,) width] of a batch of one with the write applied."""
    changed = activation.clone()
    target = changed[0] if site.head is None else changed[0, :, site.head]
    target[rows] = value.to(changed.dtype)
    return changed


def index_rows(writes: list[tuple[int, Write]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Flatten (first packed row, write) pairs into row indices [R], head indices [R] and values [R, width]."""
    rows, heads, values = [], [], []
    for at, write in writes:
        count = write.stop - write.start
        rows.append(torch.arange(at, at + count, device=device))
        heads.append(torch.full((count,), write.site.head or 0, device=device))
        values.append(write.value.expand(count, -1))
    return torch.cat(rows), torch.cat(heads), torch.cat(values)
