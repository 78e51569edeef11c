"""Several circuits run at once: the forward of `interp.circuits.running` with a mask for each stretch of the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.circuits.running import Forward
from interp.circuits.wiring import Wiring


@torch.no_grad()
def run_circuits(
    wiring: Wiring,
    ids: Sequence[Sequence[int]],
    kept: Bool[Tensor, "circuits receivers senders"],
    ablated: dict[str, Tensor],
) -> Float[Tensor, "circuits batch vocab"]:
    """`run_circuit` for every circuit in ``kept``, in one forward of circuits × prompts."""
    n = len(kept)
    repeated = {name: x.repeat(n, *[1] * (x.ndim - 1)) if x.ndim >= 3 else x for name, x in ablated.items()}
    return _Together(wiring, kept, repeated)([*ids] * n).unflatten(0, (n, len(ids)))


class _Together(Forward):
    """The batch is circuit by circuit; ``cut`` and ``kept`` have them on their last axis."""

    def __init__(
        self, wiring: Wiring, kept: Bool[Tensor, "circuits receivers senders"], ablated: dict[str, Tensor]
    ) -> None:
        super().__init__(wiring, kept[0], ablated)
        allowed = torch.from_numpy(self.graph.allowed)
        self.cut, self.kept = ((allowed & mask).permute(1, 2, 0) for mask in (~kept, kept))

    def _sum(
        self, cut: Bool[Tensor, "rows senders circuits"], change: Float[Tensor, "senders ..."]
    ) -> Float[Tensor, "rows numbers"]:
        by_circuit = change.reshape(change.shape[0], cut.shape[2], -1).transpose(0, 1)
        return torch.bmm(cut.permute(2, 0, 1).to(change), by_circuit).transpose(0, 1).flatten(1)
