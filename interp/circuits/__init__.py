"""Circuits: find the edges that carry a behaviour, and measure what they carry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from interp.utils.lazy import lazy_exports

if TYPE_CHECKING:
    from interp.circuits.acdc_search import acdc, acdc_sweep
    from interp.circuits.attribution.baselines import magnitude_scores, random_scores
    from interp.circuits.attribution.edges import attribute_edges
    from interp.circuits.attribution.flow import flow_routes, flow_scores
    from interp.circuits.attribution.nodes import atp_star, attribute_sites
    from interp.circuits.attribution.screening import screen
    from interp.circuits.circuit import Circuit
    from interp.circuits.evaluation.curves import MIB, Curve, curve, mib
    from interp.circuits.evaluation.faithfulness import Faithfulness, completeness, faithfulness, minimality
    from interp.circuits.interchange.interchange import Interchange, interchange_accuracy
    from interp.circuits.learned.causal_gating import causal_head_gating, contrastive_head_gating
    from interp.circuits.learned.diffmask import HeadMasks, differential_masks
    from interp.circuits.learned.edge_pruning import Pruned, prune_edges
    from interp.circuits.learned.head_gates import HeadGates
    from interp.circuits.roles import name_roles, score_neurons
    from interp.circuits.scores import EdgeScores
    from interp.circuits.weights.channels import Channels, attention_channels
    from interp.circuits.weights.composition import WeightCircuits

_EXPORTS = {
    "acdc_search": ("acdc", "acdc_sweep"),
    "attribution.baselines": ("magnitude_scores", "random_scores"),
    "attribution.edges": ("attribute_edges",),
    "attribution.flow": ("flow_routes", "flow_scores"),
    "attribution.nodes": ("atp_star", "attribute_sites"),
    "attribution.screening": ("screen",),
    "circuit": ("Circuit",),
    "evaluation.curves": ("MIB", "Curve", "curve", "mib"),
    "evaluation.faithfulness": ("Faithfulness", "completeness", "faithfulness", "minimality"),
    "interchange.interchange": ("Interchange", "interchange_accuracy"),
    "learned.causal_gating": ("causal_head_gating", "contrastive_head_gating"),
    "learned.diffmask": ("HeadMasks", "differential_masks"),
    "learned.edge_pruning": ("Pruned", "prune_edges"),
    "learned.head_gates": ("HeadGates",),
    "roles": ("name_roles", "score_neurons"),
    "scores": ("EdgeScores",),
    "weights.channels": ("Channels", "attention_channels"),
    "weights.composition": ("WeightCircuits",),
}

__all__ = [
    "MIB", "Channels", "Circuit", "Curve", "EdgeScores", "Faithfulness", "HeadGates", "HeadMasks", "Interchange",
    "Pruned", "WeightCircuits", "acdc", "acdc_sweep", "atp_star", "attention_channels", "attribute_edges",
    "attribute_sites", "causal_head_gating", "completeness", "contrastive_head_gating", "curve", "differential_masks",
    "faithfulness", "flow_routes", "flow_scores", "interchange_accuracy", "magnitude_scores", "mib", "minimality",
    "name_roles", "prune_edges", "random_scores", "score_neurons", "screen",
]  # fmt: skip

__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
