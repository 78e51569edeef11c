"""The kinds of results that a page can show, one row for each.

A row says how a result is written into the page and read from it again. ``page/kinds.js`` has a row of the same name,
which says how the result is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.errors import InterpError
from interp.plots import payload
from interp.plots.circuit_payload import (
    CircuitLike,
    CurveLike,
    decode_circuit,
    decode_curve,
    encode_circuit,
    encode_curve,
)
from interp.plots.pattern_payload import decode_patterns, encode_patterns
from interp.results.attention_patterns import AttentionPatterns
from interp.results.attention_stats import AttentionStats
from interp.results.effects import Effects
from interp.utils.damage import Budget

Result = Effects | AttentionStats | AttentionPatterns | CircuitLike | CurveLike | str


@dataclass(frozen=True)
class ResultKind:
    """How one kind of result goes into a page and comes back."""

    type: type
    encode: Callable[[Any, dict[str, Any]], dict[str, Any]]  # of a result and its provenance as strict JSON
    decode: Callable[[dict[str, Any], Budget], Any]
    provenance: Callable[[Any], dict[str, Any]] = lambda result: result.provenance
    check: Callable[[Any, str], None] = lambda result, name: None  # InterpError if there is nothing to show


def check_effects(effects: Effects, name: str) -> None:
    """Raise InterpError if a table is empty or holds only NaN."""
    if len(effects) == 0:
        raise InterpError(f"{name} is an empty Effects table: there is nothing to show")
    if not np.isfinite(effects.frame()["raw"]).any():
        raise InterpError(f"{name}: every effect is NaN, so there is nothing to show; check the metric and the model")


def check_attention(stats: AttentionStats, name: str) -> None:
    """Raise InterpError if there are no statistics or no examples."""
    if not stats.values or len(stats) == 0:
        raise InterpError(f"{name} holds attention statistics of 0 examples: there is nothing to show")


def check_patterns(patterns: AttentionPatterns, name: str) -> None:
    """Raise InterpError if there are no prompts or no heads."""
    if len(patterns) == 0 or not patterns.heads:
        raise InterpError(f"{name} holds attention patterns of 0 prompts or heads: there is nothing to show")


KINDS: dict[str, ResultKind] = {
    "effects": ResultKind(Effects, payload.encode_effects, payload.decode_effects, check=check_effects),
    "attention": ResultKind(AttentionStats, payload.encode_attention, payload.decode_attention, check=check_attention),
    "patterns": ResultKind(AttentionPatterns, encode_patterns, decode_patterns, check=check_patterns),
    "circuit": ResultKind(CircuitLike, encode_circuit, decode_circuit),
    "curve": ResultKind(CurveLike, encode_curve, decode_curve, provenance=lambda curve: curve.recipe),
    "prose": ResultKind(str, payload.encode_prose, payload.decode_prose, provenance=lambda text: {}),
}


def kind_of(result: Any) -> ResultKind | None:
    """Return the row of a result, or None if a page cannot show it."""
    return next((kind for kind in KINDS.values() if isinstance(result, kind.type)), None)


def provenance_of(result: Result) -> dict[str, Any]:
    """Return the provenance of a result; empty for prose."""
    kind = kind_of(result)
    return {} if kind is None else kind.provenance(result)


def encode(result: Result) -> dict[str, Any]:
    """Encode one result as JSON, without its examples.

    `interp.plots.budget` adds as many examples as fit.
    """
    kind = kind_of(result)
    if kind is None:
        raise InterpError(f"a report cannot show a {type(result).__name__}")
    return kind.encode(result, payload.clean_json(kind.provenance(result)))


def decode(data: dict[str, Any], budget: Budget) -> Result:
    """Decode one result from its JSON. What it allocates is taken from ``budget``."""
    kind = KINDS.get(data.get("kind", ""))
    if kind is None:
        raise InterpError(f"this report holds a result of an unknown kind {data.get('kind')!r:.40}; upgrade interp")
    try:
        return kind.decode(data, budget)
    except (KeyError, TypeError, AttributeError) as error:
        raise InterpError(f"this report is damaged: a {data['kind']} result lacks {error}") from None
