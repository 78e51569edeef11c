"""Positions that mean the same in prompts of different lengths.

A table of a sweep over every token ("each") has positions counted from the first token. Over prompts of different
lengths, position 5 of one prompt has nothing to do with position 5 of another. Tables are then averaged over positions
counted from the last token, where the metric is read: -1 is the last token of every prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

PROMPT_KEYS = ["component", "model", "example"]  # of a sweep over the tokens of one prompt


def swept_lengths(frame: Any) -> pd.Series:
    """Return the number of tokens of every prompt, for components swept over prompts of different lengths.

    The index is `PROMPT_KEYS`. A component is swept if the positions of every prompt are 0, 1, 2, … without a gap. The
    result is empty if there is nothing to align.
    """
    placed = frame[(frame["position"] >= 0).fillna(False) & frame["sender"].isna()]
    tokens = placed[[*PROMPT_KEYS, "position"]].fillna({"model": ""}).drop_duplicates()
    by_prompt: Any = tokens.groupby(PROMPT_KEYS, observed=True, sort=False)["position"]
    lengths = by_prompt.max().astype("int64") + 1
    is_swept = (by_prompt.size() == lengths).groupby("component").transform("all")
    differ = lengths.groupby("component").transform("nunique") > 1
    return lengths[is_swept & differ]


def align(frame: Any, lengths: pd.Series) -> Any:
    """Return a frame whose positions count from the last token, for the prompts in ``lengths``."""
    if lengths.empty:
        return frame
    prompts = pd.MultiIndex.from_frame(frame[PROMPT_KEYS].fillna({"model": ""}))
    length = lengths.reindex(prompts).to_numpy()
    is_moved = ((frame["position"] >= 0).fillna(False) & frame["sender"].isna()).to_numpy(dtype=bool)
    is_moved &= np.isfinite(length)
    shift = pd.Series(np.where(is_moved, length, 0).astype("int64"), index=frame.index)
    return frame.assign(position=frame["position"] - shift)


def in_reading_order(positions: Any) -> list[int]:
    """Return distinct positions from left to right: counted from the first token, then from the last."""
    return sorted({int(p) for p in positions}, key=lambda p: (p < 0, p))
