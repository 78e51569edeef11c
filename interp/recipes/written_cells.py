"""Writes of one prompt: `interp.Write`s as the engine's writes of token rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from interp.engine import CellWrite, Engine, Run
from interp.engine.budget import component_width
from interp.errors import InterpError, PromptError, SiteError
from interp.interventions import Write
from interp.model.model import Model
from interp.prompts.coder import Encoded
from interp.prompts.positions import token_rows
from interp.sites import Site


@dataclass(frozen=True, eq=False)
class RowWrites:
    """A write, and the token rows of one prompt on which it acts."""

    write: Write
    rows: Sequence[int]

    @classmethod
    def of(cls, write: Write, prompt: Encoded) -> RowWrites:
        """Resolve the tokens of a write.

        Raises PromptError for tokens that the prompt does not have, and for a value of another number of tokens.
        """
        if write.where is None:
            rows: Sequence[int] = range(len(prompt))  # those of an answer behind the prompt too
        else:
            rows = token_rows(write.where, prompt, f"Write({write.text})")
        value = write.value
        if isinstance(value, Tensor) and value.ndim == 2 and len(value) not in (1, len(rows)):
            raise PromptError(
                f"Write({write.text}): {write.how} has values of {len(value)} tokens, and the write acts on "
                f"{len(rows)} in this prompt of {len(prompt.tokens)} tokens"
            )
        return cls(write, rows)

    def cell_writes(self, device: torch.device) -> Iterator[CellWrite]:
        """Yield a write for each run of neighbouring tokens."""
        value = torch.as_tensor(self.write.value, device=device)
        value = value.reshape(1, -1) if value.ndim < 2 else value
        breaks = [i for i, (a, b) in enumerate(pairwise(self.rows), 1) if b != a + 1]
        for i, j in pairwise([0, *breaks, len(self.rows)]):
            part = value if len(value) == 1 else value[i:j]
            yield CellWrite(self.write.address, self.rows[i], self.rows[j - 1] + 1, part, self.write.how)


def check_writes(engine: Engine, writes: Sequence[Write]) -> None:
    """Raise SiteError for a write whose site the model lacks, or whose value has another width, before any forward."""
    if not writes:
        return
    engine.check_sites([w.address for w in writes])
    for write in writes:
        width = component_width(engine.model, write.address.component)
        if write.address.spec.heads is None:
            _check_width(write, width)
        elif write.address.spec.heads == "neuron":
            _check_width(write, 1)


def check_widths(writes: Sequence[Write], run: Run) -> None:
    """Raise SiteError for a value of another width than the activation in a recorded run."""
    for write in writes:
        _check_width(write, run.value(write.address, 0, 1).shape[-1])


def _check_width(write: Write, width: int) -> None:
    if isinstance(write.value, Tensor) and write.value.shape[-1] not in (1, width):
        raise SiteError(
            f"Write({write.text}): {write.how} has shape {list(write.value.shape)}, and the activation at "
            f"{write.address} has width {width}: [{width}] or [tokens, {width}] expected"
        )


def check_overlap(name: str, writes: Sequence[RowWrites], model: Model) -> None:
    """Raise InterpError for two writes of one name that act on the same activation of a token."""
    seen: dict[tuple[Site, int], Write] = {}
    for of in writes:
        site = of.write.address
        if site.component == "resid_post" and site.layer is not None and site.layer + 1 < model.n_layers:
            site = Site("resid_pre", site.layer + 1)  # the same activation
        for row in of.rows:
            if (site, row) in seen:
                raise InterpError(
                    f"edit {name!r}: two writes act on {site} at token {row}: ({seen[site, row].text}) and "
                    f"({of.write.text}). Combine their values in one"
                )
            seen[site, row] = of.write
