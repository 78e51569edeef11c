"""Figures of results: plotly figures to work with, and the report page to share.

This package reads results as tables and arrays. It never needs a model.
"""

from __future__ import annotations

from interp.plots.figures import bars, heads, heatmap
from interp.plots.relations import attention_map, exact_against_estimated, faithfulness, layer_curve, span_map
from interp.plots.report import Report, report

__all__ = [
    "Report", "attention_map", "bars", "exact_against_estimated", "faithfulness", "heads", "heatmap", "layer_curve",
    "report", "span_map",
]  # fmt: skip
