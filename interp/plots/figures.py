"""Plotly figures of effects and attention statistics, to change, show or save.

Each figure has its own theme; plotly's global templates are not changed.
"""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from interp.errors import InterpError
from interp.plots.colors import DIVERGING, SEQUENTIAL, scale
from interp.plots.labels import visible
from interp.plots.panels import COUNTS, INTERVALS, VALUES, VARIANT_KEYS, Axis, EdgePanel, Panel, Variant, split
from interp.results.attention_stats import AttentionStats
from interp.results.effects import Effects

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif"
AXIS_TITLES = {"layer": "layer", "head": "head", "position": "token", "role": "part of the prompt", "all": "",
               "sender": "sender", "receiver": "receiver"}  # fmt: skip


def heatmap(
    effects: Effects,
    *,
    value: str | None = None,
    by: str | None = None,
    example: int | None = None,
    title: str | None = None,
    **conditions: Any,
) -> go.Figure:
    """Draw a layer × head or layer × position map of effects.

    Red is above zero, blue below, with symmetric limits.

        from interp.plots import heatmap
        effects = interp.patch(model, pairs, model.sites("z"))
        heatmap(effects, mode="denoise").show()

    ``value`` is ``"effect"`` (mean recovery), ``"pooled"`` (ratio of means) or ``"raw"`` (change of the metric); by
    default ``"effect"``, or ``"pooled"`` if some pairs have almost no clean–corrupt gap, which the figure says. With
    ``example=`` the map shows one prompt and its tokens; otherwise the mean over examples, with its 95% interval on
    hover. ``by="role"`` puts named spans on the axis, ``by="position"`` positions; by default, positions are used if
    they mean the same in every example. ``conditions`` select among several components, interventions, modes or
    metrics, e.g. ``heatmap(e, component="z", mode="noise")``.
    """
    panel, variant = _only(effects, by, example, conditions)
    value = _checked_value(value, variant)
    cells = {name: grid[0] for name, grid in panel.cells(variant).items()}
    z = cells[value]
    if not np.isfinite(z).any():
        raise InterpError(_nothing_to_show(value, variant))
    limit = float(np.nanmax(np.abs(z))) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=z, zmin=-limit, zmax=limit, zmid=0, colorscale=scale(DIVERGING), xgap=1, ygap=1,
            customdata=np.array([_hover(panel, cells, value, r, c) for r, c in np.ndindex(z.shape)]).reshape(z.shape),
            hovertemplate="%{customdata}<extra></extra>", hoverongaps=False,
            colorbar={"title": {"text": _short(value, variant), "side": "right"}, "thickness": 12},
        )
    )  # fmt: skip
    suffix = "" if example is None else f" · example {example}"
    heading = title if title is not None else f"{panel.component}: {variant.label}{suffix}"
    _frame(figure, heading, panel.rows, panel.columns)
    if panel.component == "mlp_post" and panel.columns.kind == "head":  # `head` is the neuron of mlp_post
        figure.update_xaxes(title_text="neuron")
    figure.add_annotation(
        text=escape(_meaning(value, variant) + _caution(value, variant)), xref="paper", yref="paper", x=0, y=1,
        yanchor="bottom", xanchor="left", showarrow=False, font={"size": 11, "color": "#555"},
    )  # fmt: skip
    return figure


def heads(stats: AttentionStats, statistic: str, *, skip_first: bool = True, title: str | None = None) -> go.Figure:
    """Draw the mean of an attention statistic over positions and examples, by head."""
    if len(stats) == 0:
        raise InterpError("there are no prompts in these attention statistics, so there is nothing to draw")
    z = stats.per_head(statistic, skip_first=skip_first)
    rows, columns = (Axis(k, list(range(n)), [str(i) for i in range(n)])
                     for k, n in zip(("layer", "head"), z.shape, strict=True))  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=z, colorscale=scale(SEQUENTIAL), xgap=1, ygap=1,
            hovertemplate="L%{y}H%{x}: %{z:.4g}<extra></extra>",
            colorbar={"title": {"text": escape(statistic), "side": "right"}, "thickness": 12},
        )
    )  # fmt: skip
    _frame(figure, title if title is not None else f"{statistic}, mean of {len(stats)} prompts", rows, columns)
    return figure


def bars(
    effects: Effects, top: int = 15, *, value: str | None = None, by: str | None = None,
    title: str | None = None, **conditions: Any,
) -> go.Figure:  # fmt: skip
    """Draw the ``top`` sites with the largest absolute means, with 95% intervals."""
    panel, variant = _only(effects, by, None, conditions)
    value = _checked_value(value, variant)
    if top < 1:
        raise InterpError(f"top must be at least 1, got {top}")
    cells = {name: grid[0] for name, grid in panel.cells(variant).items()}
    z = cells[value]
    order = [int(i) for i in np.argsort(-np.nan_to_num(np.abs(z)), axis=None, kind="stable") if np.isfinite(z.flat[i])]
    if not order:
        raise InterpError(_nothing_to_show(value, variant))
    sites = [divmod(i, z.shape[1]) for i in order[:top]][::-1]
    means = np.array([z[site] for site in sites])
    lo, hi = (np.array([cells[end][site] for site in sites]) for end in INTERVALS[value])
    figure = go.Figure(
        go.Bar(
            x=means, y=np.arange(len(sites)), orientation="h",
            marker_color=np.where(means < 0, DIVERGING[2], DIVERGING[-3]),
            error_x={"type": "data", "array": hi - means, "arrayminus": means - lo, "thickness": 1.2, "width": 3},
            customdata=[_hover(panel, cells, value, r, c) for r, c in sites],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )  # fmt: skip
    labels = [escape(site_label(panel, r, c)) for r, c in sites]
    heading = title if title is not None else f"Strongest sites of {panel.component}: {variant.label}"
    figure.update_layout(
        template="plotly_white", font={"family": FONT, "size": 12}, title={"text": escape(heading)},
        xaxis={"title": {"text": _short(value, variant)}, "zeroline": True, "zerolinecolor": "#444"},
        yaxis={"tickvals": list(range(len(sites))), "ticktext": labels, "automargin": True},
        height=120 + 22 * len(sites), width=640,
    )  # fmt: skip
    if caution := _caution(value, variant):
        figure.update_layout(title={"subtitle": {"text": escape(caution.removeprefix("; "))}})
    return figure


def site_label(panel: Panel, row: int, column: int) -> str:
    """Return the name of a cell in lists and on hover: ``L9H6``, ``L3 @7 ·Mary``."""
    if panel.rows.kind == "sender":
        return f"{panel.rows.labels[row]} → {panel.columns.labels[column]}"
    layer = "" if panel.rows.values[row] is None else f"L{panel.rows.values[row]}"
    if panel.columns.kind == "head":
        return f"{layer}{'N' if panel.component == 'mlp_post' else 'H'}{panel.columns.values[column]}"
    label = "" if panel.columns.kind == "all" else panel.columns.labels[column]
    place = f"@{panel.columns.values[column]}" if panel.columns.kind == "position" else ""
    return " ".join(x for x in (layer, place, label) if x and x != place[1:]) or panel.component


def _only(effects: Effects, by: str | None, example: int | None, conditions: dict[str, Any]) -> tuple[Panel, Variant]:
    """Return the single panel and variant that meets the conditions.

    If there are several, the InterpError says how to select one.
    """
    selected = effects.where(**conditions) if conditions else effects
    if len(selected) == 0:
        raise InterpError(f"no effects are left after {conditions or 'reading an empty table'}; nothing to draw")
    panels = split(selected, by=by)
    f = selected.frame()
    choices = {c: list(f[c].dropna().unique()) for c in ("component", *VARIANT_KEYS)}
    if isinstance(panels[0], EdgePanel):
        del choices["component"]  # the columns are receivers, which may have several components
    several = {c: values for c, values in choices.items() if len(values) > 1}
    if several:
        column, values = next(iter(several.items()))
        raise InterpError(
            f"these effects hold several values of {column} ({', '.join(values)}); "
            f"one figure shows one: pass {column}={values[0]!r}"
        )
    if len(panels) > 1:
        raise InterpError("these effects mix sites with different axes (heads, positions, spans); "
                          "choose one kind, e.g. head=… or position=…")  # fmt: skip
    panel = panels[0] if example is None else panels[0].at_example(example)
    if panel.slices is not None and len(panel.slices.values) > 1:
        kind, values = panel.slices.kind, panel.slices.values
        raise InterpError(f"this map has a third axis, {kind}; choose one: pass {kind}={values[0]!r}")
    return panel, panel.variants[0]


def _checked_value(value: str | None, variant: Variant) -> str:
    """Return the value to draw: the given one, or the default of the variant where its recovery is defined."""
    if value is None:
        return "pooled" if variant.small_gaps else "effect"
    if value not in VALUES:
        raise InterpError(f"value must be one of {', '.join(map(repr, VALUES))}, got {value!r}")
    return value


def _caution(value: str, variant: Variant) -> str:
    """Return a short warning about pairs with a small gap; empty if there are none."""
    gaps = variant.small_gaps
    if not gaps:
        return ""
    means = {"effect": "means of recovery are mostly theirs", "pooled": "ratio of means", "raw": "raw change"}
    return f"; {gaps.n} of {gaps.n_pairs} pairs have almost no clean–corrupt gap ({means[value]})"


def _nothing_to_show(value: str, variant: Variant) -> str:
    hint = " (clean and corrupt metric are equal); pass value='raw'" if value != "raw" else ""
    return f"{VALUES[value]} of {variant.label} is NaN at every site{hint}"


def _short(value: str, variant: Variant) -> str:
    unit = f" ({escape(variant.unit)})" if variant.unit else ""
    return f"change of {escape(variant.metric)}{unit}" if value == "raw" else "recovery"


def _meaning(value: str, variant: Variant) -> str:
    if value == "raw":
        return f"red: raises {variant.metric}; blue: lowers it"
    goal = "clean" if variant.mode == "denoise" else "corrupt"
    return f"red: towards the {goal} run (1 = all the way); blue: away from it"


def _hover(panel: Panel, cells: dict[str, np.ndarray], value: str, row: int, column: int) -> str:
    lo, hi = (cells[end][row, column] for end in INTERVALS[value])
    interval = f" [{lo:.3f}, {hi:.3f}]" if np.isfinite(lo) else ""
    raw = "" if value == "raw" else f"<br>raw change {cells['raw'][row, column]:+.3f}"
    return (
        f"<b>{escape(site_label(panel, row, column))}</b><br>{cells[value][row, column]:+.3f}{interval}"
        f"<br>n = {int(cells[COUNTS[value]][row, column])}{raw}"
    )


def _frame(figure: go.Figure, title: str, rows: Axis, columns: Axis) -> None:
    """Set a local theme and labelled axes.

    Ticks are numeric, so that equal tokens stay separate.
    """
    figure.update_layout(
        template="plotly_white", font={"family": FONT, "size": 12}, title={"text": escape(visible_title(title))},
        width=max(420, 180 + 34 * len(columns.values)), height=max(320, 190 + 15 * len(rows.values)),
        margin={"t": 80},
    )  # fmt: skip
    ticks = {"tickmode": "array", "showgrid": False, "zeroline": False, "ticks": "", "automargin": True}
    slanted = 0 if columns.kind in ("head", "all") else -45
    figure.update_xaxes(
        **ticks, tickvals=list(range(len(columns.values))), ticktext=[escape(x) for x in columns.labels],
        tickangle=slanted, title_text=AXIS_TITLES[columns.kind],
    )  # fmt: skip
    figure.update_yaxes(
        **ticks, tickvals=list(range(len(rows.values))), ticktext=rows.labels, autorange="reversed",
        title_text=AXIS_TITLES[rows.kind],
    )  # fmt: skip


def visible_title(title: str) -> str:
    """Return a title on one line, without control characters."""
    return visible(title, 200).replace("·", " ")
