"""Attention statistics over a corpus of any length.

Documents are streamed; the statistics of every head can be merged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from interp.corpus.run import CorpusStatistics, statistics

__all__ = ["CorpusStatistics", "statistics"]

__getattr__, __dir__ = lazy_exports(__name__, {"run": ("CorpusStatistics", "statistics")})
