"""Every method on every model whose circuit is known, and on random models, where none may find anything."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import interp
from interp import zoo
from interp.circuits import (
    Circuit,
    EdgeScores,
    acdc,
    acdc_sweep,
    atp_star,
    attribute_edges,
    flow_scores,
    magnitude_scores,
    random_scores,
)  # fmt: skip
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.topology import architecture
from interp.cli.main import app
from interp.errors import InterpError
from interp.results.significance import sign_flip
from interp.sites import Site

MAKERS = {name: made for name in zoo.__all__ if inspect.isfunction(made := getattr(zoo, name))}
NAMES = [n for n, made in MAKERS.items() if inspect.signature(made).return_annotation == "Known" and n != "random"]
MAKERS["ioi-abc"] = lambda: zoo.ioi(corruption="abc")  # other pairs, and one edge more


@pytest.fixture(scope="module", params=[*NAMES, "ioi-abc"])
def known(request):
    """Every model of the zoo that comes with its edges: a new one is tested without being named here.

    `zoo.Trained` models come with roles of heads, by measurement, and without edges: there is no truth to rank by.
    """
    found = MAKERS[request.param]()
    if not found.carries:
        pytest.skip(f"zoo.{request.param} comes without ground truth by edges")
    return found


@pytest.fixture(scope="module")
def pairs(known):
    return known.pairs(12, seed=1)


def auroc(scores: Mapping[Any, float], truth: set[Any]) -> float:
    """P(what is true outranks what is not) by size, ties counting half."""
    true = np.array([abs(x) for e, x in scores.items() if e in truth])
    other = np.array([abs(x) for e, x in scores.items() if e not in truth])
    assert len(true) == len(truth) and len(other)
    return float((true[:, None] > other).mean() + (true[:, None] == other).mean() / 2)


def by_site(table: Any, column: str) -> dict[Site, float]:
    """Of a table with a row per site."""
    rows = table.assign(head=table["head"].fillna(-1).astype(int)).itertuples()
    return {
        Site(r.component, int(r.layer), None if r.head < 0 else r.head): getattr(r, column) for r in rows
    }  # fmt: skip


def nodes_of(known):
    """Heads and MLPs."""
    mlps = known.model.sites("mlp_out", positions="all") if architecture(known.model).mlps else []
    return known.model.sites("z") | mlps


def test_exact_patching_ranks_nodes_and_edges_perfectly(known, pairs) -> None:
    evaluate = Evaluator(known.model, pairs, "logit_diff", "counterfactual")
    edges = list(evaluate.graph.edges())
    masks = np.repeat(evaluate.graph.allowed[None], len(edges), axis=0)
    for mask, edge in zip(masks, edges, strict=True):
        mask[evaluate.graph.place(edge)] = False
    paths = (evaluate.many(masks, evaluate.start(evaluate.graph.allowed)) - evaluate.whole).mean(1)
    assert auroc(dict(zip(edges, paths, strict=True)), set(known.circuit.edges)) == 1
    patched = interp.patch(known.model, pairs, nodes_of(known), mode="noise", show_progress=False).summary()
    assert auroc(by_site(patched, "raw"), set(known.truth)) == 1


def test_acdc(known, pairs) -> None:
    scores = acdc_sweep(known.model, pairs, [0.02, 0.05])
    assert auroc({e: scores[e] for e in scores.graph.edges()}, set(known.circuit.edges)) >= 0.98


@pytest.mark.parametrize("method", ["eap-ig-inputs", "eap-ig-activations"])
def test_integrated_gradients(known, pairs, method: Any) -> None:
    scores = attribute_edges(known.model, pairs, method=method, steps=5)
    assert auroc({e: scores[e] for e in scores.graph.edges()}, set(known.circuit.edges)) >= 0.95


def test_atp_star(known, pairs) -> None:
    """Nodes that send, and nodes that read: queries, keys and values by head."""
    sending = atp_star(known.model, pairs, nodes_of(known))
    assert auroc(by_site(sending, "score"), set(known.truth)) >= 0.97
    reading = atp_star(known.model, pairs, known.model.sites("q") | known.model.sites("k") | known.model.sites("v"))
    truth = {e.receiver for e in known.circuit.edges if e.receiver.component in "qkv"}
    assert auroc(by_site(reading, "score"), truth) >= 0.97


def test_flow_scores_are_shares_of_what_is_read(known, pairs) -> None:
    """On every architecture, without MLPs too. They are sizes, not effects: no AUROC is claimed for them."""
    scores = flow_scores(known.model, pairs)
    assert np.nanmin(scores.matrix) >= 0 and np.nanmax(np.nansum(scores.matrix, axis=1)) <= 1 + 1e-6  # float32 sums


def test_atp_star_as_published_misses_what_lies_before_saturated_attention() -> None:
    """Why `atp_star` carries the QK fix on, and why its mode is "noise".

    The published fix mends queries and keys, and not the slope through them. Denoising, two causes that are both needed
    have no effect apart.
    """
    known = zoo.induction()
    pairs, truth = known.pairs(12, seed=1), set(known.truth)
    published = by_site(atp_star(known.model, pairs, nodes_of(known), qk_fix="nodes"), "score")
    assert published[Site("z", 0, 1)] < 1e-6 and auroc(published, truth) < 0.97  # the previous-token head: float32's 0
    both = zoo.greater_than()
    pairs = both.pairs(12, seed=1)
    denoised = by_site(atp_star(both.model, pairs, nodes_of(both), mode="denoise"), "score")
    assert auroc(denoised, set(both.truth)) < 0.97


def of_nodes(graph, nodes: set[Site]) -> np.ndarray:
    """The edges from the input and from some nodes."""
    return graph.allowed & np.array([s in nodes or s == graph.input for s in graph.senders])


def each_edge_alone(model, pairs) -> EdgeScores:
    """Exact: by how much the metric suffers when one edge is corrupted."""
    evaluate = Evaluator(model, pairs, "logit_diff", "counterfactual")
    places = np.argwhere(evaluate.graph.allowed)
    masks = np.repeat(evaluate.graph.allowed[None], len(places), axis=0)
    masks[np.arange(len(places)), places[:, 0], places[:, 1]] = False
    matrix = np.zeros(evaluate.graph.allowed.shape)
    alone = evaluate.many(masks, evaluate.start(evaluate.graph.allowed)).mean(1)
    matrix[tuple(places.T)] = evaluate.whole.mean() - alone
    return EdgeScores(evaluate.graph, matrix, {})


def test_nothing_is_found_in_random_models() -> None:
    """Answer and foil are drawn apart from prompts and weights: what a method finds on some pairs helps on no others.

    By how much each method's circuit beats random ones of its size, on pairs that it has not seen: sign-flip tests, of
    which none may stay significant with so many methods. On the pairs that it has seen EAP's does, so the test can see.
    """
    gains: dict[str, list[np.ndarray]] = {}
    for seed in range(5):
        made = zoo.random(seed)
        model, pairs = made.model, made.pairs(28)
        seen = pairs[:4]
        eap = attribute_edges(model, seen, method="eap").helpful()
        start = eap.top(80, absolute=False, prune=False)
        signed = {
            "eap": eap,
            "eap-ig": attribute_edges(model, seen, steps=5).helpful(),
            "eap-ig-activations": attribute_edges(model, seen, method="eap-ig-activations", steps=1).helpful(),
            "clean-corrupted": attribute_edges(model, seen, method="clean-corrupted").helpful(),
            "path patching": each_edge_alone(model, seen[:2]),
        }
        unsigned = {"flow": flow_scores(model, seen), "magnitude": magnitude_scores(model, seen)}
        circuits = {name: s.top(200, absolute=False, prune=False) for name, s in signed.items()}
        circuits |= {name: s.top(200, prune=False) for name, s in unsigned.items()}
        circuits["acdc"] = acdc(model, seen, 0.01, "logit_diff", start=start, prune=False)
        evaluate = Evaluator(model, pairs, "logit_diff", "counterfactual")
        masks = {
            name: [c.mask(), *(random_scores(model, i).top(len(c), prune=False).mask() for i in range(3))]
            for name, c in circuits.items()
        }
        estimate = by_site(atp_star(model, seen, nodes_of(made)), "estimate")
        nodes, lot = sorted(estimate, key=estimate.__getitem__), np.random.default_rng(seed)
        drawn = [[nodes[i] for i in lot.permutation(len(nodes))[:12]] for _ in range(3)]
        masks["atp*"] = [of_nodes(evaluate.graph, set(some)) for some in (nodes[:12], *drawn)]
        for name, listed in masks.items():
            mine, *others = evaluate.many(np.stack(listed))
            gains.setdefault(name, []).append(mine - np.mean(others, axis=0))
    unseen = np.stack([np.concatenate([g[4:] for g in found]) for found in gains.values()])
    p = sign_flip(unseen)
    assert p.min() > 0.01 / len(gains), dict(zip(gains, p, strict=True))
    assert sign_flip(np.concatenate([g[:4] for g in gains["eap"]])[None])[0] < 0.01


def test_the_verb_finds_writes_and_names(tmp_path, monkeypatch) -> None:
    known = zoo.induction()
    model = known.model
    monkeypatch.setattr("interp.model.load_model.load", lambda *_, **__: model)
    lines = ["clean,corrupt,answer,foil", *(f"{p.clean},{p.corrupt},{p.answer},{p.foil}" for p in known.pairs(4))]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    base = ["circuit", "--pairs", str(tmp_path / "mine.csv"), "--out", str(tmp_path / "c.json")]
    for method in ("eap-ig-inputs", "acdc"):
        done = CliRunner().invoke(app, [*base, "--method", method, "--edges", "12", "--roles"])
        assert done.exit_code == 0, done.output
        assert "faithfulness 1.000" in done.output and re.search(r"z\.L0H1 +k\.L1H2 .*previous token", done.output)
    found = Circuit.read(tmp_path / "c.json", known.model)
    assert found == known.circuit and found.roles[Site("z", 1, 2)] == "induction"
    for bad in (["--method", "x"], ["--selection", "x"], ["--out", "c.txt"], ["--edges", "0"]):
        assert isinstance(CliRunner().invoke(app, [*base, *bad]).exception, InterpError)
