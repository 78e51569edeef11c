"""What the modules that `interp.model.model` imports use of its `Model`.

Everywhere else annotate `Model` itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from interp.model.instrument import Instrument
from interp.model.protocols import Bridge
from interp.model.session import Session
from interp.prompts.coder import Coder
from interp.prompts.images import ImageReader
from interp.prompts.special_tokens import SpecialTokens


class LoadedModel(Protocol):
    """The part of `Model` that its own helpers use."""

    name: str
    instruments: dict[str, Instrument]
    instrument: Instrument
    reads: str
    tokenizer: Any
    special_tokens: SpecialTokens
    session: Session

    @property
    def bridge(self) -> Bridge:
        """As `Model.bridge`."""
        ...

    @property
    def stacks(self) -> list[str]:
        """As `Model.stacks`."""
        ...

    @property
    def n_layers(self) -> int:
        """As `Model.n_layers`."""
        ...

    @property
    def n_heads(self) -> int:
        """As `Model.n_heads`."""
        ...

    @property
    def attention_layers(self) -> list[int]:
        """As `Model.attention_layers`."""
        ...

    @property
    def n_ctx(self) -> int:
        """As `Model.n_ctx`."""
        ...

    @property
    def device(self) -> torch.device:
        """As `Model.device`."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """As `Model.dtype`."""
        ...

    @property
    def coder(self) -> Coder:
        """As `Model.coder`."""
        ...

    @property
    def pictures(self) -> ImageReader | None:
        """As `Model.pictures`."""
        ...

    @property
    def headless(self) -> bool:
        """As `Model.headless`."""
        ...

    @property
    def masked(self) -> bool:
        """As `Model.masked`."""
        ...

    def forward(self, prompts: Tensor | Sequence[Sequence[int]], last: int = 1) -> Tensor:
        """As `Model.forward`."""
        ...

    def check_axes(self, component: str) -> None:
        """As `Model.check_axes`."""
        ...

    def layers_with(self, component: str) -> list[int]:
        """As `Model.layers_with`."""
        ...

    def provenance(self) -> dict[str, Any]:
        """As `Model.provenance`."""
        ...
