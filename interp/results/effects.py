"""Effects: one row per (example, site, intervention, metric), with the recipe that made it.

A number without its recipe is not a result, so provenance travels in the Parquet file's metadata.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InterpError
from interp.results.parquet import read_parquet, write_parquet
from interp.results.significance import benjamini_hochberg, percentile_interval, resample_weights, sign_flip
from interp.utils.arguments import check_seed, check_whole, is_number
from interp.utils.damage import reading
from interp.utils.html_card import card

COLUMNS: dict[str, str] = {
    "example": "int64",
    "component": "string",
    "layer": "Int64",
    "head": "Int64",
    "position": "Int64",
    "sender": "string",
    "token": "string",
    "role": "string",
    "intervention": "string",
    "mode": "string",
    "metric": "string",
    "clean": "float64",
    "corrupt": "float64",
    "patched": "float64",
    "effect": "float64",
    "raw": "float64",
}
SITE_COLUMNS = ("component", "layer", "head", "position")
ADDED = ("sender",)  # columns that tables written by earlier versions lack
BOOTSTRAP_ROWS = 4096  # groups whose draws are in memory at one time


def recovery_columns(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Compute ``raw`` and ``effect`` from the scores of the runs, in float64.

    The columns ``clean``, ``corrupt``, ``patched`` and ``mode`` are read.

    ``raw`` is the change from the run that is patched into. ``effect`` is ``raw`` over the gap between the two runs,
    NaN where that gap is zero. (`interp.metrics.recovery` is the same formula for tensors.)
    """
    denoise = (frame["mode"] == "denoise").to_numpy(dtype=bool, na_value=False)
    clean, corrupt, patched = (frame[c].to_numpy(dtype=float) for c in ("clean", "corrupt", "patched"))
    start, end = np.where(denoise, corrupt, clean), np.where(denoise, clean, corrupt)
    gap = end - start
    with np.errstate(invalid="ignore", divide="ignore"):
        raw = patched - start
        return {"raw": raw, "effect": np.where(gap == 0, np.nan, raw / gap)}


class Effects:
    """A long tidy table of causal effects, with its provenance.

    Columns:

    - ``example``; the site: ``component``, ``layer``, ``head``, ``position``. A missing position means all positions at
      once. For mlp_post ``head`` is the neuron. A group of sites has its name as component.
    - ``token`` text and ``role`` (named span) of the position; for an edge, the ``sender`` whose path into the site was
      changed.
    - ``intervention``, ``mode`` (``denoise`` or ``noise``), ``metric``.
    - the metric on the ``clean``, ``corrupt`` and ``patched`` runs; ``effect`` on the recovery scale; ``raw`` = patched
      − the run that was patched into.
    """

    def __init__(self, frame: pd.DataFrame, provenance: dict[str, Any] | None = None):
        if added := {c: pd.NA for c in ADDED if c not in frame.columns}:
            frame = frame.assign(**added)
        missing = [c for c in COLUMNS if c not in frame.columns]
        if missing:
            raise InterpError(f"this is not an effects table: it lacks the column(s) {', '.join(missing)}")
        self._frame: Any = frame[list(COLUMNS)].astype(COLUMNS).reset_index(drop=True)
        self.provenance: dict[str, Any] = dict(provenance or {})

    def frame(self) -> pd.DataFrame:
        """Return a copy of the table, one row per example × site.

        effects = interp.patch(model, pair, model.sites("z"))
        table = effects.frame()
        table.nlargest(5, "effect")[["layer", "head", "effect"]]
        """
        return self._frame.copy()

    def __len__(self) -> int:
        return len(self._frame)

    def __repr__(self) -> str:
        f: Any = self._frame
        if f.empty:
            return "Effects(empty)"
        what = ", ".join(f"{c}×{n}" for c, n in f.groupby("component", observed=True).size().items())
        kinds = "/".join(sorted(set(f["intervention"] + " " + f["mode"])))
        return f"Effects({len(f)} rows: {what}; {f['example'].nunique()} examples; {kinds}; {f['metric'].iloc[0]})"

    def _repr_html_(self) -> str:
        if self._frame.empty:
            return card("Effects", {"rows": 0})
        f: Any = self._frame
        facts = {
            "rows": len(f), "examples": f["example"].nunique(), "metric": ", ".join(sorted(set(f["metric"]))),
            "intervention": ", ".join(sorted(set(f["intervention"] + ", " + f["mode"]))),
        }  # fmt: skip
        top = self.summary().head(8).dropna(axis="columns", how="all")
        return card("Effects", facts, [c for c in top if c not in ("raw_lo", "raw_hi", "pooled_lo", "pooled_hi")], top)

    def where(self, **conditions: Any) -> Effects:
        """Return the rows whose columns equal values; None matches missing values, a list any of its values.

        effects.where(component="z", layer=9)
        effects.where(layer=[8, 9, 10])
        """
        _columns(conditions)
        keep = pd.Series(True, index=self._frame.index)
        for column, value in conditions.items():
            values = [value] if isinstance(value, str) or not isinstance(value, Iterable) else list(value)
            keep &= _equals_any(self._frame[column], column, values)
        return Effects(self._frame[keep], self.provenance)

    def summary(
        self,
        by: Sequence[str] | str | None = None,
        *,
        level: float = 0.95,
        n_boot: int = 2000,
        seed: int = 0,
        tests: bool = False,
    ) -> pd.DataFrame:
        """Return the mean effect per site (or edge) with a bootstrap interval.

        Intervals are percentile bootstrap intervals over examples.

            effects = interp.patch(model, pairs, model.sites("z"))
            effects.summary().head(5)                        # the five strongest heads
            effects.summary(by=["layer"], tests=True)        # means by layer, with p and q

        Returns one row per group, strongest first, with the columns

        - ``effect``, ``lo``, ``hi``: mean of the recovery per example;
        - ``raw``, ``raw_lo``, ``raw_hi``: mean change of the metric, in its own units;
        - ``pooled``, ``pooled_lo``, ``pooled_hi``: mean raw change over the mean gap. A ratio of means varies less than
          a mean of ratios when some examples have a small clean–corrupt gap;
        - ``n``: number of examples.

        ``by``: columns that define a group; default the site, intervention, mode and metric. Several rows of one
        example in a group (noise samples, tokens of a role) are averaged first. Intervals are NaN with a single
        example: one example has no spread to resample. With few examples they are too narrow, as percentile intervals
        are: a nominal 95% covers a normal mean in 93% of draws of 24 examples, 89% of 8 and 80% of 4, and an
        exponential one in 90%, 83% and 74%.

        ``tests=True`` adds ``p``, the p-value of a sign-flip permutation test that the mean of ``raw`` is zero, and
        ``q``, its Benjamini–Hochberg false discovery rate over all rows of this table
        (`interp.results.significance`).
        """
        edges = ["sender"] if self._frame["sender"].notna().any() else []
        keys = [*SITE_COLUMNS, *edges, "intervention", "mode", "metric"] if by is None else _columns(by)
        if not keys:
            raise InterpError("by=[]: name at least one column to group by, for example by='metric'")
        if not is_number(level) or not 0 < level < 1:
            raise InterpError(f"level={level!r}: a share such as 0.95 is expected")
        check_whole(n_boot=n_boot)
        check_seed(seed)
        f: Any = self._frame
        if f.empty:
            raise InterpError("there are no effects to summarise: the table is empty")
        f = f.assign(gap=np.where(f["mode"] == "denoise", f["clean"] - f["corrupt"], f["corrupt"] - f["clean"]))
        f["unit"] = f["example"]  # `by` may name the column example itself
        per_example: Any = f.groupby([*keys, "unit"], dropna=False, observed=True)[["effect", "raw", "gap"]].mean()
        wide: Any = per_example.unstack("unit")
        out = wide.index.to_frame(index=False)
        table = {c: wide[c].to_numpy(dtype=float) for c in ("effect", "raw", "gap")}
        out["n"] = np.isfinite(table["raw"]).sum(1)
        for name, columns in _bootstrap(table, level=level, n_boot=n_boot, seed=seed).items():
            out[name] = columns
        if tests:
            out["p"] = sign_flip(table["raw"], seed=seed)
            out["q"] = benjamini_hochberg(out["p"].to_numpy())
        order: Any = out["pooled"].abs().where(out["effect"].isna(), out["effect"].abs())
        return out.loc[order.sort_values(ascending=False, kind="stable").index].reset_index(drop=True)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write one Parquet file, whole or not at all; return its path.

        The provenance is in its metadata. Raises InterpError for a name of another suffix; for the rows alone there is
        ``effects.frame().to_csv("heads.csv", index=False)``, which keeps every digit.

        effects = interp.patch(model, pair, model.sites("z"))
        effects.write("results/heads.parquet")
        same = interp.Effects.read("results/heads.parquet")
        """
        import pyarrow as pa

        table = pa.Table.from_pandas(self._frame, preserve_index=False)
        return write_parquet(table, path, kind="effects", provenance=self.provenance)

    @classmethod
    def read(cls, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> Effects:
        """Read a file that `write` wrote.

        Raises InterpError for any other file, or if it would take more than ``max_bytes`` of memory (default: 128 MiB
        and 512 times the size of the file).

        effects = interp.Effects.read("results/heads.parquet")
        effects.summary().head(5)
        effects.provenance["model"]
        """
        frame, provenance = read_parquet(path, kind="effects", max_bytes=max_bytes)
        with reading(path):
            return cls(frame, provenance)

    @classmethod
    def concat(cls, parts: Iterable[Effects]) -> Effects:
        """Stack tables; provenance keys on which the parts disagree become lists."""
        parts = list(parts)
        if not parts:
            raise InterpError("nothing to concatenate: the list of Effects is empty")
        merged: dict[str, Any] = {}
        for key in dict.fromkeys(k for p in parts for k in p.provenance):
            values = [p.provenance.get(key) for p in parts]
            merged[key] = values[0] if all(v == values[0] for v in values) else values
        return cls(pd.concat([p._frame for p in parts], ignore_index=True), merged)


def _columns(names: Iterable[str]) -> list[str]:
    """Return names of columns as a list, each once.

    Raises InterpError for a column that does not exist.
    """
    columns = [names] if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
    unknown = [c for c in columns if not isinstance(c, str) or c not in COLUMNS]
    if unknown:
        raise InterpError(f"no column {unknown[0]!r}; columns: {', '.join(COLUMNS)}")
    return list(dict.fromkeys(columns))


def _equals_any(column: Any, name: str, values: list[Any]) -> Any:
    """Return for each row whether a column equals one of some values; InterpError for a value of the wrong type."""
    kind, type_name = (str, "text") if COLUMNS[name] == "string" else (Real, "numbers")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise InterpError(f"{name}={value!r:.60}: the column {name} holds {type_name}")
    present = [v for v in values if v is not None]
    match = column.isin(present) if present else pd.Series(False, index=column.index)
    return match.fillna(False).astype(bool) | (column.isna() if None in values else False)


def _bootstrap(table: dict[str, np.ndarray], *, level: float, n_boot: int, seed: int) -> dict[str, np.ndarray]:
    """Return means and percentile bootstrap intervals of [groups, examples] arrays.

    NaN: not measured.
    """
    rows = len(table["raw"])
    if rows > BOOTSTRAP_ROWS:
        parts = [
            _bootstrap({c: x[i : i + BOOTSTRAP_ROWS] for c, x in table.items()}, level=level, n_boot=n_boot, seed=seed)
            for i in range(0, rows, BOOTSTRAP_ROWS)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    finite = {c: np.isfinite(x) for c, x in table.items()}
    filled = {c: np.where(finite[c], x, 0.0) for c, x in table.items()}
    n_examples = table["raw"].shape[1]
    weights = resample_weights(n_examples, n_boot, seed)

    def statistics(w: np.ndarray) -> dict[str, np.ndarray]:
        """Return the statistics of every group for weights of the examples, [groups, draws]."""
        with np.errstate(invalid="ignore", divide="ignore"):
            sums = {c: filled[c] @ w.T for c in filled}
            counts = {c: finite[c] @ w.T for c in finite}
            return {
                "effect": sums["effect"] / counts["effect"],
                "raw": sums["raw"] / counts["raw"],
                "pooled": sums["raw"] / np.where(sums["gap"] == 0, np.nan, sums["gap"]),
            }

    point = statistics(np.ones((1, n_examples)))
    draws = statistics(weights)
    tail = (1 - level) / 2
    columns: dict[str, np.ndarray] = {}
    for name, prefix in (("effect", ""), ("raw", "raw_"), ("pooled", "pooled_")):
        columns[name] = point[name][:, 0]
        lo, hi = percentile_interval(draws[name], tail) if n_examples > 1 else (np.nan * point[name][:, 0],) * 2
        columns[f"{prefix}lo"], columns[f"{prefix}hi"] = lo, hi
    return columns
