"""Per-head statistics that can be merged: count, mean and variance (Chan et al. 1979), extremes, a quantile sketch.

The sketch is a t-digest (Dunning 2019, "Computing extremely accurate quantiles using t-digests") of Apache
DataSketches. Merged in the same order, the same parts give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import datasketches
import numpy as np
import pyarrow as pa
from jaxtyping import Float

TDigest: Any = datasketches.tdigest_double  # type: ignore[attr-defined]

COMPRESSION = 100
SCHEMA = pa.schema([
    ("layer", pa.int32()), ("head", pa.int32()), ("statistic", pa.string()), ("count", pa.int64()),
    ("mean", pa.float64()), ("m2", pa.float64()), ("min", pa.float64()), ("max", pa.float64()),
    ("sketch", pa.binary()), ("error", pa.string()),
])  # fmt: skip


class Moments:
    """Of one statistic of every head. ``m2``: the sum of squared distances from the mean."""

    def __init__(self, layers: int, heads: int):
        shape = layers, heads
        self.count = np.zeros(shape, dtype=np.int64)
        self.mean, self.m2 = np.zeros(shape), np.zeros(shape)
        self.min, self.max = np.full(shape, np.inf), np.full(shape, -np.inf)
        self.sketch = [[TDigest(COMPRESSION) for _ in range(heads)] for _ in range(layers)]

    def add(self, values: Float[np.ndarray, "layers heads n"]) -> None:
        """Take in n values of every head; NaN (of layers without attention) does not count."""
        for layer, of_layer in enumerate(values.astype(float)):
            for head, row in enumerate(of_layer):
                row = row[~np.isnan(row)]
                if len(row):
                    mean = row.mean()
                    self._join(layer, head, len(row), mean, float(((row - mean) ** 2).sum()), row.min(), row.max())
                    self.sketch[layer][head].update(np.ascontiguousarray(row))

    def _join(self, layer: int, head: int, n: int, mean: float, m2: float, low: float, high: float) -> None:
        at = layer, head
        before, total = self.count[at], self.count[at] + n
        gap = mean - self.mean[at]
        self.mean[at] += gap * n / total
        self.m2[at] += m2 + gap**2 * before * n / total
        self.count[at] = total
        self.min[at], self.max[at] = min(self.min[at], low), max(self.max[at], high)

    def rows(self, statistic: str) -> dict[str, list]:
        """As columns of `SCHEMA`."""
        found: dict[str, list] = {name: [] for name in SCHEMA.names}
        for (layer, head), count in np.ndenumerate(self.count):
            at = layer, head
            numbers = (self.mean[at], self.m2[at], self.min[at], self.max[at])
            values = (layer, head, statistic, int(count), *numbers, self.sketch[layer][head].serialize(), None)
            for name, value in zip(SCHEMA.names, values, strict=True):
                found[name].append(value)
        return found

    def merge(self, row: dict) -> None:
        """Take in a row of a part's table."""
        if row["count"]:
            layer, head = row["layer"], row["head"]
            self._join(layer, head, row["count"], row["mean"], row["m2"], row["min"], row["max"])
            self.sketch[layer][head].merge(TDigest.deserialize(row["sketch"]))


def table_of(moments: dict[str, Moments], error: str | None = None) -> pa.Table:
    """Statistics of a part as a table, a row for each statistic of each head; an error is a row of its own."""
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    for statistic, found in moments.items():
        for name, values in found.rows(statistic).items():
            columns[name] += values
    if error is not None:
        for name in columns:
            columns[name].append(error if name == "error" else None)
    return pa.table(columns, schema=SCHEMA)


def merged(tables: Iterable[pa.Table]) -> tuple[dict[str, Moments], list[str]]:
    """All parts as one, and the errors of those that failed. Holds one part at a time."""
    found: dict[str, Moments] = {}
    errors = []
    for table in tables:
        rows = table.to_pylist()
        errors += [r["error"] for r in rows if r["error"] is not None]
        real = [r for r in rows if r["error"] is None]
        if not real:
            continue
        layers, heads = (1 + max(r[c] for r in real) for c in ("layer", "head"))
        for row in real:
            if row["statistic"] not in found:
                found[row["statistic"]] = Moments(layers, heads)
            found[row["statistic"]].merge(row)
    return found, errors
