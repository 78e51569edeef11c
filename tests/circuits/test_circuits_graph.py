"""Circuits as objects: edges that exist, paths, sets, files, selections."""

from __future__ import annotations

import json

import numpy as np
import pytest

from interp.circuits import Circuit, EdgeScores
from interp.circuits.topology import Architecture, architecture
from interp.errors import InterpError, ModelError, SiteError
from interp.sites import Edge, Site

SMALL = Architecture(n_layers=2, n_heads=4, n_kv_heads=2, mlps=True, parallel=False)
PARALLEL = Architecture(n_layers=2, n_heads=2, n_kv_heads=2, mlps=True, parallel=True)
PATH = ["resid_pre.L0 -> v.L0H1", "z.L0H3 -> mlp_out.L0", "mlp_out.L0 -> q.L1H0", "z.L1H0 -> resid_post.L1"]


def test_every_edge_is_counted_by_hand() -> None:
    # layer 0: 8 readers of the input, and an MLP that reads input and 4 heads; layer 1: 8 readers of 6, an MLP of 10;
    # the logits read all 11
    assert len(SMALL) == 8 * 1 + 5 + 8 * 6 + 10 + 11 == len(list(SMALL.edges()))
    # parallel: MLPs read what attention reads
    assert len(PARALLEL) == 6 + 1 + 6 * 4 + 4 + 7
    assert SMALL.fed_by(Site("k", 1, 1)) == (Site("z", 1, 2), Site("z", 1, 3))
    assert SMALL.fed_by(Site("resid_post", 1)) == ()


def test_a_place_and_the_number_of_edges_need_no_matrix() -> None:
    """The matrix of a model of 20,000 layers with one head has 1.6 billion cells."""
    for graph in (SMALL, PARALLEL, Architecture(3, 2, 1, mlps=False, parallel=False)):
        assert len(graph) == graph.allowed.sum()
        for (row, column), allowed in np.ndenumerate(graph.allowed):
            edge = Edge(graph.senders[column], graph.receivers[row])
            if allowed:
                assert graph.place(edge) == (row, column)
            else:
                with pytest.raises(SiteError, match="there is no edge"):
                    graph.place(edge)
    deep = Architecture(2000, 1, 1, mlps=True, parallel=False)
    Circuit(deep, ["resid_pre.L0 -> v.L0H0", "z.L0H0 -> resid_post.L1999"])
    assert "allowed" not in vars(deep)


@pytest.mark.parametrize("kind,parallel", [("llama", False), ("gpt2", False), ("neox", True)])
def test_architectures_are_read_off_models(tiny, kind: str, parallel: bool) -> None:
    graph = architecture(tiny(kind))
    assert graph.mlps and graph.parallel == parallel and graph.n_kv_heads == tiny(kind).n_kv_heads


@pytest.mark.parametrize(
    "graph,edge,says",
    [
        (PARALLEL, "z.L0H0 -> mlp_out.L0", "attention and MLPs are parallel"),
        (SMALL, "mlp_out.L0 -> z.L1H0", "is no receiver"),
        (SMALL, "q.L0H0 -> mlp_out.L0", "is no sender"),
        (SMALL, "z.L0H0 -> k.L1H3", "is no receiver"),
        (SMALL, "z.L1H0 -> q.L1H1", "computed before the sender"),
        (SMALL, "mlp_out.L1 -> mlp_out.L1", "computed before the sender"),
        (SMALL, "z.L0H0", "cannot read"),
    ],
)
def test_edges_that_do_not_exist_are_named(graph: Architecture, edge: str, says: str) -> None:
    with pytest.raises(SiteError, match=says):
        Circuit(graph, [edge])


def test_pruning_keeps_paths() -> None:
    whole = Circuit(SMALL, PATH)
    # v.L0H1 belongs to heads 2 and 3, so that the path goes on from head 3
    assert whole.connected() == whole and whole.is_connected()
    dead = Circuit(SMALL, [*PATH, "resid_pre.L0 -> q.L1H3", "z.L0H0 -> resid_post.L1", "z.L0H2 -> k.L1H1"])
    assert dead.connected() == whole
    assert [str(n) for n in whole.nodes()] == ["resid_pre.L0", "z.L0H3", "mlp_out.L0", "z.L1H0"]
    for i in range(4):
        with pytest.raises(InterpError, match="disconnected"):
            Circuit(SMALL, PATH[:i] + PATH[i + 1 :]).connected()
    with pytest.raises(InterpError, match="is empty"):
        Circuit(SMALL, [])


def test_sets_and_overlap() -> None:
    a, b = Circuit(SMALL, PATH[:3]), Circuit(SMALL, PATH[1:])
    assert a | b == Circuit(SMALL, PATH) and a & b == Circuit(SMALL, PATH[1:3]) and a - b == Circuit(SMALL, PATH[:1])
    with pytest.raises(InterpError, match="is empty"):
        a - a
    edges = a.overlap(b).set_index("of").loc["edges"]
    assert (edges["shared"], edges["here"], edges["jaccard"]) == (2, 3, 0.5)
    with pytest.raises(ModelError, match="different models"):
        a | Circuit(PARALLEL, ["resid_pre.L0 -> resid_post.L1"])
    with pytest.raises(ModelError, match="different models"):
        Circuit(SMALL, PATH, provenance={"weights": "x"}) & Circuit(SMALL, PATH, provenance={"weights": "y"})


def test_files_come_back_and_know_their_model(tiny, tmp_path) -> None:
    model = tiny("llama")
    edges = {Edge.parse("resid_pre.L0 -> v.L0H1"): -0.5, Edge.parse("z.L0H2 → resid_post.L2"): float("nan")}
    circuit = Circuit.of(model, edges, roles={Site("z", 0, 2): "mover"})
    path = circuit.write(tmp_path / "c.json")
    back = Circuit.read(path, model)
    assert back == circuit and back.roles == circuit.roles and back.provenance == circuit.provenance
    assert back.frame()["score"].iloc[0] == -0.5 and np.isnan(back.frame()["score"].iloc[1])
    assert back.frame()["receiver_role"].tolist() == ["mover", ""]
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "provenance": {**data["provenance"], "weights": "0" * 24}}))
    with pytest.raises(ModelError, match=r"made for .* with weights 0000.*says nothing about other weights"):
        Circuit.read(path, model)
    assert Circuit.read(path) == circuit  # without a model nothing is checked
    with pytest.raises(ModelError, match="is of a model with"):
        back.check(tiny("gpt2"))
    edge, graph = data["edges"][0], data["architecture"]
    broken = [
        ("{", "not JSON"), ("{}", "not written by"), (json.dumps({**data, "schema": 99}), "version 99"),
        (json.dumps({**data, "neurons": {"mlp_post.L9N0": 1.0}}), "no neuron"), ("[" * 100_000, "nested too deeply"),
        (json.dumps({"format": data["format"]}), "version None"), (json.dumps({**data, "edges": []}), "is empty"),
        (json.dumps({**data, "edges": [["z.L9H9", *edge[1:]]]}), "z.L9H9 is no sender"),
    ]  # fmt: skip
    hurt = ({"edges": [edge[:2]]}, {"edges": [[*edge[:2], "x"]]}, {"architecture": {}}, {"roles": ["x"]})
    hurt += tuple({"architecture": {**graph, **x}} for x in ({"n_layers": "x"}, {"n_layers": 10**5}, {"n_kv_heads": 0}))
    hurt += ({"edges": [[*edge[:2], 1e999]]}, {"roles": {edge[0]: 5}})
    broken += [(json.dumps({**data, **more}), "is damaged") for more in hurt]
    for text, says in broken:
        path.write_text(text)
        with pytest.raises(InterpError, match=says):
            Circuit.read(path)
    with pytest.raises(InterpError, match="cannot be read"):
        Circuit.read(tmp_path / "elsewhere.json")
    with pytest.raises(InterpError, match="cannot be written"):
        circuit.write(tmp_path / "nowhere" / "c.json")
    assert list(tmp_path.iterdir()) == [path]


def test_a_role_needs_a_node() -> None:
    with pytest.raises(InterpError, match="which is no node"):
        Circuit(SMALL, PATH, roles={Site("z", 7, 0): "x"})


@pytest.fixture
def scores() -> EdgeScores:
    matrix = np.where(SMALL.allowed, 0.01, np.nan)
    for i, edge in enumerate(PATH):
        matrix[SMALL.place(Edge.parse(edge))] = (-1) ** i * (4 - i)
    matrix[SMALL.place(Edge.parse("z.L0H0 -> q.L1H2"))] = 9.0  # leads nowhere
    return EdgeScores(SMALL, matrix, {"method": "by hand"})


def test_selections(scores: EdgeScores) -> None:
    path = Circuit(SMALL, PATH)
    assert scores.top(5) == path and len(scores.top(5, prune=False)) == 5
    assert scores.top(5).provenance["selection"] == "top 5 by |score|"
    assert scores.above(0.5) == path and scores.greedy(4) == path  # backwards from the logits, the dead end is not met
    assert scores.greedy(len(SMALL)) == Circuit(SMALL, SMALL.edges())
    signed = scores.top(3, absolute=False, prune=False)
    assert {str(e) for e in signed.edges} >= {"z.L0H0 → q.L1H2", "resid_pre.L0 → v.L0H1", "mlp_out.L0 → q.L1H0"}
    assert scores.frame()["score"].iloc[:2].tolist() == [9.0, 4.0] and len(scores.frame()) == len(scores)
    assert scores["z.L0H3 -> mlp_out.L0"] == -3
    assert scores.senders()[Site("z", 0, 3)] == pytest.approx(-3 + 0.01 * (8 + 1 + 1))


def test_selections_that_are_none(scores: EdgeScores) -> None:
    for n in (0, len(SMALL) + 1):
        with pytest.raises(InterpError, match="this model has"):
            scores.top(n)
    with pytest.raises(InterpError, match="keeps no edge"):
        scores.above(10)
    with pytest.raises(InterpError, match=f"keeps all {len(SMALL)} edges"):
        scores.above(0.001)
    with pytest.raises(InterpError, match="disconnected"):
        scores.top(1)
    for bad in ("5", 2.5, True):
        with pytest.raises(InterpError, match="a whole number"):
            scores.top(bad)  # type: ignore[arg-type]
    with pytest.raises(InterpError, match="a number, in the unit of scores"):
        scores.above("x")  # type: ignore[arg-type]
    nothing = EdgeScores(SMALL, np.zeros(SMALL.allowed.shape), {})
    for choose in (nothing.top, nothing.greedy):
        with pytest.raises(InterpError, match="every edge scores 0"):
            choose(5)
