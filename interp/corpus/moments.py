"""Mergeable statistics per head: moments, extremes and a quantile sketch.

Moments are count, mean and variance (Chan et al. 1979).

The sketch is a t-digest (Dunning 2019, "Computing extremely accurate quantiles using t-digests") of Apache
DataSketches. The same parts, merged in the same order, give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import datasketches
import numpy as np
import pyarrow as pa
from jaxtyping import Float

from interp.errors import InterpError

TDigest: Any = datasketches.tdigest_double  # type: ignore[attr-defined]

COMPRESSION = 100
MOST_ERRORS = 1000
SCHEMA = pa.schema([
    ("layer", pa.int32()), ("head", pa.int32()), ("statistic", pa.string()), ("count", pa.int64()),
    ("mean", pa.float64()), ("m2", pa.float64()), ("min", pa.float64()), ("max", pa.float64()),
    ("sketch", pa.binary()), ("error", pa.string()),
])  # fmt: skip


class StreamedMoments:
    """Moments, extremes and quantiles of one statistic of every head.

    ``m2``: the sum of squared distances from the mean.
    """

    def __init__(self, layers: int, heads: int):
        shape = layers, heads
        self.count = np.zeros(shape, dtype=np.int64)
        self.mean, self.m2 = np.zeros(shape), np.zeros(shape)
        self.min, self.max = np.full(shape, np.inf), np.full(shape, -np.inf)
        self.sketch = [[TDigest(COMPRESSION) for _ in range(heads)] for _ in range(layers)]

    def add(self, values: Float[np.ndarray, "layers heads n"]) -> None:
        """Add n values of every head. NaN (layers without attention) is ignored."""
        for layer, of_layer in enumerate(values.astype(float)):
            for head, row in enumerate(of_layer):
                row = row[~np.isnan(row)]
                if len(row):
                    mean = row.mean()
                    self._join(layer, head, len(row), mean, float(((row - mean) ** 2).sum()), row.min(), row.max())
                    self.sketch[layer][head].update(np.ascontiguousarray(row))

    def _join(self, layer: int, head: int, n: int, mean: float, m2: float, low: float, high: float) -> None:
        """Merge n values with these moments (Chan et al. 1979)."""
        at = layer, head
        before, total = self.count[at], self.count[at] + n
        gap = mean - self.mean[at]
        self.mean[at] += gap * n / total
        self.m2[at] += m2 + gap**2 * before * n / total
        self.count[at] = total
        self.min[at], self.max[at] = min(self.min[at], low), max(self.max[at], high)

    def rows(self, statistic: str) -> dict[str, list]:
        """Return the moments as columns of `SCHEMA`."""
        columns: dict[str, list] = {name: [] for name in SCHEMA.names}
        for (layer, head), count in np.ndenumerate(self.count):
            at = layer, head
            numbers = (self.mean[at], self.m2[at], self.min[at], self.max[at])
            values = (layer, head, statistic, int(count), *numbers, self.sketch[layer][head].serialize(), None)
            for name, value in zip(SCHEMA.names, values, strict=True):
                columns[name].append(value)
        return columns

    def merge(self, row: dict) -> None:
        """Merge a row of a part's table."""
        if row["count"]:
            layer, head = row["layer"], row["head"]
            self._join(layer, head, row["count"], row["mean"], row["m2"], row["min"], row["max"])
            self.sketch[layer][head].merge(TDigest.deserialize(row["sketch"]))


def table_of(moments: dict[str, StreamedMoments], errors: Sequence[str] = ()) -> pa.Table:
    """Return a part's statistics as a table, one row per statistic and head.

    Each of ``errors``, the reasons why documents were left out, is a separate row.
    """
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    for statistic, of_heads in moments.items():
        for name, values in of_heads.rows(statistic).items():
            columns[name] += values
    for name in columns:
        columns[name] += errors if name == "error" else [None] * len(errors)
    return pa.table(columns, schema=SCHEMA)


def merge_tables(tables: Iterable[pa.Table]) -> tuple[dict[str, StreamedMoments], list[str]]:
    """Merge the tables of all parts.

    Returns the moments by statistic, and why documents were left out (at most `MOST_ERRORS` reasons). Holds one part in
    memory at a time.
    """
    moments: dict[str, StreamedMoments] = {}
    errors = []
    for table in tables:
        rows = table.to_pylist()
        errors += [r["error"] for r in rows if r["error"] is not None][: MOST_ERRORS - len(errors)]
        rows = [r for r in rows if r["error"] is None]
        if not rows:
            continue
        layers, heads = (1 + max(r[c] for r in rows) for c in ("layer", "head"))
        if layers * heads > len(rows):  # a part has a row for every head
            raise InterpError(f"a part names {layers} layers × {heads} heads in {len(rows)} rows: it is damaged")
        for row in rows:
            if row["statistic"] not in moments:
                moments[row["statistic"]] = StreamedMoments(layers, heads)
            moments[row["statistic"]].merge(row)
    return moments, errors
