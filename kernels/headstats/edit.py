"""Interventions that are carried out inside attention rather than on its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Edit:
    """What attention is told to do differently.

    gate: multiplies each head's output. Two or fewer dimensions broadcast over [B, H], three over [B, H, M].
        0 removes a head, 1 leaves it alone; any real number is allowed, and gradients flow to it.

    Statistics describe the pattern, so they are taken before the gate.
    """

    gate: Tensor | None = None
