"""Rows of one recipe, collected and turned into Effects."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch

from interp.errors import InterpError
from interp.metrics import Metric, recovery
from interp.model.model import Model
from interp.model.prompt_provenance import hash_of_prompts, prompt_provenance
from interp.prompts.coder import Encoded
from interp.recipes.targets import Address
from interp.results.effects import COLUMNS, Effects
from interp.sites import Site

log = logging.getLogger("interp")


@dataclass
class EffectRows:
    """Collects the result rows of one recipe and makes Effects of them."""

    intervention: str
    mode: str
    metric: Metric
    columns: dict[str, list[Any]] = field(init=False)
    no_gap: list[bool] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.columns = {c: [] for c in COLUMNS if c not in ("effect", "raw", "prompt", "model", "task")}

    def add(
        self, example: int, site: Site | Address, prompt: Encoded, clean: float, corrupt: float, patched: float,
        sender: Site | None = None, no_gap: bool = False, read_at: str | None = None,
    ) -> None:  # fmt: skip
        """Add one row; position, token and role follow from the site.

        ``sender``: the other end, if the row is about an edge.  ``no_gap``: clean and corrupt score the same within
        rounding, so that the effect is NaN.  ``read_at``: the name of the position that is read; None: the last one.
        """
        # a position counted from the end stays so: it is the same address in prompts of any length
        position = site.position if isinstance(site.position, int) else None
        if isinstance(site.position, str):
            role = site.position
        else:
            role = "" if position is None else prompt.role(position % len(prompt.tokens))
        values = {
            "example": example, "component": site.component, "layer": site.layer, "head": site.head,
            "position": position, "sender": None if sender is None else str(sender),
            "token": "" if position is None else prompt.tokens[position], "role": role,
            "intervention": self.intervention, "mode": self.mode, "metric": self.metric.name,
            "clean": clean, "corrupt": corrupt, "patched": patched, "read_at": read_at,
        }  # fmt: skip
        for name, value in values.items():
            self.columns[name].append(value)
        self.no_gap.append(no_gap)

    def keep_examples(self, stop: int) -> None:
        """Drop the rows of examples from number ``stop`` on."""
        n = sum(number < stop for number in self.columns["example"])
        self.columns = {name: values[:n] for name, values in self.columns.items()}
        self.no_gap = self.no_gap[:n]

    def effects(
        self, model: Model, items: Sequence[Any], prompts: Sequence[Encoded], *, keep_nan: bool = False, **recipe: Any
    ) -> Effects:
        """Return the table, with effects on the recovery scale and the recipe in its provenance.

        ``items``: the prompts as they were given; ``prompts``: as token ids.

        Raises InterpError if the metric came out NaN or infinite, unless ``keep_nan``.
        """
        numbers = {c: torch.tensor(self.columns[c], dtype=torch.float64) for c in ("clean", "corrupt", "patched")}
        if not keep_nan:
            self._refuse_nan(**numbers)
        start = numbers["corrupt"] if self.mode == "denoise" else numbers["clean"]
        effect = recovery(**numbers, mode=self.mode, no_gap=torch.tensor(self.no_gap, dtype=torch.bool))
        raw = numbers["patched"] - start
        hashes = {i: hash_of_prompts([items[i]], [prompts[i]]) for i in dict.fromkeys(self.columns["example"])}
        names = {"prompt": [hashes[i] for i in self.columns["example"]]}
        frame = pd.DataFrame({**self.columns, **names, "effect": effect.numpy(), "raw": raw.numpy()})
        denoising, noising = "(patched − corrupt)/(clean − corrupt)", "(patched − clean)/(corrupt − clean)"
        provenance = {
            **prompt_provenance(model, items, prompts),
            "intervention": self.intervention, "mode": self.mode, "metric": self.metric.name,
            "metric_unit": self.metric.unit, "normalisation": denoising if self.mode == "denoise" else noising,
            **recipe,
        }  # fmt: skip
        effects = Effects(frame, provenance)
        if not keep_nan and (gaps := effects.small_gaps()):
            log.warning("%s", gaps)
        return effects

    def _refuse_nan(self, clean: torch.Tensor, corrupt: torch.Tensor, patched: torch.Tensor) -> None:
        # corrupt is NaN where there is no corrupt run
        broken = ~(patched.isfinite() & clean.isfinite() & ~corrupt.isinf()).numpy()
        if broken.any():
            first = {c: values[broken.argmax()] for c, values in self.columns.items()}
            raise InterpError(
                f"metric {self.metric.name!r} returned NaN or infinity for {int(broken.sum())} of {len(broken)} cells "
                f"(first: example {first['example']}, {first['component']} layer {first['layer']})"
            )
