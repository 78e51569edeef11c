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
from interp.results.alignment import align, swept_lengths
from interp.results.gaps import SmallGaps, small_gaps
from interp.results.joining import join
from interp.results.parquet import read_parquet, write_parquet
from interp.results.summarise import summarise
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
    "read_at": "string",
    "clean": "float64",
    "corrupt": "float64",
    "patched": "float64",
    "effect": "float64",
    "raw": "float64",
    "prompt": "string",
    "model": "string",
    "task": "string",
}
SITE_COLUMNS = ("component", "layer", "head", "position")
ADDED = ("sender", "read_at", "prompt", "model", "task")  # columns that tables written by earlier versions lack


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
      once. A negative one counts from the end of each prompt, as it was asked for: -1 is the last token of every
      prompt, whatever its length. For mlp_post ``head`` is the neuron. A group of sites has its name as component.
    - ``token`` text and ``role`` (named span) of the position; for an edge, the ``sender`` whose path into the site was
      changed.
    - ``intervention``, ``mode`` (``denoise`` or ``noise``), ``metric``, and ``read_at``, the position at which it is
      read (``at=`` of a recipe); missing for the last position.
    - the metric on the ``clean``, ``corrupt`` and ``patched`` runs; ``effect`` on the recovery scale; ``raw`` = patched
      − the run that was patched into.
    - ``prompt``: a hash of the example's prompt. ``model``, ``task``: which part of a joined table a row is from, where
      its parts differ in them (`concat`); missing otherwise, because the provenance says it for all rows.
    """

    def __init__(self, frame: pd.DataFrame, provenance: dict[str, Any] | None = None):
        if added := {c: pd.NA for c in ADDED if c not in frame.columns}:
            frame = frame.assign(**added)
        missing = [c for c in COLUMNS if c not in frame.columns]
        if missing:
            raise InterpError(f"this is not an effects table: it lacks the column(s) {', '.join(missing)}")
        self._frame: Any = frame[list(COLUMNS)].astype(COLUMNS).reset_index(drop=True)
        self.provenance: dict[str, Any] = dict(provenance or {})
        self._lengths: pd.Series | None = None  # of prompts whose positions are aligned; of the whole table, see `take`

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
            is_one = isinstance(value, str) or getattr(value, "ndim", 1) == 0 or not isinstance(value, Iterable)
            listed: list[Any] = [value] if is_one else list(value)
            values = [v.item() if hasattr(v, "item") else v for v in listed]
            keep &= _equals_any(self._frame[column], column, values)
        return self.take(np.flatnonzero(keep))

    def take(self, rows: Sequence[int] | np.ndarray) -> Effects:
        """Return some rows, by number. Positions of a part are aligned as in the whole table (`aligned`)."""
        part = Effects(self._frame.iloc[rows], self.provenance)
        part._lengths = self._aligned_lengths()
        return part

    def aligned(self) -> pd.DataFrame:
        """Return the table with positions that mean the same in every example, which `summary` averages over.

        Where every token of prompts of different lengths was swept, positions are counted from the last token (-1);
        elsewhere they are as in `frame`.
        """
        return align(self._frame, self._aligned_lengths()).copy()

    def _aligned_lengths(self) -> pd.Series:
        if self._lengths is None:
            self._lengths = swept_lengths(self._frame)
        return self._lengths

    def small_gaps(self) -> SmallGaps:
        """Return how many pairs have almost no clean–corrupt gap, so that their recovery is mostly noise."""
        return small_gaps(self._frame)

    def summary(
        self,
        by: Sequence[str] | str | None = None,
        *,
        level: float = 0.95,
        n_boot: int = 2000,
        seed: int = 0,
        tests: bool = False,
    ) -> pd.DataFrame:
        """Return the mean effect per site (or edge) with its interval.

        effects = interp.patch(model, pairs, model.sites("z"))
        effects.summary().head(5)                        # the five strongest heads
        effects.summary(by=["layer"], tests=True)        # means by layer, with p and q

        Returns one row per group, strongest first, with the columns

        - ``effect``, ``lo``, ``hi``: mean of the recovery per example;
        - ``raw``, ``raw_lo``, ``raw_hi``: mean change of the metric, in its own units;
        - ``pooled``, ``pooled_lo``, ``pooled_hi``: mean raw change over the mean gap. A ratio of means varies less than
          a mean of ratios when some examples have a small clean–corrupt gap. If some have almost none (`small_gaps`),
          rows are ranked by ``pooled``;
        - ``n``: number of examples with a recovery, which ``effect`` is the mean of; ``n_raw``: of those with a raw
          change, for ``raw`` and ``pooled``. They differ where clean and corrupt score the same.

        ``by``: columns that define a group; default the site, intervention, mode, metric and read-out. Rows that differ
        in model, task, intervention, mode, metric or ``read_at`` are never averaged: such a column is added to ``by``.
        Several rows of one example in a group (noise samples, tokens of a role) are averaged first. Positions of a
        sweep over prompts of different lengths are counted from the last token (`aligned`).

        Intervals are over examples: the studentised bootstrap, and below 8 examples Student's t, which is right for
        normal values only (`interp.results.significance.mean_interval` gives the coverage). They are NaN for a group
        with a single example: one example has no spread.

        ``tests=True`` adds ``p``, the p-value of a sign-flip permutation test that the mean of ``raw`` is zero, and
        ``q``, its Benjamini–Hochberg false discovery rate over all rows of this table
        (`interp.results.significance`).
        """
        edges = ["sender"] if self._frame["sender"].notna().any() else []
        reads = ["read_at"] if self._frame["read_at"].notna().any() else []
        keys = [*SITE_COLUMNS, *edges, "intervention", "mode", "metric", *reads] if by is None else _columns(by)
        if not keys:
            raise InterpError("by=[]: name at least one column to group by, for example by='metric'")
        if not is_number(level) or not 0 < level < 1:
            raise InterpError(f"level={level!r}: a share such as 0.95 is expected")
        check_whole(n_boot=n_boot)
        check_seed(seed)
        if self._frame.empty:
            raise InterpError("there are no effects to summarise: the table is empty")
        frame = align(self._frame, self._aligned_lengths()) if "position" in keys else self._frame
        return summarise(frame, keys, level=level, n_boot=n_boot, seed=seed, tests=tests)

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
        """Stack tables; provenance keys on which the parts disagree become lists.

        Examples are renumbered by their prompts: the same prompt keeps one number, and two halves of a set make a whole
        one. Where the parts are of different models (name, weights, dtype, BOS) or tasks, the columns ``model`` and
        ``task`` say which, and `summary` and figures keep them apart. Rows of one example at one site that differ only
        in settings without a column (a seed, a noise level, a direction) are averaged; a warning names the settings.

        halves = [interp.patch(model, pairs[:8], sites), interp.patch(model, pairs[8:], sites)]
        interp.Effects.concat(halves).summary()     # as of all 16 pairs
        """
        parts = list(parts) if isinstance(parts, Iterable) else [parts]
        for part in parts:
            if not isinstance(part, Effects):
                raise InterpError(f"a list of Effects is expected; one item is {type(part).__name__} {part!r:.60}")
        if not parts:
            raise InterpError("nothing to concatenate: the list of Effects is empty")
        merged: dict[str, Any] = {}
        for key in dict.fromkeys(k for p in parts for k in p.provenance):
            values = [p.provenance.get(key) for p in parts]
            merged[key] = values[0] if all(v == values[0] for v in values) else values
        return cls(join([p._frame for p in parts], [p.provenance for p in parts]), merged)


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
