"""Circuits: which edges of a model carry a behaviour, by estimate and exactly, and how much of it they carry alone."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from interp.circuits.attribution import attribute_edges
    from interp.circuits.baselines import magnitude_scores, random_scores
    from interp.circuits.channels import Channels, attention_channels
    from interp.circuits.curves import MIB, Curve, curve, mib
    from interp.circuits.diffmask import HeadMasks, differential_masks
    from interp.circuits.faithful import Faithfulness, completeness, faithfulness, minimality
    from interp.circuits.flow import flow_routes, flow_scores
    from interp.circuits.gates import causal_head_gating, contrastive_head_gating
    from interp.circuits.graph import Circuit
    from interp.circuits.head_gates import HeadGates
    from interp.circuits.interchange import Interchange, interchange_accuracy
    from interp.circuits.nodes import atp_star, attribute_sites
    from interp.circuits.pruning import Pruned, prune_edges
    from interp.circuits.roles import name_roles, score_neurons
    from interp.circuits.scores import EdgeScores
    from interp.circuits.screening import screen
    from interp.circuits.search import acdc, acdc_sweep
    from interp.circuits.weights import WeightCircuits

_NAMES = {
    "attribution": ("attribute_edges",),
    "baselines": ("magnitude_scores", "random_scores"),
    "channels": ("Channels", "attention_channels"),
    "diffmask": ("HeadMasks", "differential_masks"),
    "curves": ("MIB", "Curve", "curve", "mib"),
    "faithful": ("Faithfulness", "completeness", "faithfulness", "minimality"),
    "flow": ("flow_routes", "flow_scores"),
    "gates": ("causal_head_gating", "contrastive_head_gating"),
    "graph": ("Circuit",),
    "head_gates": ("HeadGates",),
    "interchange": ("Interchange", "interchange_accuracy"),
    "nodes": ("atp_star", "attribute_sites"),
    "pruning": ("Pruned", "prune_edges"),
    "roles": ("name_roles", "score_neurons"),
    "scores": ("EdgeScores",),
    "screening": ("screen",),
    "search": ("acdc", "acdc_sweep"),
    "weights": ("WeightCircuits",),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}

__all__ = [
    "MIB", "Channels", "Circuit", "Curve", "EdgeScores", "Faithfulness", "HeadGates", "HeadMasks", "Interchange",
    "Pruned", "WeightCircuits", "acdc", "acdc_sweep", "atp_star", "attention_channels", "attribute_edges",
    "attribute_sites", "causal_head_gating", "completeness", "contrastive_head_gating", "curve", "differential_masks",
    "faithfulness", "flow_routes", "flow_scores", "interchange_accuracy", "magnitude_scores", "mib", "minimality",
    "name_roles", "prune_edges", "random_scores", "score_neurons", "screen",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'interp.circuits' has no attribute {name!r}")
    value = getattr(import_module(f"interp.circuits.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
