"""Means of effects over examples, with intervals: what `Effects.summary` returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp.results.gaps import small_gaps
from interp.results.significance import benjamini_hochberg, mean_interval, sign_flip

APART = (
    "model",
    "task",
    "intervention",
    "mode",
    "metric",
    "read_at",
)  # rows that differ in one of these are never averaged


def summarise(frame: Any, keys: Sequence[str], *, level: float, n_boot: int, seed: int, tests: bool) -> pd.DataFrame:
    """Return one row per group of a table, strongest first: see `interp.results.effects.Effects.summary`."""
    keys = [*keys, *(c for c in APART if c not in keys and frame[c].nunique(dropna=False) > 1)]
    gap = np.where(frame["mode"] == "denoise", frame["clean"] - frame["corrupt"], frame["corrupt"] - frame["clean"])
    # `keys` may name the column example itself
    values = frame.assign(gap=gap, unit=frame["example"])
    per_example: Any = values.groupby([*keys, "unit"], dropna=False, observed=True)[["effect", "raw", "gap"]].mean()
    wide: Any = per_example.unstack("unit")
    out = wide.index.to_frame(index=False)
    effect, raw, gaps = (wide[c].to_numpy(dtype=float) for c in ("effect", "raw", "gap"))
    out["n"], out["n_raw"] = np.isfinite(effect).sum(1), np.isfinite(raw).sum(1)
    draws = {"level": level, "n_boot": n_boot, "seed": seed}
    out["effect"], out["lo"], out["hi"] = mean_interval(effect, **draws)
    out["raw"], out["raw_lo"], out["raw_hi"] = mean_interval(raw, **draws)
    out["pooled"], out["pooled_lo"], out["pooled_hi"] = mean_interval(raw, gaps, **draws)
    if tests:
        out["p"] = sign_flip(raw, seed=seed)
        out["q"] = benjamini_hochberg(out["p"].to_numpy())
    return out.loc[_ranks(out, frame)].reset_index(drop=True)


def _ranks(out: Any, frame: Any) -> Any:
    """Return the order of the rows: by |effect|, or by |pooled| if some pairs have a small gap; by |raw| without."""
    first, second = ("pooled", "effect") if small_gaps(frame) else ("effect", "pooled")
    size = out[first].abs().fillna(out[second].abs())
    return out.assign(size=size, raw=out["raw"].abs()).sort_values(
        ["size", "raw"] if size.isna().any() else ["size"], ascending=False, kind="stable"
    ).index  # fmt: skip
