"""Average causal traces over facts, by layer and kind of token (Meng et al. 2022, figure 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InterpError
from interp.results.effects import Effects

CATEGORIES = (
    "before the subject", "first subject token", "middle subject tokens", "last subject token",
    "first subsequent token", "further tokens", "last token",
)  # fmt: skip


def trace_table(effects: Effects, *, level: float = 0.95, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Average total and indirect effects over facts, by layer and kind of token (as in Meng et al. 2022, figure 2).

        interp.trace_table(interp.trace(model, facts))

    ``effects``: of `trace` with positions="each". One row per (layer, category), in reading order: ``n`` facts;
    ``ATE``, the mean of clean − corrupt over all facts; ``AIE``, the mean indirect effect, with its bootstrap interval
    ``lo``, ``hi`` over facts (tokens of one category of one fact are averaged first); ``share`` = AIE over those
    facts' mean total effect. The only token of a subject counts as its last. Raises InterpError if a fact's tokens
    were not all traced, or none is its subject.
    """
    f: Any = effects.frame()
    if f.empty or f["position"].isna().any() or set(f["mode"]) != {"denoise"}:
        raise InterpError("trace_table needs the effects of interp.trace with positions='each', one row per token")
    category = pd.Series("", index=f.index, dtype="string")
    for example, part in f.groupby("example"):
        category[part.index] = _categories(example, part)
    averaged = Effects(f.assign(role=category, position=pd.NA, token=""))
    table = averaged.summary(by=["layer", "role"], level=level, n_boot=n_boot, seed=seed)
    one: Any = f.drop_duplicates("example")
    out = pd.DataFrame({
        "layer": table["layer"], "category": pd.Categorical(table["role"], CATEGORIES, ordered=True), "n": table["n"],
        "ATE": float((one["clean"] - one["corrupt"]).mean()), "AIE": table["raw"], "lo": table["raw_lo"],
        "hi": table["raw_hi"], "share": table["pooled"],
    })  # fmt: skip
    return out.sort_values(["category", "layer"]).reset_index(drop=True)


def _categories(example: Any, part: Any) -> np.ndarray:
    at = part["position"].to_numpy(dtype=int)
    inside = at[(part["role"] == "subject").to_numpy(dtype=bool)]
    if not len(inside) or set(at) != set(range(at.max() + 1)):
        raise InterpError(f"example {example}: every token must be traced, and one span be called 'subject'")
    first, last, end = inside.min(), inside.max(), at.max()
    conditions = [at == end, at < first, at == last, at == first, at < last, at == last + 1]
    names = [CATEGORIES[i] for i in (6, 0, 3, 1, 2, 4)]
    return np.select(conditions, names, CATEGORIES[5])
