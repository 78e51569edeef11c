"""Circuits: which edges of a model carry a behaviour, by estimate and exactly, and how much of it they carry alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.circuits.attribution import attribute_edges
    from interp.circuits.baselines import magnitude_scores, random_scores
    from interp.circuits.faithful import Curve, Faithfulness, completeness, curve, faithfulness, minimality
    from interp.circuits.gates import causal_head_gating, contrastive_head_gating
    from interp.circuits.graph import Circuit
    from interp.circuits.head_gates import HeadGates
    from interp.circuits.nodes import atp_star, attribute_sites
    from interp.circuits.scores import EdgeScores
    from interp.circuits.screening import screen

_HOMES = {
    "attribute_edges": "attribution", "magnitude_scores": "baselines", "random_scores": "baselines",
    "Curve": "faithful", "Faithfulness": "faithful", "completeness": "faithful", "curve": "faithful",
    "faithfulness": "faithful", "minimality": "faithful", "Circuit": "graph", "EdgeScores": "scores",
    "atp_star": "nodes", "attribute_sites": "nodes", "screen": "screening",
    "HeadGates": "head_gates", "causal_head_gating": "gates", "contrastive_head_gating": "gates",
}  # fmt: skip

__all__ = [
    "Circuit", "Curve", "EdgeScores", "Faithfulness", "HeadGates", "atp_star", "attribute_edges", "attribute_sites",
    "causal_head_gating", "completeness", "contrastive_head_gating", "curve", "faithfulness", "magnitude_scores",
    "minimality", "random_scores", "screen",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interp.circuits' has no attribute {name!r}")
    value = getattr(import_module(f"interp.circuits.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
