"""Attention that also tells what each head did. Needs torch; triton only for the Triton backend."""

from headstats.api import Attended, attend
from headstats.edit import Edit
from headstats.spec import AttentionStats, StatSpec
from headstats.stats import STATISTICS, Statistic, TopK

__all__ = ["STATISTICS", "Attended", "AttentionStats", "Edit", "StatSpec", "Statistic", "TopK", "attend"]
