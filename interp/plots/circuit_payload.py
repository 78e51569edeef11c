"""Circuits and faithfulness curves as JSON in the page.

The classes of circuits and curves import torch, and drawing needs only their values. This module therefore describes
them by protocols and imports the classes only to decode.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

from interp.plots.codec import pack, unpack
from interp.results.signs import helpful_direction
from interp.sites import Edge, Site
from interp.utils.damage import Budget


@runtime_checkable
class CircuitLike(Protocol):
    """The part of `interp.circuits.Circuit` that a page needs."""

    graph: Any
    edges: dict[Edge, float]
    roles: dict[Site, str]
    provenance: dict[str, Any]

    def nodes(self) -> tuple[Site, ...]: ...  # noqa: D102

    def connected(self) -> Any: ...  # noqa: D102


@runtime_checkable
class CurveLike(Protocol):
    """The part of `interp.circuits.Curve` that a page needs."""

    sizes: Any
    edges: Any
    values: Any
    whole: Any
    empty: Any
    recipe: dict[str, Any]

    def frame(self) -> Any: ...  # noqa: D102


ARCHITECTURE = ("n_layers", "n_heads", "n_kv_heads", "mlps", "parallel")


def encode_circuit(circuit: CircuitLike, provenance: dict[str, Any]) -> dict[str, Any]:
    """Encode nodes with their place in the model, and edges with the nodes they feed.

    ``effect`` is the score with the sign of tables of effects: positive where the edge helps the metric.
    """
    direction = helpful_direction(circuit.provenance)
    graph, senders = circuit.graph, {e.sender for e in circuit.edges}
    nodes = [*circuit.nodes(), graph.output]
    number = {site: i for i, site in enumerate(nodes)}
    edges = []
    for edge, score in circuit.edges.items():
        fed_nodes = graph.fed_by(edge.receiver)
        receivers = [graph.output] if edge.receiver == graph.output else [s for s in fed_nodes if s in senders]
        has_score = not math.isnan(score)
        edges.append(
            {
                "sender": str(edge.sender), "receiver": str(edge.receiver), "from": number[edge.sender],
                "to": [number[s] for s in receivers or fed_nodes], "score": float(score) if has_score else None,
                "effect": direction * float(score) if has_score else None,
            }
        )  # fmt: skip
    return {
        "kind": "circuit",
        "provenance": provenance,
        "architecture": {k: getattr(graph, k) for k in ARCHITECTURE},
        "total": len(graph),
        "nodes": [
            {
                "site": str(s), "layer": s.layer, "head": s.head, "kind": _kind(s, graph),
                "role": circuit.roles.get(s, ""),
            }
            for s in nodes
        ],
        "edges": edges,
    }  # fmt: skip


def _kind(site: Site, graph: Any) -> str:
    if site == graph.input:
        return "input"
    return "logits" if site == graph.output else "head" if site.component == "z" else "mlp"


def decode_circuit(data: dict[str, Any], _: Budget) -> Any:
    """Decode what `encode_circuit` made as a Circuit."""
    from interp.circuits import Circuit
    from interp.circuits.topology import Architecture

    edges = {
        Edge(Site.parse(e["sender"]), Site.parse(e["receiver"])): float("nan") if e["score"] is None else e["score"]
        for e in data["edges"]
    }
    roles = {Site.parse(n["site"]): n["role"] for n in data["nodes"] if n["role"]}
    graph = Architecture(**data["architecture"])
    graph.check()
    return Circuit(graph, edges, roles, data["provenance"])


def encode_curve(curve: CurveLike, provenance: dict[str, Any]) -> dict[str, Any]:
    """Encode faithfulness by size with its interval, and the areas CPR and CMD."""
    frame = curve.frame()
    measured = {c: [_number(x) for x in frame[c]] for c in ("size", "edges", "faithfulness", "lo", "hi")}
    areas = {name: [_number(x) for x in getattr(curve, name)] for name in ("cpr", "cmd")}
    arrays = {name: pack(getattr(curve, name)) for name in ("sizes", "edges", "values", "whole", "empty")}
    return {"kind": "curve", "provenance": provenance, **areas, "measured": measured, "arrays": arrays}


def decode_curve(data: dict[str, Any], budget: Budget) -> Any:
    """Decode what `encode_curve` made as a Curve."""
    from interp.circuits import Curve

    return Curve(**{name: unpack(x, budget) for name, x in data["arrays"].items()}, recipe=data["provenance"])


def _number(x: Any) -> float | None:
    return float(x) if math.isfinite(x) else None
