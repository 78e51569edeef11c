"""Models to learn and to test on: the embedded default, and small ones whose circuit is known.

>>> from interp import zoo
>>> known = zoo.induction()
>>> known.pairs(8, seed=0)[0].answer, known.truth, known.circuit  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.zoo.composed import greater_than, ioi, two_hop
from interp.zoo.known import Known, induction, one_head, random
from interp.zoo.single_heads import duplicate_token, previous_token

if TYPE_CHECKING:
    from interp.zoo.embedded import embedded_model

__all__ = [
    "Known", "duplicate_token", "embedded_model", "greater_than", "induction", "ioi", "one_head", "previous_token",
    "random", "two_hop",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    # Lazy, so that `python -m interp.zoo.embedded` does not find its own module imported already.
    if name == "embedded_model":
        from interp.zoo.embedded import embedded_model

        return embedded_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
