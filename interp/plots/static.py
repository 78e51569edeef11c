"""A report's results as plotly figures."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from interp.plots.circuit_payload import CurveLike
from interp.plots.figures import heads, heatmap
from interp.plots.panels import split
from interp.plots.relations import attention_map, faithfulness
from interp.results.attention_patterns import AttentionPatterns, head_name
from interp.results.attention_stats import AttentionStats
from interp.results.effects import Effects


def figures_of(sections: list[tuple[str | None, Any]]) -> dict[str, go.Figure]:
    """Return figures by name, for all results that can be drawn as a plotly figure.

    These are a map for each panel and variant of effects and for each statistic, curves, and the patterns of the first
    prompt for the exact heads (or the first head if there are none). Panels with a third axis, and circuits, have none.
    """
    figures: dict[str, go.Figure] = {}
    for number, (name, result) in enumerate(sections, 1):
        label = name or f"result {number}"
        if isinstance(result, Effects):
            for panel in split(result):
                if panel.slices is not None:
                    continue
                for v in panel.variants:
                    value = v.default_value
                    if bool(v.effects.frame()[value].notna().any()):
                        figures[f"{label}: {panel.component}, {v.label}"] = heatmap(v.effects, value=value)
        elif isinstance(result, AttentionStats):
            for statistic in result.names:
                if result.values[statistic][0].dtype.kind == "f":
                    figures[f"{label}: {statistic}"] = heads(result, statistic)
        elif isinstance(result, AttentionPatterns):
            for head in result.exact or result.heads[:1]:
                figures[f"{label}: {head_name(head)}"] = attention_map(result, head)
        elif isinstance(result, CurveLike):
            figures[f"{label}: faithfulness curve"] = faithfulness(result)
    return figures
