"""Models for learning and testing, most with a known circuit.

They are the embedded default, and small models whose circuit is known.

>>> from interp import zoo
>>> known = zoo.induction()
>>> known.pairs(8, seed=0)[0].answer, known.truth, known.circuit  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.zoo.compiled import tracr_induction
from interp.zoo.composed import greater_than, ioi, two_hop
from interp.zoo.known import Known, induction, one_head, random
from interp.zoo.single_heads import duplicate_token, previous_token
from interp.zoo.trained import Trained, modular_addition, trained_induction

if TYPE_CHECKING:
    from interp.model.embedded import embedded_model

__all__ = [
    "Known", "Trained", "duplicate_token", "embedded_model", "greater_than", "induction", "ioi", "modular_addition",
    "one_head", "previous_token", "random", "tracr_induction", "trained_induction", "two_hop",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazy, so that `python -m interp.model.embedded` runs before its own module is imported.
    if name == "embedded_model":
        from interp.model.embedded import embedded_model

        return embedded_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
