"""The columns of a sweep's Parquet parts.

``clean``, ``corrupt`` and ``patched`` are stored exactly. ``effect`` and ``raw`` follow from them and from ``mode``: in
the files they are rounded to float32, for queries; `as_frame` computes them again in float64. ``error`` says why a cell
has no number; it is null for all other cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = pa.schema([
    ("model", pa.string()), ("task", pa.string()), ("recipe", pa.string()), ("sites", pa.string()),
    ("seed", pa.int32()), ("part", pa.int32()), ("example", pa.int32()), ("component", pa.string()),
    ("layer", pa.int32()), ("head", pa.int32()), ("position", pa.int32()), ("sender", pa.string()),
    ("token", pa.string()), ("role", pa.string()), ("intervention", pa.string()), ("mode", pa.string()),
    ("metric", pa.string()), ("clean", pa.float64()), ("corrupt", pa.float64()), ("patched", pa.float64()),
    ("effect", pa.float32()), ("raw", pa.float32()), ("error", pa.string()),
    ("read_at", pa.string()),
])  # fmt: skip
LABELS = ("model", "task", "recipe", "sites", "seed", "part")
NUMBERS = ("clean", "corrupt", "patched", "effect", "raw")
DERIVED = ("effect", "raw")


def table_of(frame: pd.DataFrame, labels: dict[str, Any]) -> pa.Table:
    """Return rows as a table with the columns of `SCHEMA`; missing values are null.

    ``labels``: columns that have the same value in every row.
    """
    n = len(frame)
    columns = []
    for column in SCHEMA:
        if column.name in labels:
            columns.append(pa.repeat(pa.scalar(labels[column.name], column.type), n))
        elif column.name in frame:
            columns.append(pa.Array.from_pandas(frame[column.name], type=column.type, safe=False))
        else:
            columns.append(pa.nulls(n, column.type))
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def failed_rows(examples: list[int], reasons: list[str]) -> pd.DataFrame:
    """Return one row for each example without any numbers, with the reason."""
    import pandas as pd

    return pd.DataFrame({"example": examples, "error": reasons})


def as_frame(table: pa.Table) -> pd.DataFrame:
    """Return a table as pandas, with ``effect`` and ``raw`` in float64.

    Both are computed from the exact columns.
    """
    from interp.results.effects import recovery_columns

    frame = table.to_pandas()
    if not set(DERIVED) <= set(frame.columns) or not {"clean", "corrupt", "patched", "mode"} <= set(frame.columns):
        return frame
    columns = recovery_columns(frame)
    # where clean and corrupt scored the same within rounding, the recipe stored NaN
    columns["effect"] = np.where(frame["effect"].isna(), np.nan, columns["effect"])
    return frame.assign(**columns)
