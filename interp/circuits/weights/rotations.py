"""Rotation and scale that a model applies to queries and keys.

They act between projection and product; rotations depend on position. Both are measured on the model: queries and keys
are replaced by basis vectors, and the input of attention is recorded. So partial and interleaved rotations, rescaled
frequencies and layers without rotation need no special case. Functions that are not linear (norms of queries and keys)
are detected, and raise ModelError.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import InterpError, ModelError
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.utils.arguments import is_whole

RotationMatrices = Float[Tensor, "position d_head d_head"]


class Rotations:
    """Rotation matrices of queries and keys by layer and position, and the scale.

    A matrix M acts as q ↦ q M and k ↦ k M, on row vectors. Matrices are measured on first use, up to the position
    needed, by one forward of d_head + 1 prompts of that many tokens, which is expensive for large offsets.
    """

    def __init__(self, model: Model):
        self.model = model
        self._matrices: dict[tuple[int, str], RotationMatrices] = {}
        self._scale: dict[int, float] = {}
        self._not_linear: set[int] = set()
        self._n_measured = 0

    def at(self, layer: int, offset: int) -> tuple[Float[Tensor, "d_head d_head"], Float[Tensor, "d_head d_head"]]:
        """Matrices of a query at position ``offset`` and a key at position 0."""
        if not is_whole(offset, 0, self.model.n_ctx - 1):
            raise InterpError(
                f"offset={offset!r}: expected the key's distance before the query, from 0 to {self.model.n_ctx - 1}"
            )
        self._measure(offset + 1)
        self._check_linear(layer)
        return self._matrices[layer, "q"][offset], self._matrices[layer, "k"][0]

    def scale(self, layer: int) -> float:
        """The factor of the product of query and key (1/√d_head in most models)."""
        self._measure(1)
        return self._scale[layer]

    def rotates(self, layer: int) -> bool:
        """Whether the product of query and key depends on their distance."""
        self._measure(2)
        self._check_linear(layer)
        matrices = self._matrices[layer, "q"]
        return not torch.allclose(matrices[0], matrices[-1], atol=1e-4)

    def _check_linear(self, layer: int) -> None:
        if layer in self._not_linear:
            raise ModelError(
                f"{self.model.name}, layer {layer}: queries and keys are normed after projection, so their product is "
                "not a bilinear form of the residual stream, and there is no QK circuit"
            )

    @torch.no_grad()
    def _measure(self, positions: int) -> None:
        """Measure the matrices of at least ``positions`` positions.

        A random vector tests that they are linear.
        """
        positions = min(max(positions, 2), self.model.n_ctx)
        if positions <= self._n_measured:
            return
        model, size = self.model, int(self.model.bridge.cfg.d_head)
        drawn = torch.randn(size, generator=torch.Generator().manual_seed(0))
        inputs = torch.cat([torch.eye(size), drawn[None]]).to(model.device, model.dtype)
        outputs: dict[tuple[int, str], Tensor] = {}

        def replace_by_inputs(x: Tensor, hook: Any) -> Tensor:
            return inputs[:, None, None].expand_as(x).clone()

        def record(call: AttentionCall) -> Tensor:
            outputs[call.layer, "q"], outputs[call.layer, "k"] = call.q[:, 0].clone(), call.k[:, 0].clone()
            self._scale[call.layer] = float(call.scale)
            return attend(call).out

        pairs = [(f"blocks.{i}.attn.hook_{c}", replace_by_inputs) for i in range(model.n_layers) for c in "qk"]
        with hooks(model, *pairs), model.instrument.handled_by(record):
            model.last_logits(torch.zeros(size + 1, positions, dtype=torch.long, device=model.device))
        tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 2e-2
        for (layer, component), output in outputs.items():
            matrices = output[:-1].transpose(0, 1)  # [position, d_head, d_head]
            if_linear = torch.einsum("d,pde->pe", inputs[-1], matrices)
            if not torch.allclose(if_linear, output[-1], atol=tolerance):
                self._not_linear.add(layer)
            self._matrices[layer, component] = matrices
        self._n_measured = positions
