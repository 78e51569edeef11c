"""Join tables of effects, so that a number of an example or a mean never stands for two different things."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import pandas as pd

log = logging.getLogger("interp")

MODEL_KEYS = ("model", "weights", "dtype", "bos")  # provenance that says which model ran, and on which tokens
ADDRESS = [
    "example",
    "component",
    "layer",
    "head",
    "position",
    "sender",
    "intervention",
    "mode",
    "metric",
    "read_at",
    "model",
    "task",
]  # of an effect: rows that agree in it are averaged as one
# Provenance in which parts of one table may differ: what was run, when and how fast, but not by which recipe.
NO_SETTINGS = {
    *MODEL_KEYS, "task", "prompts", "n_prompts", "created", "versions", "device", "backend", "engine", "intervention",
    "mode", "metric", "metric_unit", "normalisation", "groups",
}  # fmt: skip
SHOWN = 8  # characters of a weights' hash in the name of a model


def join(frames: Sequence[Any], provenances: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Stack tables, with examples renumbered and the columns ``model`` and ``task`` filled where parts differ in them.

    The same prompt has the same number in all parts, and different prompts have different numbers. Numbers of the first
    part stay as they are.
    """
    is_joined = any(f["model"].notna().any() for f in frames)
    names = {"model": _model_names(provenances, is_joined), "task": [_text(p.get("task")) for p in provenances]}
    numbers: dict[Hashable, int] = {}
    joined = []
    for i, (frame, provenance) in enumerate(zip(frames, provenances, strict=True)):
        part = frame.assign(example=_renumber(frame, provenance, numbers))
        for column, values in names.items():
            is_needed = len(set(values)) > 1 or any(f[column].notna().any() for f in frames)
            if is_needed and (name := values[i]) is not None:
                part[column] = part[column].fillna(name)
        joined.append(part)
    whole = pd.concat(joined, ignore_index=True)
    _warn_of_other_settings(whole, np.repeat(np.arange(len(frames)), [len(f) for f in frames]), provenances)
    return whole


def _warn_of_other_settings(whole: Any, part: np.ndarray, provenances: Sequence[dict[str, Any]]) -> None:
    """Log a warning if rows with the same address come from parts with different settings. ``part``: of every row."""
    keys = sorted({k for p in provenances for k in p} - NO_SETTINGS)
    settings = [tuple(repr(p.get(k)) for k in keys) for p in provenances]
    if len(set(settings)) < 2:
        return
    number = np.array([settings.index(s) for s in settings])[part]
    differs = whole.assign(setting=number).groupby(ADDRESS, dropna=False, sort=False)["setting"].nunique() > 1
    if not differs.any():
        return
    names = [k for i, k in enumerate(keys) if len({s[i] for s in settings}) > 1]
    log.warning(
        "%d of %d joined effects have the same address in parts that differ in %s, and are averaged as one: to keep "
        "them apart, summarise each part by itself, or write the setting into the column intervention",
        differs.sum(), len(differs), ", ".join(names),
    )  # fmt: skip


def _renumber(frame: Any, provenance: dict[str, Any], numbers: dict[Hashable, int]) -> np.ndarray:
    """Return the new number of every row's example; add the prompts of this part to ``numbers``.

    A prompt is known by its hash (column ``prompt``). A set that holds it twice has two examples of it. Rows without
    a hash, as in older files, are known by the hash of their whole prompt set and their number in it.
    """
    examples = frame[["example", "prompt"]].drop_duplicates("example").sort_values("example")
    seen: dict[Hashable, int] = {}
    new: dict[int, int] = {}
    taken = set(numbers.values())
    for old, prompt in zip(examples["example"].tolist(), examples["prompt"].tolist(), strict=True):
        name: Hashable = (_text(provenance.get("prompts")), old) if pd.isna(prompt) else prompt
        seen[name] = seen.get(name, 0) + 1
        key = (name, seen[name])
        if key not in numbers:
            numbers[key] = old if old not in taken else max(taken) + 1
            taken.add(numbers[key])
        new[old] = numbers[key]
    return frame["example"].map(new).to_numpy()


def _model_names(provenances: Sequence[dict[str, Any]], is_joined: bool) -> list[str | None]:
    """Return a name of the model of every part: the shortest that tells different models apart.

    None for a part of several models, and for all parts if there is one model. ``is_joined``: some rows have a name.
    """
    facts = [tuple(_text(p.get(key)) for key in MODEL_KEYS) for p in provenances]
    differ = [len({f[i] for f in facts}) > 1 for i in range(len(MODEL_KEYS))]
    if not any(differ) and not is_joined:
        return [None] * len(facts)
    # weights of models with different names differ anyway
    shown = [i for i in range(1, len(MODEL_KEYS)) if differ[i] and not (MODEL_KEYS[i] == "weights" and differ[0])]
    if len({(f[0], *(f[i] for i in shown)) for f in facts}) < len(set(facts)):
        shown = sorted({*shown, MODEL_KEYS.index("weights")})
    is_several = [isinstance(p.get("model"), list) or isinstance(p.get("weights"), list) for p in provenances]
    return [None if several else _model_name(f, shown) for several, f in zip(is_several, facts, strict=True)]


def _model_name(facts: tuple[str | None, ...], shown: Sequence[int]) -> str:
    """Return a model's name, with the facts in which it differs from others in brackets."""
    parts = []
    for i in shown:
        fact = facts[i] or "not stated"
        parts.append(f"{MODEL_KEYS[i]} {fact.removeprefix('sha256:')[:SHOWN]}")
    return (facts[0] or "model not stated") + (f" ({', '.join(parts)})" if parts else "")


def _text(value: Any) -> str | None:
    """Return a provenance entry as text; None if it is missing, or a list, as in a joined table of different parts."""
    return None if value is None or isinstance(value, list) else str(value)
