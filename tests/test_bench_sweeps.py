"""`interp bench sweeps`: the other libraries' sweeps agree with interp's and with each other, on a tiny model."""

from __future__ import annotations

import json

import numpy as np
import pytest

import interp
from interp.bench import sweeps
from interp.bench.cases import ALL_PEERS, Workbench, cases
from interp.bench.peers import HuggingFace, NNsight, Pyvene, TransformerLens, missing
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError
from interp.model.loading import boot
from interp.sites import Site

PAIR = interp.PromptPair("w1 w2 w3 w4 w5 w6", "w1 w9 w3 w4 w5 w6", "w95", "w96")
PEAKS = {"torch": 1.0, "engine": 2.0}


@pytest.fixture(scope="module")
def bench(word_tokenizer) -> Workbench:
    bridge = boot(tiny_hf("llama"), tokenizer=word_tokenizer).bridge
    return Workbench(interp.load(tiny_hf("llama"), tokenizer=word_tokenizer), tiny_hf("llama"), bridge)


@pytest.fixture(scope="module")
def peers(bench, word_tokenizer):
    return sweeps.peers_of(bench, word_tokenizer)


def made(bench: Workbench, kind: str):
    n = len(bench.encode(PAIR))
    if kind == "resid_pre":
        return bench.patching(kind, PAIR, [Site(kind, i, position=p) for i in range(3) for p in range(n)], 9, hf=1e9)
    if kind == "z":
        return bench.patching(kind, PAIR, list(bench.model.sites("z")), None)
    if kind == "z by position":
        return bench.patching(kind, PAIR, [s.at(p) for s in bench.model.sites("z") for p in (0, 2)], 5)
    if kind == "ablation":
        return bench.ablation(kind, [PAIR, PAIR], 2, 4)
    if kind == "tracing":
        return bench.tracing(kind, interp.Fact("w1 w2 w3 w4", "w2", "w95"), 2, 4)
    if kind == "edits":
        return bench.edits(
            kind, interp.PromptPair(*(f"{p} w8 w3 w4 w5 w6" for p in (PAIR.clean, PAIR.corrupt)), "w95", "w96")
        )
    return bench.edges(kind, PAIR, [1], 12, one=0.0)


@pytest.mark.parametrize("kind", ["resid_pre", "z", "z by position", "ablation", "tracing", "edges", "edits"])
def test_all_libraries_agree(bench, peers, kind: str) -> None:
    case = made(bench, kind)
    found = sweeps.measure(case, peers, 1, PEAKS)
    used = [peers[k].name for k in case.peers if k in peers]
    assert set(found["paths"]) == {"interp", *used} and len(used) >= (1 if kind == "edits" else 2)
    assert all(found["paths"][name]["max_gap"] < 1e-4 for name in used)
    assert found["gflop"] > 0 and found["bound_s"]["torch"] == 2 * found["bound_s"]["engine"]
    text = sweeps.table(found)
    assert case.name in text and "GFLOP/s" in text
    if kind == "resid_pre":
        assert "NOT MET" in text and "9 of" in text


@pytest.mark.parametrize("kind", [NNsight, Pyvene])
def test_optional_libraries_are_among_them(peers, kind: type) -> None:
    if (why := missing(kind)) is not None:
        pytest.skip(why)
    assert kind in peers


def test_the_jobs_are_not_trivial(bench, peers) -> None:
    """Cells differ from each other and from the unpatched run, so that agreement means something."""
    case = made(bench, "z")
    values = peers[HuggingFace].sweep(case.parts[0].job)
    assert np.ptp(values) > 1e-2 and len(set(values.round(6))) > len(values) // 2


def test_a_library_with_other_numbers_is_not_timed(bench, peers) -> None:
    class Wrong(HuggingFace):
        def sweep(self, job):
            return super().sweep(job) + 0.01

    with pytest.raises(InterpError, match="disagree by 1"):
        sweeps.measure(made(bench, "z"), {**peers, HuggingFace: Wrong(bench.hf)}, 1, PEAKS)


def test_what_is_missing_is_said(bench, peers) -> None:
    without = {k: p for k, p in peers.items() if k is not NNsight}
    found = sweeps.measure(made(bench, "z"), without, 1, PEAKS)
    assert NNsight.name in found["not_measured"] and "not measured" in sweeps.table(found)
    assert (TransformerLens, HuggingFace, NNsight, Pyvene) == ALL_PEERS
    with pytest.raises(InterpError, match="no such cases: nonsense"):
        sweeps.run(["nonsense"])
    assert set(cases(bench)) == set(sweeps.NAMES)


def test_results_are_joined_in_one_file(tmp_path) -> None:
    path = tmp_path / "sub" / "sweeps.json"
    sweeps.write({"made": 1, "cases": [{"name": "a", "x": 1}, {"name": "b", "x": 1}]}, path)
    sweeps.write({"made": 2, "cases": [{"name": "b", "x": 2}]}, path)
    found = json.loads(path.read_text())
    assert found["made"] == 2 and {c["name"]: c["x"] for c in found["cases"]} == {"a": 1, "b": 2}
