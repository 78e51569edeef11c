"""Models to learn and to test on: the embedded default, and small ones whose circuit is known.

>>> from interp import zoo
>>> known = zoo.induction()
>>> known.pairs(8, seed=0)[0].answer, known.truth  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.zoo.known import Known, induction, one_head, random

if TYPE_CHECKING:
    from interp.zoo.embedded import embedded_model

__all__ = ["Known", "embedded_model", "induction", "one_head", "random"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `python -m interp.zoo.embedded` does not find its own module imported already.
    if name == "embedded_model":
        from interp.zoo.embedded import embedded_model

        return embedded_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
