"""Effects and attention statistics as JSON, for the page and for `Report.read`.

Means and intervals are plain numbers, so that other programs can read them. The full tables are packed (see `codec`),
exact to the last bit. Patterns, circuits and curves have their own modules.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InterpError
from interp.plots.codec import pack, pack_dictionary, unpack, unpack_dictionary
from interp.plots.labels import visible
from interp.plots.panels import COUNTS, VARIANT_KEYS, Axis, EdgePanel, Panel, Variant, split
from interp.results.attention_stats import KEY_STATISTICS, AttentionStats
from interp.results.effects import ADDED, COLUMNS, Effects, recovery_columns
from interp.sites import COMPONENTS
from interp.utils.damage import Budget


def clean_json(value: Any) -> Any:
    """Convert any value to strict JSON.

    Numpy scalars become numbers, NaN and infinity become text, and other types become str.
    """
    if isinstance(value, dict):
        return {str(k): clean_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | np.ndarray):
        return [clean_json(v) for v in value]
    if isinstance(value, np.generic):
        return clean_json(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def numbers(array: np.ndarray) -> list[float | None]:
    """Return row-major floats, with None for NaN and infinity."""
    return [x if math.isfinite(x) else None for x in np.asarray(array, dtype=float).reshape(-1).tolist()]


# ---- effects -------------------------------------------------------------------------------------------


def encode_effects(effects: Effects, provenance: dict[str, Any]) -> dict[str, Any]:
    """Encode one Effects as JSON: the panels with their summaries, and the table."""
    f: Any = effects.frame()
    table: dict[str, Any] = {}
    derived = recovery_columns(f)  # stored only if the table holds other values
    for column, dtype in COLUMNS.items():
        if column in derived and np.array_equal(f[column].to_numpy(), derived[column], equal_nan=True):
            table[column] = {"derived": True}  # the page and `decode_effects` compute the same bits again
        elif dtype == "float64":
            table[column] = pack(f[column].to_numpy())
        else:
            table[column] = pack_dictionary(f[column])
    panels = split(effects)
    return {
        "kind": "effects",
        "rows": len(f),
        "provenance": provenance,
        "panels": [_encode_panel(panel) for panel in panels],
        "row_variants": pack(_row_variants(panels, len(f))),
        "token_labels": [visible(t, 18) for t in table["token"]["values"]],
        "examples": _example_titles(f),
        "table": table,
    }


def decode_effects(data: dict[str, Any], budget: Budget) -> Effects:
    """Decode what `encode_effects` made."""
    table: dict[str, Any] = data["table"]
    columns: dict[str, Any] = {}
    for column, dtype in COLUMNS.items():
        if "derived" in table.get(column, ()) or (column not in table and column in ADDED):
            continue
        packed = table[column]
        values = unpack(packed, budget) if "data" in packed else unpack_dictionary(packed, dtype, budget)
        if values.shape != (data["rows"],):
            raise InterpError(f"the column {column} has shape {values.shape}, and the table {data['rows']!r:.40} rows")
        columns[column] = values
    f = pd.DataFrame(columns)
    budget.take(16 * len(f))
    derived = recovery_columns(f)
    for column in COLUMNS:
        if "derived" in table.get(column, ()):
            f[column] = derived[column]
    return Effects(f, dict(data["provenance"]))


def _encode_panel(panel: Panel) -> dict[str, Any]:
    return {
        "component": panel.component,
        "words": panel.words,
        "is_site": panel.component in COMPONENTS,
        "averages_positions": panel.averages_positions,
        "note": panel.note,
        "rows": _encode_axis(panel.rows),
        "columns": _encode_axis(panel.columns),
        "slices": None if panel.slices is None else _encode_axis(panel.slices),
        "edge": {"receiver": panel.receiver} if isinstance(panel, EdgePanel) else None,
        "variants": [_encode_variant(panel, v) for v in panel.variants],
    }


def _row_variants(panels: list[Panel], n_rows: int) -> np.ndarray:
    """Return the variant of each row of the table, numbered through all panels."""
    owner = np.zeros(n_rows, dtype=np.int32)
    for i, variant in enumerate(v for panel in panels for v in panel.variants):
        owner[variant.rows] = i
    return owner


def _encode_axis(axis: Axis) -> dict[str, Any]:
    return {"kind": axis.kind, "values": axis.values, "labels": axis.labels}


def _encode_variant(panel: Panel, variant: Variant) -> dict[str, Any]:
    cells = {name: numbers(grid) for name, grid in panel.cells(variant).items()}
    for count in set(COUNTS.values()):
        cells[count] = [int(n or 0) for n in cells[count]]
    return {
        **{key: getattr(variant, key) for key in VARIANT_KEYS},
        "unit": variant.unit,
        "n": variant.n_examples,
        "value": variant.default_value,
        "scale": variant.scale(),
        "spread": variant.spread(),
        "caution": variant.caution(),
        "cells": cells,
    }


def _example_titles(f: pd.DataFrame) -> list[dict[str, Any]]:
    """Return number and first words of every example; no words if tokens are missing."""
    tokens = f.dropna(subset=["position"]).drop_duplicates(["example", "position"])
    tokens = tokens.sort_values("position", key=lambda p: p.where(p >= 0, p + tokens["position"].max() + 2**31))
    texts = {e: "".join(visible(t, 18) for t in part["token"]) for e, part in tokens.groupby("example")}
    return [
        {"id": int(e), "text": texts.get(e, "").replace("·", " ").strip()[:60]} for e in sorted(f["example"].unique())
    ]


# ---- attention statistics ------------------------------------------------------------------------------


def encode_attention(stats: AttentionStats, provenance: dict[str, Any]) -> dict[str, Any]:
    """Encode attention statistics as JSON with per-head means.

    The report adds examples one by one.
    """
    return {
        "kind": "attention",
        "provenance": provenance,
        "backends": {str(k): v for k, v in stats.backends.items()},
        "n": len(stats),
        "layers": stats.n_layers,
        "heads": stats.n_heads,
        "statistics": [_encode_statistic(stats, name) for name in stats.names],
        "examples": [],
    }


def _encode_statistic(stats: AttentionStats, name: str) -> dict[str, Any]:
    definitions = stats.provenance.get("definitions")
    definition = definitions.get(name) if isinstance(definitions, dict) else None
    is_position = stats.values[name][0].dtype.kind in "iu"  # the mean of positions has no meaning
    return {
        "name": name,
        "per": "key" if name in KEY_STATISTICS else "query",
        "definition": definition if isinstance(definition, str) else "",
        "mean": None if is_position else numbers(stats.per_head(name)),
    }


def encode_example(stats: AttentionStats, i: int, every: int = 1) -> dict[str, Any]:
    """Encode the tokens of a prompt, with all statistics at every ``every``-th token."""
    tokens = stats.tokens[i][::every]
    return {
        "tokens": tokens,
        "labels": [visible(t, 18) for t in tokens],
        "every": every,
        "values": {name: pack(stats.values[name][i][..., ::every]) for name in stats.names},
    }


def decode_attention(data: dict[str, Any], budget: Budget) -> AttentionStats:
    """Decode the AttentionStats of a report, with the examples that the page contains."""
    examples = data["examples"]
    names = [s["name"] for s in data["statistics"]]
    values: dict[str, Any] = {name: [unpack(e["values"][name], budget) for e in examples] for name in names}
    provenance = dict(data["provenance"])
    if len(examples) < data["n"]:
        provenance = {**provenance, "report_examples": f"first {len(examples)} of {data['n']}"}
    every = max((e.get("every", 1) for e in examples), default=1)
    if every > 1:
        provenance = {**provenance, "report_tokens": f"every {every}th"}
    backends = {int(k): v for k, v in data["backends"].items()}
    return AttentionStats([list(e["tokens"]) for e in examples], values, backends, provenance)


# ---- prose, and the whole block ------------------------------------------------------------------------


def encode_prose(text: str, _: dict[str, Any]) -> dict[str, Any]:
    """Encode a paragraph between results."""
    return {"kind": "prose", "text": text}


def decode_prose(data: dict[str, Any], _: Budget) -> str:
    """Decode what `encode_prose` made."""
    return str(data["text"])


def dump(payload: dict[str, Any]) -> str:
    """Write JSON that is safe inside ``<script>``.

    It is pure ASCII, without the characters that HTML interprets.
    """
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text  # ensure_ascii has already escaped U+2028 and U+2029
