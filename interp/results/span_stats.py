"""SpanStats: attention statistics from span to span, as numpy arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from interp.errors import InterpError
from interp.results.parquet import read_parquet, write_parquet
from interp.utils.damage import reading
from interp.utils.html_card import card

Sizes = Mapping[str, int]  # number of tokens by the name of a span


@dataclass(frozen=True)
class SpanStats:
    """Attention statistics of every head by spans of the prompts: means over the tokens of a span.

        stats = model.attention_stats(prompts, by="span")
        stats.frame()                              # what each query span reads of each key span
        stats.per_head("question", "document")     # [layers, heads]

    ``query_spans[i]``, ``key_spans[i]``: the spans of example i with their numbers of tokens; they differ in
    cross-attention alone. ``between[name][i]``: an array [layers, heads, query span, key span] (with one more axis for
    ``segment_outputs``). ``within[name][i]``: an array [layers, heads, span]. ``provenance["definitions"]`` gives
    formula and unit of each. ``backends[layer]``: the backend that computed a layer.
    """

    query_spans: list[Sizes]
    key_spans: list[Sizes]
    between: dict[str, list[Float[np.ndarray, "layers heads query_span key_span *d_v"]]]
    within: dict[str, list[Float[np.ndarray, "layers heads span"]]]
    backends: dict[int, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    stack: str = ""

    @property
    def names(self) -> list[str]:
        """Names of the collected statistics: those between spans first."""
        return [*self.between, *self.within]

    @property
    def spans(self) -> list[str]:
        """Names of all spans, in the order in which the examples have them."""
        return list(dict.fromkeys(name for sizes in (*self.query_spans, *self.key_spans) for name in sizes))

    def __len__(self) -> int:
        return len(self.query_spans)

    def _heads(self) -> tuple[int, int]:
        """Numbers of layers and of heads."""
        arrays = next(iter((*self.between.values(), *self.within.values())))
        return arrays[0].shape[0], arrays[0].shape[1]

    def __repr__(self) -> str:
        layers, heads = self._heads()
        return (
            f"SpanStats({len(self)} prompt(s), {layers} layers × {heads} heads, spans {', '.join(self.spans)}: "
            f"{', '.join(self.names)})"
        )

    def _repr_html_(self) -> str:
        layers, heads = self._heads()
        facts = {"prompts": len(self), "layers × heads": f"{layers} × {heads}", "spans": ", ".join(self.spans)}
        return card("SpanStats", {**facts, "statistics": ", ".join(self.names)})

    # ------------------------------------------------------------ tables

    def frame(self) -> pd.DataFrame:
        """Return one row per (example, layer, head, query span, key span), with one column per statistic between spans.

        ``query_tokens`` and ``key_tokens`` are the spans' numbers of tokens. A value is the mean over the query tokens;
        cells of ``segment_outputs`` are vectors [d_v].
        """
        parts = []
        for i, (queries, keys) in enumerate(zip(self.query_spans, self.key_spans, strict=True)):
            columns = self._labels(i, {"query_span": queries, "key_span": keys})
            columns["query_tokens"] = np.asarray(list(queries.values()))[columns.pop("query_span_number")]
            columns["key_tokens"] = np.asarray(list(keys.values()))[columns.pop("key_span_number")]
            columns |= {name: _cells(arrays[i]) for name, arrays in self.between.items()}
            parts.append(pd.DataFrame(columns))
        return _joined(parts, ("query_span", "key_span"))

    def per_span(self) -> pd.DataFrame:
        """Return one row per (example, layer, head, span), with one column per statistic that has no key span.

        A value is the mean over the span's tokens, as queries or, for statistics of keys (``received``), as keys.
        """
        parts = []
        for i, spans in enumerate(self.query_spans):
            columns = self._labels(i, {"span": spans})
            columns["tokens"] = np.asarray(list(spans.values()))[columns.pop("span_number")]
            columns |= {name: arrays[i].ravel() for name, arrays in self.within.items()}
            parts.append(pd.DataFrame(columns))
        return _joined(parts, ("span",))

    def _labels(self, example: int, axes: Mapping[str, Sizes]) -> dict[str, Any]:
        """Columns that say where a value belongs, with the numbers of the spans."""
        sizes = (*self._heads(), *map(len, axes.values()))
        grid = [axis.ravel() for axis in np.meshgrid(*map(np.arange, sizes), indexing="ij")]
        columns: dict[str, Any] = {"example": np.full(grid[0].size, example)}
        columns |= {"stack": self.stack} if self.stack else {}
        columns |= {"layer": grid[0], "head": grid[1]}
        for (name, spans), numbers in zip(axes.items(), grid[2:], strict=True):
            columns[name] = np.array(list(spans), dtype=object)[numbers]
            columns[f"{name}_number"] = numbers
        return columns

    def per_head(
        self, query_span: str, key_span: str, statistic: str = "segments"
    ) -> Float[np.ndarray, "layers heads"]:
        """Return a statistic from one span to another: the mean over the examples that have both spans.

        Raises InterpError for a statistic that was not collected, and if no example has both spans.
        """
        if statistic not in self.between:
            raise InterpError(
                f"statistic {statistic!r} between spans was not collected; collected: {', '.join(self.between)}"
            )
        values = [
            array[:, :, list(queries).index(query_span), list(keys).index(key_span)].astype(float)
            for array, queries, keys in zip(self.between[statistic], self.query_spans, self.key_spans, strict=True)
            if query_span in queries and key_span in keys
        ]
        if not values:
            raise InterpError(f"no prompt has the spans {query_span!r} and {key_span!r}: {', '.join(self.spans)}")
        return np.mean(values, axis=0)

    # ------------------------------------------------------------ files

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write both tables into one Parquet file, whole or not at all; return its path.

        Rows of `per_span` have no ``key_span``.
        """
        import pyarrow as pa

        spans = self.per_span().rename(columns={"span": "query_span", "tokens": "query_tokens"})
        table = pa.concat_tables(
            [pa.Table.from_pandas(frame, preserve_index=False) for frame in (self.frame(), spans)],
            promote_options="default",
        )
        provenance = {**self.provenance, "backends": {str(k): v for k, v in self.backends.items()}}
        provenance |= {"stack": self.stack, "between": list(self.between), "within": list(self.within)}
        return write_parquet(table, path, kind="span_stats", provenance=provenance)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> SpanStats:
        """Read a file that `write` wrote.

        Raises InterpError for any other file, or if it would take more than ``max_bytes`` of memory (`read_parquet`).
        """
        frame, provenance = read_parquet(path, kind="span_stats", max_bytes=max_bytes)
        with reading(path):
            return cls._of_frame(frame, provenance)

    @classmethod
    def _of_frame(cls, frame: pd.DataFrame, provenance: dict[str, Any]) -> SpanStats:
        """Return the statistics of the two tables in a file."""
        backends = {int(k): v for k, v in provenance.pop("backends").items()}
        stack = provenance.pop("stack")
        between: dict[str, list[Any]] = {name: [] for name in provenance.pop("between")}
        within: dict[str, list[Any]] = {name: [] for name in provenance.pop("within")}
        query_spans, key_spans = [], []
        examples: Any = frame.groupby("example", sort=True)
        for _, part in examples:
            pairs, spans = part[part["key_span"].notna()], part[part["key_span"].isna()]
            query_spans.append(_sizes(pairs, "query"))
            key_spans.append(_sizes(pairs, "key"))
            shape = (int(part["layer"].max()) + 1, int(part["head"].max()) + 1, len(query_spans[-1]))
            for name, arrays in between.items():
                rows = np.array(pairs[name].tolist())
                arrays.append(rows.reshape(*shape, len(key_spans[-1]), *rows.shape[1:]))
            for name, arrays in within.items():
                arrays.append(spans[name].to_numpy().reshape(shape))
        if not query_spans or not (between or within):
            raise InterpError("it holds no statistics")
        return cls(query_spans, key_spans, between, within, backends, provenance, stack)


def _cells(array: Float[np.ndarray, "layers heads query_span key_span *d_v"]) -> Any:
    """An array's numbers, or its vectors, one after the other."""
    return array.ravel() if array.ndim == 4 else list(array.reshape(-1, array.shape[-1]))


def _joined(parts: list[pd.DataFrame], names: Sequence[str]) -> pd.DataFrame:
    return pd.concat(parts, ignore_index=True).astype(dict.fromkeys(names, "string"))


def _sizes(pairs: pd.DataFrame, side: str) -> dict[str, int]:
    """The spans of one side of a table, with their numbers of tokens."""
    spans = pairs.drop_duplicates(f"{side}_span")
    return dict(zip(spans[f"{side}_span"].tolist(), spans[f"{side}_tokens"].astype(int).tolist(), strict=True))
