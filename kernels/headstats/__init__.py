"""Attention that also reports what each head did.

Needs torch; triton only for the Triton backend.
"""

from headstats.api import Attended, attend
from headstats.edit import Edit
from headstats.patterns import PooledPattern, pattern_rows, pooled_pattern, segment_mass
from headstats.saliency import Saliency, saliency
from headstats.spec import AttentionStats, StatSpec
from headstats.stats import STATISTICS, Statistic, TopK
from headstats.summary import HeadSummary, Moments

__all__ = [
    "STATISTICS",
    "Attended",
    "AttentionStats",
    "Edit",
    "HeadSummary",
    "Moments",
    "PooledPattern",
    "Saliency",
    "StatSpec",
    "Statistic",
    "TopK",
    "attend",
    "pattern_rows",
    "pooled_pattern",
    "saliency",
    "segment_mass",
]
