"""Attention statistics over a corpus of any length: documents streamed, per-head statistics that can be merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.corpus.run import CorpusStatistics, statistics

__all__ = ["CorpusStatistics", "statistics"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from interp.corpus import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
