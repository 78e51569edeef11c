"""HardConcrete: learned random gates with probability mass on 0 and 1.

`HardConcrete.alive` is their probability of being open. Hard concrete (Louizos et al. 2018): z = clip((high − low)
σ((logit u + a) / temperature) + low, 0, 1), with u uniform in (0, 1); P(z > 0) = σ(a − temperature · log(−low / high)).
Gradients pass through z to a.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

EDGE = 1e-6  # distance that u keeps from 0 and 1


@dataclass(frozen=True)
class HardConcrete:
    """A family of gates.

    The defaults are those of Edge Pruning (and of CoFi pruning).
    """

    low: float = -0.1
    high: float = 1.1
    temperature: float = 2 / 3

    def sample(self, a: Float[Tensor, "*gates"], generator: torch.Generator) -> Float[Tensor, "*gates"]:
        """Draw every gate once, in [0, 1]."""
        u = torch.rand(a.shape, generator=generator, dtype=a.dtype).clamp(EDGE, 1 - EDGE).to(a.device)
        stretched = (self.high - self.low) * ((u.logit() + a) / self.temperature).sigmoid() + self.low
        return stretched.clamp(0, 1)

    def alive(self, a: Float[Tensor, "*gates"]) -> Float[Tensor, "*gates"]:
        """P(z > 0) of every gate."""
        return (a - self.temperature * math.log(-self.low / self.high)).sigmoid()
