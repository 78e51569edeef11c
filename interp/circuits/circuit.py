"""Circuit: a set of edges of a model, with scores, roles and provenance."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from interp.circuits.topology import Architecture, architecture
from interp.errors import InterpError, ModelError
from interp.model.model import Model
from interp.sites import Edge, Site
from interp.utils.damage import reading
from interp.utils.files import check_suffix, whole_file
from interp.utils.html_card import card
from interp.utils.json_text import parse_json

SCHEMA_VERSION = 1


class Circuit:
    """Edges of one model, in order of computation.

    ``edges`` maps each edge to its score (NaN if it has none). ``roles`` maps nodes (senders) to the name of their
    role, ``evidence`` maps nodes to the measurements behind that name (`name_roles`), and ``neurons`` maps single
    neurons to scores. ``provenance`` records how the circuit was made; its key ``"weights"`` holds the fingerprint of
    the model that the circuit belongs to. ``a | b``, ``a & b`` and ``a - b`` combine the sets of edges; where both
    circuits score an edge, the left one's score counts.

    Raises InterpError if there are no edges, and SiteError for an edge that the architecture does not have.
    """

    def __init__(
        self,
        graph: Architecture,
        edges: Mapping[Edge, float] | Iterable[Edge | str],
        roles: Mapping[Site, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
        evidence: Mapping[Site, Mapping[str, Any]] | None = None,
        neurons: Mapping[Site, float] | None = None,
    ) -> None:
        scored = edges.items() if isinstance(edges, Mapping) else ((e, float("nan")) for e in edges)
        scores = {Edge.parse(e) if isinstance(e, str) else e: score for e, score in scored}
        for edge, score in scores.items():
            if not isinstance(edge, Edge) or isinstance(score, bool) or not isinstance(score, int | float | np.number):
                raise InterpError(
                    f"expected edges like 'z.L3H1 -> q.L5H0' with numbers as scores, got {edge!r}: {score!r}"
                )
        if not scores:
            raise InterpError("the circuit is empty: it needs at least one edge")
        order = sorted(scores, key=graph.place)
        self.graph = graph
        self.edges: dict[Edge, float] = {e: float(scores[e]) for e in order}
        self.roles = dict(roles or {})
        self.provenance = dict(provenance or {})
        self.evidence = {s: dict(measurements) for s, measurements in (evidence or {}).items()}
        self.neurons = dict(neurons or {})
        self._check_sites()

    def _check_sites(self) -> None:
        """Raise InterpError for roles, evidence or neuron scores of unknown sites.

        Roles and evidence belong to nodes of the model, and neuron scores to its layers.
        """
        layers = range(self.graph.n_layers)
        bad_neuron = next((s for s in self.neurons if s.layer not in layers), None)
        if bad_neuron is not None:
            raise InterpError(f"a score was given to {bad_neuron}, which is no neuron of {self.graph.describe()}")
        bad_node = next((s for s in (*self.roles, *self.evidence) if s not in self.graph.sender_number), None)
        if bad_node is not None:
            raise InterpError(f"a role was given to {bad_node}, which is no node of {self.graph.describe()}")

    @classmethod
    def of(cls, model: Model, edges: Mapping[Edge, float] | Iterable[Edge | str], **more: Any) -> Circuit:
        """Make a circuit of a model: ``Circuit.of(model, ["z.L0H1 -> k.L1H2", …])``."""
        return cls(architecture(model), edges, provenance={"weights": model.fingerprint(), "model": model.name}, **more)

    @classmethod
    def whole(cls, model: Model) -> Circuit:
        """Make the circuit of all edges of a model."""
        return cls.of(model, architecture(model).edges())

    def __len__(self) -> int:
        return len(self.edges)

    def __contains__(self, edge: Edge | str) -> bool:
        return (Edge.parse(edge) if isinstance(edge, str) else edge) in self.edges

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Circuit) and self.graph == other.graph and set(self.edges) == set(other.edges)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        share = 100 * len(self) / len(self.graph)
        digits = 1 if share >= 0.1 else 3  # a circuit is a small share of a large model
        origin = self.provenance.get("selection") or self.provenance.get("method") or ""
        size = f"{len(self)} of {len(self.graph)} edges ({share:.{digits}f}%), {len(self.nodes())} nodes"
        return f"Circuit({size}{origin and ', '}{origin})"

    def _repr_html_(self) -> str:
        model = self.graph.describe()
        facts = {"edges": f"{len(self)} of {len(self.graph)}", "nodes": len(self.nodes()), "model": model}
        frame: Any = self.frame()
        order = frame["score"].abs().sort_values(ascending=False, kind="stable").index[:8]
        return card("Circuit", facts, ["sender", "receiver", "score", "sender_role"], frame.loc[order])

    # ------------------------------------------------------------ contents

    def nodes(self) -> tuple[Site, ...]:
        """The senders at which an edge starts or ends, in order of computation.

        An edge into k or v ends in a whole group of heads. Of the group, the heads that send something count; if no
        head does, all of them count.
        """
        sending = {e.sender for e in self.edges}
        nodes = set(sending)
        for receiver in {e.receiver for e in self.edges}:
            fed = set(self.graph.fed_by(receiver))
            nodes |= (fed & sending) or fed
        return tuple(s for s in self.graph.senders if s in nodes)

    def mask(self) -> Bool[np.ndarray, "receivers senders"]:
        """True where an edge is in the circuit."""
        mask = np.zeros(self.graph.allowed.shape, dtype=bool)
        for edge in self.edges:
            mask[self.graph.place(edge)] = True
        return mask

    def frame(self) -> pd.DataFrame:
        """Table with one row per edge: sender, receiver, score, roles of both ends."""
        role = {str(site): text for site, text in self.roles.items()}
        rows = [
            {
                "sender": str(e.sender), "receiver": str(e.receiver), "score": score,
                "sender_role": role.get(str(e.sender), ""),
                "receiver_role": ", ".join(self.roles[s] for s in self.graph.fed_by(e.receiver) if s in self.roles),
            }
            for e, score in self.edges.items()
        ]  # fmt: skip
        return pd.DataFrame(rows)

    # ------------------------------------------------------------ paths

    def connected(self) -> Circuit:
        """The circuit of the edges that lie on a path from the input to the logits.

        Any of a head's q, k and v continues a path through that head. Raises InterpError if there is no path.
        """
        edges = self._edges_on_paths()
        if not edges:
            raise InterpError(
                f"the circuit is disconnected: none of its {len(self)} edges lies on a path from {self.graph.input} to "
                f"{self.graph.output} (the logits). Keep more edges, or choose them greedily from the logits "
                "(EdgeScores.greedy, --selection greedy)"
            )
        return self._with(edges)

    def is_connected(self) -> bool:
        """Whether any path leads from the input to the logits."""
        return bool(self._edges_on_paths())

    def _edges_on_paths(self) -> dict[Edge, float]:
        senders, receivers = self._senders_after_input(), self._receivers_before_logits()
        return {e: x for e, x in self.edges.items() if e.sender in senders and e.receiver in receivers}

    def _senders_after_input(self) -> set[Site]:
        """Senders that a path from the input reaches."""
        senders = {self.graph.input}
        for edge in self.edges:  # in order of computation: an edge comes after all edges into its sender
            if edge.sender in senders:
                senders.update(self.graph.fed_by(edge.receiver))
        return senders

    def _receivers_before_logits(self) -> set[Site]:
        """Receivers from which a path leads to the logits."""
        receivers, senders = {self.graph.output}, set()
        for edge in reversed(self.edges):
            if edge.receiver in receivers or senders & set(self.graph.fed_by(edge.receiver)):
                receivers.add(edge.receiver)
                senders.add(edge.sender)
        return receivers

    # ------------------------------------------------------------ sets

    def __or__(self, other: Circuit) -> Circuit:
        self._check_comparable(other)
        return self._with({**other.edges, **self.edges}, joined=other, how="|")

    def __and__(self, other: Circuit) -> Circuit:
        self._check_comparable(other)
        return self._with({e: x for e, x in self.edges.items() if e in other.edges}, joined=other, how="&")

    def __sub__(self, other: Circuit) -> Circuit:
        self._check_comparable(other)
        return self._with({e: x for e, x in self.edges.items() if e not in other.edges}, joined=other, how="-")

    def overlap(self, other: Circuit) -> pd.DataFrame:
        """Table of how much two circuits share: one row for nodes, one for edges.

        ``shared``, ``here`` and ``there`` are counts: in both circuits, in this one, in the other. ``of_here`` and
        ``of_there`` divide ``shared`` by each circuit's size (Merullo et al. 2024, arXiv 2310.08744, report this
        quantity for the most important heads), and ``jaccard`` divides it by the size of the union.
        """
        self._check_comparable(other)
        rows = []
        for what, a, b in (
            ("nodes", set(self.nodes()), set(other.nodes())),
            ("edges", set(self.edges), set(other.edges)),
        ):
            n = len(a & b)
            rows.append(
                {"of": what, "shared": n, "here": len(a), "there": len(b), "of_here": n / len(a),
                 "of_there": n / len(b), "jaccard": n / len(a | b)}
            )  # fmt: skip
        return pd.DataFrame(rows)

    def _check_comparable(self, other: Circuit) -> None:
        if not isinstance(other, Circuit):
            raise InterpError(f"a Circuit can only be compared with a Circuit, got {type(other).__name__}")
        mine, theirs = (c.provenance.get("weights") for c in (self, other))
        if self.graph != other.graph or (mine and theirs and mine != theirs):
            raise ModelError("these circuits belong to different models: their edges do not correspond")

    def _with(self, edges: Mapping[Edge, float], joined: Circuit | None = None, how: str = "") -> Circuit:
        provenance = dict(self.provenance)
        roles = dict(self.roles)
        if joined is not None:
            roles = {**joined.roles, **roles}
            provenance["joined"] = {"how": how, "with": joined.provenance}
        return Circuit(self.graph, edges, roles, provenance, self.evidence, self.neurons)

    def annotated(
        self,
        roles: Mapping[Site, str] | None = None,
        evidence: Mapping[Site, Mapping[str, Any]] | None = None,
        neurons: Mapping[Site, float] | None = None,
    ) -> Circuit:
        """A copy in which roles, evidence or neurons are replaced by those passed.

        None leaves them as they are.
        """
        return Circuit(
            self.graph,
            self.edges,
            self.roles if roles is None else roles,
            self.provenance,
            self.evidence if evidence is None else evidence,
            self.neurons if neurons is None else neurons,
        )

    # ------------------------------------------------------------ files

    def write(self, path: str | Path) -> Path:
        """Save as JSON, whole or not at all.

        Raises InterpError for a name of another suffix than .json, or if the file cannot be written.
        """
        check_suffix(path, ".json", "a circuit is written as JSON. For its edges as a table: .frame().to_csv(…)")
        facts = {k: getattr(self.graph, k) for k in ("n_layers", "n_heads", "n_kv_heads", "mlps", "parallel")}
        data = {
            "format": "interp.Circuit", "schema": SCHEMA_VERSION, "architecture": facts,
            "provenance": self.provenance,
            "roles": {str(s): text for s, text in self.roles.items()},
            "evidence": {str(s): measurements for s, measurements in self.evidence.items()},
            "neurons": {str(s): score for s, score in self.neurons.items()},
            "edges": [[str(e.sender), str(e.receiver), None if np.isnan(x) else x] for e, x in self.edges.items()],
        }  # fmt: skip
        path = Path(path)
        text = json.dumps(data, indent=1, ensure_ascii=False, default=str)
        try:
            with whole_file(path) as file:
                file.write(text.encode("utf-8"))
        except OSError as e:
            raise InterpError(f"{path} cannot be written: {e.strerror}") from None
        return path

    @classmethod
    def read(cls, path: str | Path, model: Model | None = None) -> Circuit:
        """Load a circuit that `write` saved.

        Raises InterpError for a file that is not a circuit, is damaged, or has another schema version, and ModelError
        if ``model`` is passed and its weights are not those that the circuit was made for.
        """
        try:
            data = parse_json(Path(path).read_bytes())
        except OSError as e:
            raise InterpError(f"{path} cannot be read: {e.strerror}") from None
        except (ValueError, MemoryError) as e:
            raise InterpError(f"{path} is not a circuit: {e}") from None
        if not isinstance(data, dict) or data.get("format") != "interp.Circuit":
            raise InterpError(f"{path} is not a circuit: it was not written by Circuit.write")
        if (version := data.get("schema")) != SCHEMA_VERSION:
            raise InterpError(
                f"{path} has schema version {version!r}, and this version reads {SCHEMA_VERSION}: update interp"
            )
        with reading(path):
            circuit = cls._from(data)
        if model is not None:
            circuit.check(model)
        return circuit

    @classmethod
    def _from(cls, data: dict[str, Any]) -> Circuit:
        graph = Architecture(**data["architecture"])
        graph.check()
        edges = {Edge(Site.parse(s), Site.parse(r)): _score(x) for s, r, x in data["edges"]}
        roles = {Site.parse(s): _text(role) for s, role in data["roles"].items()}
        evidence, neurons = (
            {Site.parse(s): value for s, value in data.get(name, {}).items()} for name in ("evidence", "neurons")
        )
        return cls(graph, edges, roles, data["provenance"], evidence, {s: _score(x) for s, x in neurons.items()})

    def check(self, model: Model) -> None:
        """Raise ModelError unless architecture and weights are those of ``model``.

        Weights are compared only if the provenance names any.
        """
        if self.graph != architecture(model):
            mine, its = self.graph.describe(), architecture(model).describe()
            raise ModelError(f"the circuit is of a model with {mine}; {model.name} has {its}")
        made_for = self.provenance.get("weights")
        if made_for is not None and made_for != model.fingerprint():
            other = self.provenance.get("model", "another model")
            raise ModelError(
                f"the circuit was made for {other} with weights {made_for}; those of {model.name} are "
                f"{model.fingerprint()}. A circuit says nothing about other weights: find it again, or rebuild it with "
                "Circuit.of(model, edges)"
            )


def _score(x: Any) -> float:
    """Read a score of a file, where null means that an edge has none."""
    if x is None:
        return float("nan")
    if isinstance(x, bool) or not isinstance(x, int | float) or not np.isfinite(float(x)):
        raise ValueError(f"{x!r:.40} is not a score")
    return float(x)


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise ValueError(f"{x!r:.40} is not a role")
    return x
