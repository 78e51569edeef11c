"""Pictures of results: plotly figures to work with, and the report page to send.

Reads Effects and AttentionStats as tables and arrays; never needs a model.
"""

from __future__ import annotations

from interp.plots.figures import bars, heads, heatmap
from interp.plots.report import Report, report

__all__ = ["Report", "bars", "heads", "heatmap", "report"]
