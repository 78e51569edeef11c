"""The memory that a sweep may take besides the weights, and what fits into it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from interp.engine.cost import BlockCost
from interp.errors import InterpError
from interp.model.model import Model
from interp.sites import COMPONENTS

UNITS = {"": 1, "b": 1} | {
    f"{prefix}{i}b": (1024 if i else 1000) ** power
    for power, prefix in enumerate("kmgt", 1)
    for i in ("", "i")
}  # fmt: skip
LOGIT_COPIES = 3  # a batch's logits as they are, in float32, and the intermediate result of a metric


def as_bytes(memory: int | float | str | None) -> int | None:
    """Read ``4 * 2**30``, ``"4GiB"`` or ``"500 MB"`` as bytes; None stays None.

    Raises InterpError for other values.
    """
    if memory is None:
        return None
    number: float | None = None
    if isinstance(memory, int | float) and not isinstance(memory, bool):
        number = float(memory)
    elif isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", memory)
        if match and match[2].lower() in UNITS:
            number = float(match[1]) * UNITS[match[2].lower()]
    if number is None or not 1 <= number < float("inf"):
        raise InterpError(f"memory={memory!r}: a number of bytes is expected, or a size like '4GiB' or '500MB'")
    return int(number)


def component_width(model: Model, component: str) -> int:
    """How many scalars a component has per token and layer."""
    d_head = int(model.bridge.cfg.d_head)
    sizes = {
        "q": model.n_heads * d_head, "z": model.n_heads * d_head, "k": model.n_kv_heads * d_head,
        "v": model.n_kv_heads * d_head, "result": model.n_heads * model.d_model,
    }  # fmt: skip
    if component == "mlp_post":
        return model.n_neurons
    return sizes.get(component, model.d_model)


class Budget:
    """Bytes besides the weights, calculated: base runs, packed rows, and logits."""

    def __init__(self, model: Model, limit: int | None):
        self.limit = limit
        self.size = torch.finfo(model.dtype).bits // 8
        self.model = model
        self.row = BlockCost.of(model).bytes
        self.logits = int(model.bridge.cfg.d_vocab) * self.size

    def run(self, length: int, components: Sequence[str]) -> float:
        """Bytes of a base run of ``length`` tokens that stores ``components``."""
        model = self.model
        stored = [c for c in components if c not in ("resid_pre", "resid_post")]
        layers = sum(component_width(model, c) * (model.n_layers if COMPONENTS[c].per_layer else 1) for c in stored)
        keys = model.n_layers * (component_width(model, "k") + component_width(model, "v"))
        return self.size * length * ((model.n_layers + 1) * model.d_model + keys + layers) + self.logits

    def cell(self, length: int) -> float:
        """Bytes of a cell that changes ``length`` rows."""
        return length * self.row + LOGIT_COPIES * self.logits

    def check(self, length: int, held: float) -> None:
        """Raise InterpError if no cell fits next to ``held`` bytes of base runs."""
        need = held + self.cell(length)
        if self.limit is not None and need > self.limit:
            raise InterpError(
                f"memory={_unit(self.limit)} is too small for one cell on a prompt of {length} tokens: its base runs "
                f"take about {_unit(held)} and the cell {_unit(self.cell(length))}, besides the model's weights. Give "
                f"at least memory={_unit(1.01 * need)!r}, or use shorter prompts or a smaller dtype"
            )

    def batch(self, held: float, rows: int, cells: int) -> tuple[int, int]:
        """How many rows and cells one forward may have next to ``held`` bytes.

        The result is at most ``rows`` and ``cells``.
        """
        if self.limit is None:
            return rows, cells
        free = max(self.limit - held, 0)
        cells = max(1, min(cells, int(free / 4 / (LOGIT_COPIES * self.logits))))
        for_rows = free - cells * LOGIT_COPIES * self.logits
        return max(1, min(rows, int(for_rows / self.row))), cells


def _unit(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.{3 if n < 1000 else 4}g}{unit}"
        n /= 1024
    return f"{n:.3g}GiB"
