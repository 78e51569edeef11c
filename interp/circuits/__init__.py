"""Circuits: which edges of a model carry a behaviour, by estimate and exactly, and how much of it they carry alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.circuits.attribution import attribute_edges
    from interp.circuits.baselines import magnitude_scores, random_scores
    from interp.circuits.faithful import Curve, Faithfulness, completeness, curve, faithfulness, minimality
    from interp.circuits.flow import flow_routes, flow_scores
    from interp.circuits.gates import causal_head_gating, contrastive_head_gating
    from interp.circuits.graph import Circuit
    from interp.circuits.head_gates import HeadGates
    from interp.circuits.nodes import atp_star, attribute_sites
    from interp.circuits.scores import EdgeScores
    from interp.circuits.screening import screen
    from interp.circuits.search import acdc, acdc_sweep

_NAMES = {
    "attribution": ("attribute_edges",),
    "baselines": ("magnitude_scores", "random_scores"),
    "faithful": ("Curve", "Faithfulness", "completeness", "curve", "faithfulness", "minimality"),
    "flow": ("flow_routes", "flow_scores"),
    "gates": ("causal_head_gating", "contrastive_head_gating"),
    "graph": ("Circuit",),
    "head_gates": ("HeadGates",),
    "nodes": ("atp_star", "attribute_sites"),
    "scores": ("EdgeScores",),
    "screening": ("screen",),
    "search": ("acdc", "acdc_sweep"),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "Circuit", "Curve", "EdgeScores", "Faithfulness", "HeadGates", "acdc", "acdc_sweep", "atp_star", "attribute_edges",
    "attribute_sites", "causal_head_gating", "completeness", "contrastive_head_gating", "curve", "faithfulness",
    "flow_routes", "flow_scores", "magnitude_scores", "minimality", "random_scores", "screen",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interp.circuits' has no attribute {name!r}")
    value = getattr(import_module(f"interp.circuits.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
