"""The columns of a run's Parquet parts, and how they are packed.

``clean``, ``corrupt`` and ``patched`` are kept to the last bit. ``effect`` and ``raw`` follow from them and from
``mode``: in the files they are rounded to float32, for queries; `as_frame` works them out anew. ``error`` says why a
cell has no number; it is null for all others.
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
])  # fmt: skip
LABELS = ("model", "task", "recipe", "sites", "seed", "part")
NUMBERS = ("clean", "corrupt", "patched", "effect", "raw")
DERIVED = ("effect", "raw")


def table_of(frame: pd.DataFrame, labels: dict[str, Any]) -> pa.Table:
    """Rows in the columns of `SCHEMA`; what is missing is null."""
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
    """One row for each example that has no numbers at all, saying why."""
    import pandas as pd

    return pd.DataFrame({"example": examples, "error": reasons})


def as_frame(table: pa.Table) -> pd.DataFrame:
    """A table as pandas, ``effect`` and ``raw`` in float64, worked out from the exact columns."""
    from interp.results.effects import recovery_columns

    frame = table.to_pandas()
    if not set(DERIVED) <= set(frame.columns) or not {"clean", "corrupt", "patched", "mode"} <= set(frame.columns):
        return frame
    columns = recovery_columns(frame)
    # where clean and corrupt scored the same within rounding, the recipe stored NaN
    columns["effect"] = np.where(frame["effect"].isna(), np.nan, columns["effect"])
    return frame.assign(**columns)
