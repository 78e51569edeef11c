"""Split a long table of effects into panels: grids to draw.

Both the plotly figures and the page draw `Panel`s. One panel contains the sites of one component that share their axes.
Its variants are the interventions, modes and metrics that were measured at these sites.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InterpError
from interp.plots.labels import visible
from interp.results.alignment import in_reading_order
from interp.results.effects import SITE_COLUMNS, Effects
from interp.results.gaps import SmallGaps
from interp.results.significance import INTERVAL_WORDS
from interp.sites import Site

VALUES = {
    "effect": "recovery, mean over examples",
    "pooled": "recovery, ratio of means",
    "raw": "raw change",
}
INTERVALS = {"effect": ("lo", "hi"), "pooled": ("pooled_lo", "pooled_hi"), "raw": ("raw_lo", "raw_hi")}
COUNTS = {"effect": "n", "pooled": "n_raw", "raw": "n_raw"}  # the column that counts the examples of a value
CELL_COLUMNS = [c for value, ends in INTERVALS.items() for c in (value, *ends)] + ["n", "n_raw"]

COMPONENT_WORDS = {
    "embed": "token embeddings",
    "resid_pre": "residual stream entering each layer",
    "resid_mid": "residual stream between attention and MLP",
    "resid_post": "residual stream leaving each layer",
    "attn_out": "attention output of each layer",
    "mlp_out": "MLP output of each layer",
    "q": "queries of each head",
    "k": "keys of each head",
    "v": "values of each head",
    "z": "attention heads (z, before the output projection)",
    "result": "attention heads (result, after the output projection)",
    "mlp_post": "neurons of each MLP",
}
VARIANT_KEYS = ("intervention", "mode", "metric", "model", "task", "read_at")  # in the order of Variant's fields
MODE_WORDS = {"denoise": "denoising", "noise": "noising"}
OTHER_ROLE = "other tokens"


@dataclass(frozen=True)
class Variant:
    """One (intervention, mode, metric) of a panel, and its rows.

    ``model`` and ``task`` are "" unless results of several were joined; ``read_at`` is "" for the last position.
    """

    intervention: str
    mode: str
    metric: str
    model: str
    task: str
    read_at: str
    effects: Effects
    rows: np.ndarray  # row numbers in the table that was split

    @property
    def label(self) -> str:
        """A title: ``patch, denoising, logit_diff``, with model and task if there are several."""
        parts = (self.intervention, MODE_WORDS.get(self.mode, self.mode), self.metric_words, self.model, self.task)
        return ", ".join(x for x in parts if x)

    @property
    def metric_words(self) -> str:
        """The metric, and where it is read if that is not the last position."""
        return f"{self.metric} read at {self.read_at}" if self.read_at else self.metric

    @cached_property
    def small_gaps(self) -> SmallGaps:
        """Pairs whose recovery is mostly noise."""
        return self.effects.small_gaps()

    @cached_property
    def n_examples(self) -> int:
        """Number of examples."""
        return int(np.unique(self.effects.frame()["example"].to_numpy()).size)

    @cached_property
    def undefined(self) -> int:
        """Number of examples in which clean and corrupt score the same.

        Their recovery is undefined.
        """
        f: Any = self.effects.frame()
        return int(f.loc[f["effect"].isna() & f["raw"].notna(), "example"].nunique())

    @property
    def default_value(self) -> str:
        """``effect``, or ``pooled`` if some pairs have almost no gap; ``raw`` if recovery is not defined anywhere."""
        if not bool(self.effects.frame()["effect"].notna().any()):
            return "raw"
        return "pooled" if self.small_gaps else "effect"

    @property
    def unit(self) -> str:
        """Unit of the metric, if the provenance states it."""
        return self._stated("metric_unit")

    def _stated(self, key: str) -> str:
        value = self.effects.provenance.get(key)  # a list if Effects.concat joined different parts
        return value if isinstance(value, str) else ""

    def scale(self) -> str:
        """State what 0 and 1 mean, and the intervention."""
        if self.mode == "denoise":
            ends = "Recovery: 0 = the corrupt run, 1 = the clean run (denoising: the corrupt run is repaired)."
        else:
            ends = "Recovery: 0 = the clean run, 1 = the corrupt run (noising: the clean run is disturbed)."
        recipe = self._stated("recipe") or self._stated("ablation")
        return f"{ends} Intervention: {self.intervention}" + (f" ({recipe})." if recipe else ".")

    def spread(self) -> str:
        """State what is averaged, and what the intervals are."""
        if self.n_examples == 1:
            return "One example, so there are no intervals."
        return f"Means of {self.n_examples} examples; {INTERVAL_WORDS}."

    def caution(self) -> str:
        """State how many examples have no recovery, or a noisy one, and why; empty if all is well."""
        return " ".join(x for x in (self._undefined_words(), f"{self.small_gaps}." if self.small_gaps else "") if x)

    def _undefined_words(self) -> str:
        if self.undefined == 0:
            return ""
        why = f"clean and corrupt {self.metric_words} are equal, so the recovery scale is undefined"
        if self.default_value == "raw":
            return f"In all {self.undefined} examples {why}: the raw change is shown instead."
        return f"In {self.undefined} of {self.n_examples} examples {why}; the mean recovery leaves them out."


@dataclass(frozen=True)
class Axis:
    """Values along one side of a grid and the labels to show for them."""

    kind: str  # "layer", "head", "position", "role" or "all"
    values: list[Any]
    labels: list[str]


@dataclass(frozen=True)
class Panel:
    """The sites of one component that share axes.

    Layers are the rows; ``columns`` are across; a selector chooses one of the ``slices``.

    ``slices`` is a third axis: the head of a layer × position map of heads, or the span of a layer × head map measured
    at named spans.
    """

    component: str
    rows: Axis
    columns: Axis
    slices: Axis | None
    variants: list[Variant]

    @property
    def words(self) -> str:
        """The component in words."""
        return COMPONENT_WORDS.get(self.component, self.component)

    @property
    def note(self) -> str:
        """State how positions are counted, where that is not from the first token; else empty."""
        tables = ((v.effects.frame(), v.effects.aligned()) for v in self.variants if self.columns.kind == "position")
        if all(frame["position"].equals(aligned["position"]) for frame, aligned in tables):
            return ""
        return (
            "The prompts differ in length, so their tokens are aligned at the last one: @-1 is the last token of every "
            "prompt. Select an example to see its tokens."
        )

    @property
    def averages_positions(self) -> bool:
        """Whether sites of single tokens are averaged by span; a site can also be a span."""
        single = any(bool(v.effects.frame()["position"].notna().any()) for v in self.variants)
        return self.columns.kind == "role" and single

    def keys(self) -> list[str]:
        """Return the table columns that address a cell, in the order of `cells`."""
        axes = [self.slices, self.rows, self.columns]
        return [a.kind for a in axes if a is not None and a.kind != "all"]

    def cells(self, variant: Variant) -> dict[str, np.ndarray]:
        """Return `Effects.summary` of a variant as arrays [slices, rows, columns].

        NaN means not measured.
        """
        axes = [a for a in (self.slices, self.rows, self.columns) if a is not None]
        shape = tuple(len(a.values) for a in axes)
        summary: Any = variant.effects.summary(by=self.keys())
        where = tuple(
            _index(a.values, summary[a.kind]) if a.kind != "all" else np.zeros(len(summary), dtype=int) for a in axes
        )
        out: dict[str, np.ndarray] = {}
        for name in CELL_COLUMNS:
            grid = np.full(shape, 0.0 if name in COUNTS.values() else np.nan)
            grid[where] = summary[name].to_numpy(dtype=float)
            out[name] = grid.reshape(-1, *shape[-2:])
        return out

    def at_example(self, example: int) -> Panel:
        """Return the panel for one example, with the tokens of that example on the axis."""
        f: Any = pd.concat([v.effects.frame() for v in self.variants])
        if example not in set(f["example"]):
            raise InterpError(f"there is no example {example}; examples: {_list_values(sorted(set(f['example'])))}")
        by = "position" if self.columns.kind == "role" and f["position"].notna().any() else None
        variants = [replace(v, effects=_one_example(v.effects, example)) for v in self.variants]
        part = f[f["example"] == example]
        columns = _columns(part, by or self.columns.kind)
        return Panel(self.component, self.rows, columns, self.slices, [v for v in variants if len(v.effects)])


@dataclass(frozen=True)
class EdgePanel(Panel):
    """Effects of edges (path patching): senders down, receivers across.

    If all senders are heads and there is one receiver, the axes are layer and head of the sender.
    """

    receiver: str = ""  # the one receiver of a layer × head map

    @property
    def words(self) -> str:
        """The content of the panel in words."""
        return f"paths from each head into {self.receiver}" if self.receiver else "paths from senders to receivers"

    def cells(self, variant: Variant) -> dict[str, np.ndarray]:
        """Return `Panel.cells` for the summary by edge."""
        summary: Any = variant.effects.summary(by=["sender", *SITE_COLUMNS])
        rows, columns = edge_ends(summary, bool(self.receiver))
        where = _index(self.rows.values, rows), _index(self.columns.values, columns)
        out = {}
        for name in CELL_COLUMNS:
            empty = 0.0 if name in COUNTS.values() else np.nan
            grid = np.full((1, len(self.rows.values), len(self.columns.values)), empty)
            grid[0][where] = summary[name].to_numpy(dtype=float)
            out[name] = grid
        return out

    def at_example(self, example: int) -> Panel:
        """Return the panel for one example."""
        variants = [replace(v, effects=v.effects.where(example=example)) for v in self.variants]
        measured = [v for v in variants if len(v.effects)]
        if not measured:
            raise InterpError(f"there is no example {example}")
        return replace(self, variants=measured)


def edge_ends(f: Any, one_receiver: bool) -> tuple[pd.Series, pd.Series]:
    """Return row and column of each edge.

    These are sender and receiver, or layer and head of the sender if there is one receiver.
    """
    if one_receiver:
        sites = [Site.parse(s) for s in f["sender"]]
        return pd.Series([s.layer for s in sites]), pd.Series([s.head for s in sites])
    layers = [None if pd.isna(x) else int(x) for x in f["layer"]]
    heads, positions = ([None if pd.isna(x) else x for x in f[column]] for column in ("head", "position"))
    receivers = [str(Site(*at)) for at in zip(f["component"], layers, heads, positions, strict=True)]
    return f["sender"].reset_index(drop=True), pd.Series(receivers)


def edge_panels(f: Any, effects: Effects) -> list[EdgePanel]:
    """Return one panel for all edges, with both ends in the order of computation."""
    _, receivers = edge_ends(f, False)
    senders = [Site.parse(s) for s in f["sender"].unique()]
    one = receivers.nunique() == 1 and all(s.component == "z" and s.position is None for s in senders)
    rows, columns = edge_ends(f, bool(one))
    if one:
        axes = [
            Axis(kind, v := sorted(map(int, x.unique())), [str(i) for i in v])
            for kind, x in (("layer", rows), ("head", columns))
        ]
    else:
        axes = [
            Axis(kind, v := sorted(x.unique(), key=_depth), [visible(s, 28) for s in v])
            for kind, x in (("sender", rows), ("receiver", columns))
        ]
    return [EdgePanel("edges", axes[0], axes[1], None, _variants(f, effects), str(receivers.iloc[0]) if one else "")]


def _depth(text: str) -> tuple[int, int, int, str]:
    site = Site.parse(text)
    late = {"q": 0, "k": 1, "v": 2, "z": 3, "attn_out": 4, "mlp_out": 5, "resid_post": 6}
    return -1 if site.layer is None else site.layer, late.get(site.component, 0), site.head or 0, text


def split(effects: Effects, by: str | None = None) -> list[Panel]:
    """Split a table into panels, in order of appearance.

    Sites with heads and no position become layer × head; sites with positions become layer × position. If prompts
    differ in wording, a position has no common meaning, and the columns are the named spans (``role``) instead. Effects
    of edges become an `EdgePanel`. ``by`` ("position" or "role") overrides the choice.
    """
    if by not in (None, "position", "role"):
        raise InterpError(f"by must be 'position' or 'role', got {by!r}")
    f: Any = effects.aligned()
    if f.empty:
        raise InterpError("there are no effects to draw: the table is empty")
    f["role"] = f["role"].fillna("")
    edges = f["sender"].notna()
    panels: list[Panel] = [*edge_panels(f[edges], effects)] if edges.any() else []
    f = f[~edges]
    for (component, kind, sliced), part in f.groupby(
        ["component", *_geometry(f)], sort=False, dropna=False, observed=True
    ):
        kind = (by or _averaged_kind(part)) if kind == "position" else str(kind)
        rows = _columns(part, "layer")
        slices = _columns(part, str(sliced)) if sliced else None
        panels.append(Panel(str(component), rows, _columns(part, kind), slices, _variants(part, effects)))
    return panels


# Tables have type Any below, because the types of pandas cannot express that a column is a Series.
def _geometry(f: Any) -> list[pd.Series]:
    """Return for each row the axis of the columns, and that of the selector (or "")."""
    heads, positions, spans = f["head"].notna(), f["position"].notna(), f["role"] != ""
    across = np.select([positions, heads, spans], ["position", "head", "role"], "all")
    sliced = np.select([positions & heads, ~positions & heads & spans], ["head", "role"], "")
    return [pd.Series(across, index=f.index, name="across"), pd.Series(sliced, index=f.index, name="sliced")]


def _averaged_kind(part: Any) -> str:
    """Return ``role`` if positions differ between examples and spans exist.

    Else return ``position``.
    """
    if not (part["role"] != "").any():
        return "position"
    tokens = part.drop_duplicates(["example", "position"])
    by_position = tokens.groupby("position").agg(
        tokens=("token", "nunique"), roles=("role", "nunique"), role=("role", "first"), n=("example", "size")
    )
    agrees = (by_position["tokens"] <= 1) | ((by_position["roles"] == 1) & (by_position["role"] != ""))
    is_complete = (by_position["n"] == tokens["example"].nunique()).all()
    return "position" if agrees.all() and is_complete else "role"


def _columns(part: Any, kind: str) -> Axis:
    """Return the distinct values of one address column in reading order, with labels."""
    if kind == "all":
        return Axis("all", [None], ["all positions"])
    if kind == "role":
        place = part.groupby("role", sort=False)["position"].mean().astype(float).fillna(0)
        roles = [str(r) for r in place.sort_values(kind="stable").index]
        roles.sort(key=lambda r: r == "")  # tokens outside named spans come last
        return Axis("role", roles, [visible(r, 18) if r else OTHER_ROLE for r in roles])
    values = in_reading_order(part[kind].dropna().unique())
    if kind == "layer" and part[kind].isna().any():
        return Axis("layer", [None, *values], ["–", *(str(v) for v in values)])
    if kind != "position":
        return Axis(kind, values, [str(v) for v in values])
    return Axis(kind, values, _position_labels(part, values))


def _position_labels(part: Any, values: list[int]) -> list[str]:
    """Label positions by the token or the role that all examples share, or by number."""
    labels = []
    groups = part.groupby("position")[["token", "role"]].agg(["nunique", "first"])
    for value in values:
        row = groups.loc[value]
        if row[("token", "nunique")] == 1:
            labels.append(visible(row[("token", "first")], 18))
        elif row[("role", "nunique")] == 1 and row[("role", "first")]:
            labels.append(f"‹{visible(row[('role', 'first')], 16)}›")
        else:
            labels.append(str(value))
    return labels


def _variants(part: Any, effects: Effects) -> list[Variant]:
    groups = part.groupby(list(VARIANT_KEYS), sort=False, dropna=False, observed=True)
    variants = []
    for keys, rows in groups:
        names = ["" if pd.isna(k) else str(k) for k in keys]
        numbers = rows.index.to_numpy()
        fields: dict[str, Any] = dict(zip(VARIANT_KEYS, names, strict=True))
        variants.append(Variant(**fields, effects=effects.take(numbers), rows=numbers))
    return variants


def _one_example(effects: Effects, example: int) -> Effects:
    """Return the rows of one example, with positions counted from its own first token."""
    return Effects(effects.where(example=example).frame(), effects.provenance)


def _index(values: list[Any], column: pd.Series) -> np.ndarray:
    place = {value: i for i, value in enumerate(values)}
    return np.array([place[None if pd.isna(v) else v] for v in column], dtype=int)


def _list_values(values: list[Any], limit: int = 12) -> str:
    return ", ".join(str(v) for v in values[:limit]) + (", …" if len(values) > limit else "")
