"""What a model does to queries and keys between their projections and their product: rotation by position, and scale.

Read off the model: basis vectors are put in the place of queries and keys, and what reaches attention is compared. So
partial and interleaved rotations, rescaled frequencies and layers without any need no special case. What is not linear
(norms of queries and keys) is found out and refused.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InterpError, ModelError
from interp.model.attention_call import AttentionCall
from interp.model.hooks import hooks
from interp.model.instrument import attend
from interp.model.model import Model

Turns = Float[Tensor, "position d_head d_head"]


class Rotations:
    """By layer and position, the matrices M of q ↦ q M and k ↦ k M (row vectors), and the score's scale.

    They are measured when they are first asked for, up to the position needed, in one forward of d_head + 1 prompts of
    that many tokens: for far offsets that is the cost.
    """

    def __init__(self, model: Model):
        self.model = model
        self._turns: dict[tuple[int, str], Turns] = {}
        self._scale: dict[int, float] = {}
        self._not_linear: set[int] = set()
        self._known = 0

    def at(self, layer: int, offset: int) -> tuple[Float[Tensor, "d_head d_head"], Float[Tensor, "d_head d_head"]]:
        """Matrices of a query at position ``offset`` and a key at position 0."""
        if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < self.model.n_ctx:
            raise InterpError(f"offset={offset!r}: how many positions the key lies back, 0 to {self.model.n_ctx - 1}")
        self._measure(offset + 1)
        self._refuse(layer)
        return self._turns[layer, "q"][offset], self._turns[layer, "k"][0]

    def scale(self, layer: int) -> float:
        """What the product of query and key is multiplied by (1/√d_head in most models)."""
        self._measure(1)
        return self._scale[layer]

    def rotates(self, layer: int) -> bool:
        """Whether the product of query and key depends on their distance."""
        self._measure(2)
        self._refuse(layer)
        turns = self._turns[layer, "q"]
        return not torch.allclose(turns[0], turns[-1], atol=1e-4)

    def _refuse(self, layer: int) -> None:
        if layer in self._not_linear:
            raise ModelError(
                f"{self.model.name}, layer {layer}: queries and keys are normed behind projection, so that their "
                "product is no bilinear form of the residual stream: there is no QK circuit"
            )

    @torch.no_grad()
    def _measure(self, positions: int) -> None:
        positions = min(max(positions, 2), self.model.n_ctx)
        if positions <= self._known:
            return
        model, size = self.model, int(self.model.bridge.cfg.d_head)
        drawn = torch.randn(size, generator=torch.Generator().manual_seed(0))
        rows = torch.cat([torch.eye(size), drawn[None]]).to(model.device, model.dtype)
        seen: dict[tuple[int, str], Tensor] = {}

        def put(x: Tensor, hook: Any) -> Tensor:
            return rows[:, None, None].expand_as(x).clone()

        def see(call: AttentionCall) -> Tensor:
            seen[call.layer, "q"], seen[call.layer, "k"] = call.q[:, 0].clone(), call.k[:, 0].clone()
            self._scale[call.layer] = float(call.scale)
            return attend(call).out

        pairs = [(f"blocks.{i}.attn.hook_{c}", put) for i in range(model.n_layers) for c in "qk"]
        with hooks(model, *pairs), model.instrument.handled_by(see):
            model.last_logits(torch.zeros(size + 1, positions, dtype=torch.long, device=model.device))
        for (layer, component), found in seen.items():
            turns = found[:-1].transpose(0, 1)  # [position, d_head, d_head]
            straight = torch.einsum("d,pde->pe", rows[-1], turns)
            if not torch.allclose(
                straight, found[-1], atol=1e-3 if model.dtype in (torch.float32, torch.float64) else 2e-2
            ):
                self._not_linear.add(layer)
            self._turns[layer, component] = turns
        self._known = positions
