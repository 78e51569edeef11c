"""AttentionStats: statistics of every head on every prompt, as numpy arrays.

No n×n pattern is stored.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped

from interp.errors import InterpError
from interp.results.parquet import read_parquet, write_parquet
from interp.utils.damage import reading
from interp.utils.html_card import card

KEY_STATISTICS = ("received", "received_max", "fai", "column_norm")  # per key; every other statistic is per query


@dataclass(frozen=True)
class AttentionStats:
    """Attention statistics of every head on a set of prompts.

    ``tokens[i]``: token texts of example i. ``values[name][i]``: an array [n_layers, n_heads, n_tokens_i] (units and
    ranges: `headstats.stats`). A statistic is per query position, except those of `KEY_STATISTICS`, which are per key
    position. ``backends[layer]``: the backend that computed a layer. For an encoder–decoder model, ``stack`` names the
    attention that was measured, and ``keys[i]`` are the token texts that it reads (in cross-attention: the source),
    which ``argmax`` refers to.
    """

    tokens: list[list[str]]
    values: dict[str, list[Shaped[np.ndarray, "layers heads position"]]]
    backends: dict[int, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    stack: str = ""
    keys: list[list[str]] | None = None

    @property
    def names(self) -> list[str]:
        """Names of the collected statistics."""
        return list(self.values)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return next(iter(self.values.values()))[0].shape[0]

    @property
    def n_heads(self) -> int:
        """Number of query heads."""
        return next(iter(self.values.values()))[0].shape[1]

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        if not self.tokens:
            return "AttentionStats(empty)"
        lengths = [len(t) for t in self.tokens]
        span = f"{min(lengths)}–{max(lengths)}" if min(lengths) != max(lengths) else str(lengths[0])
        return (
            f"AttentionStats({len(self)} prompt(s) of {span} tokens, {self.n_layers} layers × "
            f"{self.n_heads} heads: {', '.join(self.names)})"
        )

    def _repr_html_(self) -> str:
        if not self.tokens:
            return card("AttentionStats", {"prompts": 0})
        lengths = [len(t) for t in self.tokens]
        facts = {"prompts": len(self), "tokens": sum(lengths), "layers × heads": f"{self.n_layers} × {self.n_heads}"}
        means = {n: self.per_head(n) for n in self.names if self.values[n][0].dtype.kind == "f"}
        rows = []
        for name, mean in means.items():
            if not np.isfinite(mean).any():
                continue
            (low, high) = (np.unravel_index(int(f(mean)), mean.shape) for f in (np.nanargmin, np.nanargmax))
            least, most = ((f"{mean[at]:.3g}", f"L{at[0]}H{at[1]}") for at in (low, high))
            rows.append({"statistic": name, "least": least[0], "in": least[1], "most": most[0], "in ": most[1]})
        return card("AttentionStats", facts, ["statistic", "least", "in", "most", "in "], pd.DataFrame(rows))

    def frame(self) -> pd.DataFrame:
        """Return one row per (example, layer, head, position).

        It has the token text, and one column per statistic.
        """
        parts = []
        for i, tokens in enumerate(self.tokens):
            layers, heads, n = next(iter(self.values.values()))[i].shape
            grid = np.meshgrid(np.arange(layers), np.arange(heads), np.arange(n), indexing="ij")
            columns: dict[str, Any] = {"example": np.full(grid[0].size, i)}
            columns |= {"stack": self.stack} if self.stack else {}
            columns |= {name: axis.ravel() for name, axis in zip(("layer", "head", "position"), grid, strict=True)}
            columns["token"] = np.tile(np.array(tokens, dtype=object), layers * heads)
            columns |= {name: arrays[i].ravel() for name, arrays in self.values.items()}
            if self.keys is not None and "argmax" in columns:
                columns["argmax_token"] = np.array(self.keys[i], dtype=object)[columns["argmax"]]
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True).astype({"token": "string"})

    def per_head(self, statistic: str, *, skip_first: bool = True) -> Float[np.ndarray, "layers heads"]:
        """Return the mean of a statistic over positions and examples.

        Every example has the same weight.

        The first position sees only itself, so its entropy, distance and sink mass say nothing about the head;
        ``skip_first=False`` includes it.
        """
        if statistic not in self.values:
            raise InterpError(f"statistic {statistic!r} was not collected; collected: {', '.join(self.names)}")
        start = 1 if skip_first and min(len(t) for t in self.tokens) > 1 else 0
        return np.mean([a[..., start:].astype(float).mean(-1) for a in self.values[statistic]], axis=0)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write one Parquet file, whole or not at all; return its path."""
        import pyarrow as pa

        table = pa.Table.from_pandas(self.frame(), preserve_index=False)
        provenance = {**self.provenance, "backends": {str(k): v for k, v in self.backends.items()}}
        provenance |= {"stack": self.stack, "keys": self.keys}
        return write_parquet(table, path, kind="attention_stats", provenance=provenance)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> AttentionStats:
        """Read a file that `write` wrote.

        Raises InterpError for any other file, or if it would take more than ``max_bytes`` of memory (`read_parquet`).
        """
        frame, provenance = read_parquet(path, kind="attention_stats", max_bytes=max_bytes)
        with reading(path):
            return cls._of_frame(frame, provenance)

    @classmethod
    def _of_frame(cls, frame: pd.DataFrame, provenance: dict[str, Any]) -> AttentionStats:
        """Return the statistics of a table that `frame` made."""
        backends = {int(k): v for k, v in provenance.pop("backends", {}).items()}
        stack, keys = provenance.pop("stack", ""), provenance.pop("keys", None)
        labels = ("example", "stack", "layer", "head", "position", "token", "argmax_token")
        names = [c for c in frame.columns if c not in labels]
        tokens: list[list[str]] = []
        values: dict[str, list[Any]] = {name: [] for name in names}
        if frame.empty or not names:
            raise InterpError("it holds no statistics")
        for _, part in frame.groupby("example", sort=True):
            shape = tuple(int(np.asarray(part[c]).max()) + 1 for c in ("layer", "head", "position"))
            part = part.sort_values(["layer", "head", "position"])
            tokens.append(part["token"].iloc[: shape[2]].tolist())
            for name in names:
                values[name].append(np.asarray(part[name]).reshape(shape))
        return cls(tokens, values, backends, provenance, stack, keys)
