"""Average causal traces over facts, by layer and kind of token (Meng et al. 2022, figure 2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InterpError
from interp.results.effects import Effects
from interp.results.summarise import APART

CATEGORIES = (
    "before the subject", "first subject token", "middle subject tokens", "last subject token",
    "first subsequent token", "further tokens", "last token",
)  # fmt: skip


def trace_table(effects: Effects, *, level: float = 0.95, n_boot: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Average total and indirect effects over facts, by layer and kind of token (as in Meng et al. 2022, figure 2).

        interp.trace_table(interp.trace(model, facts))

    ``effects``: of `trace` with positions="each". One row per (layer, category), in reading order: ``n`` facts;
    ``ATE``, the mean of clean − corrupt over all facts; ``AIE``, the mean indirect effect, with its 95% interval
    ``lo``, ``hi`` over facts (tokens of one category of one fact are averaged first); ``share`` = AIE over those
    facts' mean total effect. Traces that differ in model, task, intervention or metric (`Effects.concat`) have rows of
    their own, which that column names. The only token of a subject counts as its last. Raises InterpError if not all
    tokens of a fact were traced, or no token is its subject.
    """
    frame: Any = effects.frame()
    apart = [c for c in APART if frame[c].nunique(dropna=False) > 1]
    if frame.empty or frame["position"].isna().any() or set(frame["mode"]) != {"denoise"}:
        raise InterpError("trace_table needs the effects of interp.trace with positions='each', one row per token")
    category = pd.Series("", index=frame.index, dtype="string")
    for (example, *_), rows in frame.groupby(["example", *apart], dropna=False):
        category[rows.index] = _categories(example, rows)
    averaged = Effects(frame.assign(role=category, position=pd.NA, token=""))
    table = averaged.summary(by=["layer", "role"], level=level, n_boot=n_boot, seed=seed)
    facts: Any = frame.drop_duplicates(["example", *apart])
    facts = facts.assign(ATE=facts["clean"] - facts["corrupt"], mode="denoise")
    total: Any = facts.groupby([*apart, "mode"], dropna=False, as_index=False)["ATE"].mean()
    table = table.assign(mode="denoise").merge(total, on=[*apart, "mode"], how="left")
    out = pd.DataFrame({
        **{c: table[c] for c in apart},
        "layer": table["layer"], "category": pd.Categorical(table["role"], CATEGORIES, ordered=True),
        "n": table["n_raw"], "ATE": table["ATE"], "AIE": table["raw"],
        "lo": table["raw_lo"], "hi": table["raw_hi"], "share": table["pooled"],
    })  # fmt: skip
    return out.sort_values([*apart, "category", "layer"]).reset_index(drop=True)


def _categories(example: Any, rows: Any) -> np.ndarray:
    """Return the category of each row of one fact."""
    position = rows["position"].to_numpy(dtype=int)
    subject = position[(rows["role"] == "subject").to_numpy(dtype=bool)]
    if not len(subject) or set(position) != set(range(position.max() + 1)):
        raise InterpError(f"example {example}: every token must be traced, and one span must be called 'subject'")
    first, last, end = subject.min(), subject.max(), position.max()
    conditions = [
        position == end, position < first, position == last, position == first, position < last, position == last + 1,
    ]  # fmt: skip
    names = [CATEGORIES[i] for i in (6, 0, 3, 1, 2, 4)]
    return np.select(conditions, names, CATEGORIES[5])
