"""Plotly figures of patterns, faithfulness, estimates and layers.

As in `interp.plots.figures`, each figure has its own theme, and plotly's global templates are not changed.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from interp.errors import InterpError
from interp.plots.circuit_payload import CurveLike
from interp.plots.colors import DIVERGING, SEQUENTIAL, scale
from interp.plots.figures import FONT
from interp.plots.labels import visible
from interp.plots.panels import INTERVALS, VARIANT_KEYS
from interp.results.attention_patterns import AttentionPatterns, Head, as_head, head_name
from interp.results.effects import SITE_COLUMNS, Effects
from interp.results.span_stats import SpanStats

LINE = DIVERGING[2]


def attention_map(
    patterns: AttentionPatterns, head: Head | str, *, example: int = 0, run: str = "clean", title: str | None = None
) -> go.Figure:
    """Draw the attention pattern of one head: queries down, keys across, colour by √p.

    ``head``: ``(9, 6)`` or ``"L9H6"``. In a long prompt each cell shows the largest weight of the tokens in it. Raises
    InterpError for a head, example or run that was not collected.
    """
    p, prompt = patterns.map(head, example, run), patterns.examples[example]
    figure = go.Figure(
        go.Heatmap(z=np.sqrt(p), customdata=p, colorscale=scale(SEQUENTIAL), zmin=0, zmax=1,
                   hovertemplate="%{y} → %{x}: %{customdata:.3f}<extra></extra>",
                   colorbar={"title": {"text": "√p", "side": "right"}, "thickness": 12})
    )  # fmt: skip
    heading = title or f"{head_name(as_head(head))}, {run}, prompt {example}"
    figure.update_layout(**_theme(heading), width=560, height=560)
    figure.update_yaxes(title_text="query", autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="key", showgrid=False)
    if not prompt.pooled and prompt.n_tokens <= 60:
        labels = [escape(visible(t, 18)) for t in prompt.runs[run].tokens]
        ticks = {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": labels}
        figure.update_xaxes(**ticks, tickangle=-45)
        figure.update_yaxes(**ticks)
    return figure


def span_map(stats: SpanStats, head: Head | str, *, statistic: str = "segments", title: str | None = None) -> go.Figure:
    """Draw what each span reads of each, by one head: query spans down, key spans across; the mean over examples.

        from interp.plots import span_map
        span_map(model.attention_stats(prompts, by="span"), "L9H6").show()

    ``statistic``: one between spans with a number for each pair. A pair of spans that no example has is empty. Raises
    InterpError for a head or a statistic that was not collected.
    """
    layer, number = as_head(head)
    arrays = stats.between.get(statistic)
    if arrays is None or arrays[0].ndim != 4:
        names = ", ".join(name for name, x in stats.between.items() if x[0].ndim == 4)
        raise InterpError(
            f"statistic {statistic!r}: one number for each pair of spans expected, as in {names or 'none'}"
        )
    if not (0 <= layer < arrays[0].shape[0] and 0 <= number < arrays[0].shape[1]):
        raise InterpError(f"{head_name((layer, number))} is no head of {arrays[0].shape[0]} layers")
    queries, keys = (list(dict.fromkeys(n for one in s for n in one)) for s in (stats.query_spans, stats.key_spans))
    together = [set(q) for q in stats.query_spans], [set(k) for k in stats.key_spans]
    z = np.full((len(queries), len(keys)), np.nan)
    for row, query in enumerate(queries):
        for column, key in enumerate(keys):
            if any(query in q and key in k for q, k in zip(*together, strict=True)):
                z[row, column] = stats.per_head(query, key, statistic)[layer, number]
    bar = {"title": {"text": statistic, "side": "right"}, "thickness": 12}
    figure = go.Figure(
        go.Heatmap(z=z, x=[escape(k) for k in keys], y=[escape(q) for q in queries], colorscale=scale(SEQUENTIAL),
                   zmin=0, xgap=1, ygap=1, hovertemplate="%{y} → %{x}: %{z:.3f}<extra></extra>", colorbar=bar)
    )  # fmt: skip
    figure.update_layout(**_theme(title or f"{head_name((layer, number))}: {statistic}"), width=560, height=480)
    figure.update_yaxes(title_text="query span", autorange="reversed", showgrid=False)
    figure.update_xaxes(title_text="key span", showgrid=False)
    return figure


def faithfulness(curve: CurveLike, *, title: str | None = None) -> go.Figure:
    """Draw the faithfulness of circuits by size, with its 95% band.

    The title names the ablation.
    """
    f = curve.frame()
    figure = go.Figure()
    if np.isfinite(f["lo"]).all():
        figure.add_scatter(
            x=[*f["size"], *f["size"][::-1]], y=[*f["hi"], *f["lo"][::-1]], fill="toself", line={"width": 0},
            fillcolor="rgba(67,147,195,0.2)", hoverinfo="skip", showlegend=False,
        )  # fmt: skip
    figure.add_scatter(
        x=f["size"], y=f["faithfulness"], customdata=f["edges"], mode="lines+markers", line={"color": LINE},
        hovertemplate="%{x:.2%} of edges (%{customdata}): %{y:.3f}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.add_hline(y=1, line={"color": "#888", "dash": "dot"})
    recipe = f"outside the circuit: {curve.recipe.get('ablation', 'not stated')}"
    figure.update_layout(**_theme(title or f"Faithfulness by circuit size ({recipe})"), width=620, height=400)
    figure.update_xaxes(type="log", title_text="share of edges", tickformat=".1%")
    figure.update_yaxes(title_text="faithfulness")
    return figure


def exact_against_estimated(
    exact: Effects, estimated: Effects, *, value: str = "raw", title: str | None = None
) -> go.Figure:
    """Draw exact against estimated effects of each site, with their correlation.

    Raises InterpError if the tables have no site in common.
    """
    keys = [*SITE_COLUMNS, "sender", "mode"]
    tables = [e.summary(by=keys) for e in (exact, estimated)]
    keys += [c for c in ("model", "task", "metric") if all(c in t for t in tables)]
    left, right = (t[[*keys, value]] for t in tables)
    both: Any = pd.merge(left, right, on=keys, suffixes=("_exact", "_estimated")).dropna(
        subset=[f"{value}_exact", f"{value}_estimated"]
    )
    if both.empty:
        raise InterpError("exact and estimated effects have no site in common: nothing to compare")
    x, y = both[f"{value}_estimated"], both[f"{value}_exact"]
    ends = [float(min(x.min(), y.min())), float(max(x.max(), y.max()))]
    names = [
        " ".join(str(v) for v in row if not pd.isna(v)) for row in both[list(SITE_COLUMNS)].itertuples(index=False)
    ]
    figure = go.Figure()
    quiet: dict[str, Any] = {"hoverinfo": "skip", "showlegend": False}
    figure.add_scatter(x=ends, y=ends, mode="lines", line={"color": "#888", "dash": "dot"}, **quiet)
    figure.add_scatter(
        x=x, y=y, mode="markers", marker={"color": LINE, "size": 6}, text=[escape(n) for n in names],
        hovertemplate="%{text}<br>estimated %{x:.3f}, exact %{y:.3f}<extra></extra>", showlegend=False,
    )  # fmt: skip
    r = float(np.corrcoef(x, y)[0, 1]) if len(both) > 2 else float("nan")
    heading = title or f"Exact against estimated, {len(both)} sites, r = {r:.3f}"
    figure.update_layout(**_theme(heading), width=520, height=500)
    figure.update_xaxes(title_text=f"estimated ({value})")
    figure.update_yaxes(title_text=f"exact ({value})")
    return figure


def layer_curve(effects: Effects, *, value: str = "effect", title: str | None = None) -> go.Figure:
    """Draw the mean effect of each layer with its 95% interval.

    Each component and intervention has its own line.
    """
    rows: Any = effects.summary(by=["component", *VARIANT_KEYS, "layer"])
    f = rows.dropna(subset=["layer", value])
    if f.empty:
        raise InterpError(f"no layer has a {value!r} to draw")
    lo, hi = INTERVALS[value]
    figure = go.Figure()
    for names, part in f.groupby(["component", *VARIANT_KEYS], sort=False, dropna=False):
        part = part.sort_values("layer")
        label = escape(", ".join(str(n) for i, n in enumerate(names) if i != 3 and not pd.isna(n)))
        error = {"type": "data", "array": part[hi] - part[value], "arrayminus": part[value] - part[lo], "thickness": 1}
        figure.add_scatter(x=part["layer"], y=part[value], error_y=error, mode="lines+markers", name=label)
    figure.update_layout(**_theme(title or "Effect by layer"), width=680, height=400)
    figure.update_xaxes(title_text="layer")
    figure.update_yaxes(title_text="recovery" if value != "raw" else "raw change")
    return figure


def _theme(title: str) -> dict[str, Any]:
    return {
        "template": "plotly_white", "font": {"family": FONT, "size": 12}, "title": {"text": escape(title)},
        "margin": {"t": 70},
    }  # fmt: skip
