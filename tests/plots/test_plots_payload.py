"""Patterns, circuits and paths in a report, without a browser: exact where they say so, and within their budget."""

from __future__ import annotations

import base64
import logging
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import plots_synthetic as synthetic
import pytest

from interp.circuits import Circuit, Curve
from interp.errors import InterpError
from interp.plots import Report, bars, heatmap, png, report
from interp.plots.budget import LONG_BYTES, SHORT_BYTES
from interp.plots.circuit_payload import encode_circuit
from interp.plots.codec import unpack
from interp.plots.panels import EdgePanel, split
from interp.plots.pattern_payload import decode_patterns, encode_pattern_example
from interp.plots.read_results import read_results
from interp.results.attention_patterns import AttentionPatterns, PatternExample
from interp.results.attention_stats import AttentionStats
from interp.results.effects import Effects
from interp.utils.damage import Budget


def back(*results, tmp_path: Path, **how) -> list:
    return Report.read(report(*results, **how).write(tmp_path / "r.html")).results


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (256, 256)])
def test_png_is_exact_and_a_png(shape: tuple[int, int]):
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    text = png.encode(image)
    np.testing.assert_array_equal(png.decode(text), image)
    data = base64.b64decode(text)
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", data[16:24]) == shape[::-1]
    with pytest.raises(InterpError, match="damaged"):
        png.decode(text[: len(text) // 8 * 4])


def test_patterns_come_back(tmp_path: Path):
    given = synthetic.patterns(2, layers=3, heads=2)
    (found,) = back(given, tmp_path=tmp_path)
    assert isinstance(found, AttentionPatterns)
    assert (found.heads, found.exact, found.n_layers, found.n_heads) == (given.heads, [], 3, 2)
    for a, b in zip(found.examples, given.examples, strict=True):
        assert a.segments == b.segments and list(a.runs) == ["clean", "corrupt"]
        for name in a.runs:
            np.testing.assert_array_equal(a.runs[name].maps, b.runs[name].maps)
            assert a.runs[name].tokens == b.runs[name].tokens
            np.testing.assert_allclose(a.runs[name].blocks, b.runs[name].blocks, atol=1 / 255)
            np.testing.assert_allclose(a.runs[name].received, b.runs[name].received, atol=1 / 400)


def test_exact_heads_stay_exact_where_others_are_made_smaller():
    given = synthetic.long_patterns(1024, bins=64, sentences=12)
    for coarse, levels in ((2, 256), (1, 16)):
        runs = encode_pattern_example(given, 0, coarse, levels)["runs"]["clean"]
        rough, sharp = runs["maps"]
        assert rough["bins"] == 64 // coarse and sharp["bins"] == 64
        np.testing.assert_array_equal(np.concatenate([png.decode(s) for s in sharp["sheets"]]).reshape(4, 64, 64),
                                      given.examples[0].runs["clean"].maps[sharp["heads"]])  # fmt: skip
        small = np.concatenate([png.decode(s) for s in rough["sheets"]]).reshape(270, 64 // coarse, -1)
        if coarse == 2:
            assert small[3, 10, 4] == given.examples[0].runs["clean"].maps[3, 20:22, 8:10].max()
        else:
            assert len(np.unique(small)) <= 16
    halves = unpack(runs["top"]["value"]).view(np.float16)
    np.testing.assert_allclose(halves, given.examples[0].runs["clean"].top_value, rtol=1e-3, atol=1e-6)


def test_a_short_report_is_small_and_a_hundred_thousand_tokens_say_what_was_pooled(tmp_path: Path):
    assert len(report(synthetic.head_effects(8), synthetic.patterns(4)).html) <= SHORT_BYTES
    n = 100_000
    long = synthetic.long_patterns(n, bins=32)
    stats = AttentionStats([long.examples[0].runs["clean"].tokens], {"entropy": [np.zeros((2, 2, n), np.float32)]})
    page = report(stats, long)
    assert len(page.html) <= LONG_BYTES
    read, patterns = Report.read(page.write(tmp_path / "r.html")).results
    assert isinstance(read, AttentionStats) and isinstance(patterns, AttentionPatterns)
    assert patterns.examples[0].n_tokens == n and patterns.examples[0].pooled
    assert "report_tokens" not in read.provenance or len(read.tokens[0]) < n


def test_a_prompt_of_a_hundred_tokens_is_shown_in_whatever_room_there_is():
    n, heads = 100, [(0, h) for h in range(40)]
    run = synthetic.pattern_run(synthetic.weights(n, 40), [f" w{i}" for i in range(n)], [("", 0, n)])
    long = AttentionPatterns(heads, [(0, 3)], 1, 40, [PatternExample([("", 0, n)], np.arange(n + 1), {"clean": run})])
    whole = report(long)
    assert SHORT_BYTES / 5 < len(whole.html) < LONG_BYTES
    seen = []
    for share in (1.0, 0.75, 0.55):
        data = report(long, max_bytes=int(share * len(whole.html)) + 200)._payload()["results"][0]
        (held,) = data["examples"]
        seen.append((held["coarse"], held["levels"]))
        maps = decode_patterns(data, Budget("page", 10**6, 64)).examples[0].runs["clean"].maps
        np.testing.assert_array_equal(maps[3], run.maps[3])  # the exact head keeps every weight
        assert np.array_equal(maps[4], run.maps[4]) == (share == 1.0)
    assert seen[0] == (1, 256) and seen[1][0] == 1 and seen[1][1] < 256 and seen[2][0] > 1, seen


@pytest.mark.parametrize("n", [0, 1])
def test_prompts_of_no_and_one_token(n: int):
    if n == 0:
        empty = AttentionPatterns([(0, 0)], [], 1, 1, [])
        with pytest.raises(InterpError, match="0 prompts"):
            report(empty)
        return
    run = synthetic.pattern_run(np.ones((1, 1, 1)), ["a"], [("", 0, 1)])
    one = AttentionPatterns([(0, 0)], [], 1, 1, [PatternExample([("", 0, 1)], np.arange(2), {"clean": run})])
    assert len(report(one).html) > 0


def test_too_large_says_which_part(caplog: pytest.LogCaptureFixture):
    effects = synthetic.head_effects(4)
    with pytest.raises(InterpError, match=r"over its budget of 0\.1 MB.*result 1 \(heads\): .* MB.*max_bytes"):
        _ = report({"heads": effects}, max_bytes=100_000).html
    frame = synthetic.position_effects(1).frame()
    rng = np.random.default_rng(0)
    many = pd.concat([frame.assign(example=i, patched=rng.normal(size=len(frame))) for i in range(400)])
    with caplog.at_level(logging.WARNING, logger="interp"):
        assert len(report(Effects(many, synthetic.PROVENANCE)).html) > SHORT_BYTES
    assert "over its budget" in caplog.text


def test_circuits_and_curves_come_back(tmp_path: Path):
    circuit, curve = synthetic.circuit(), synthetic.curve()
    found, again = back(circuit, curve, tmp_path=tmp_path)
    assert isinstance(found, Circuit) and isinstance(again, Curve)
    assert found == circuit and found.edges == circuit.edges and found.roles == circuit.roles
    np.testing.assert_array_equal(again.values, curve.values)
    assert again.cpr == curve.cpr and again.recipe == curve.recipe


def test_circuits_of_another_model_are_refused():
    with pytest.raises(InterpError, match="one report is about one model"):
        report(synthetic.circuit(), synthetic.head_effects(1, model="gpt2"))


def test_paths_make_a_map_of_senders_and_receivers(tmp_path: Path):
    effects = synthetic.edge_effects()
    (panel,) = split(effects)
    assert isinstance(panel, EdgePanel)
    summary = effects.summary()
    cells = panel.cells(panel.variants[0])
    for row in summary.itertuples():
        r = panel.rows.values.index(row.sender)
        c = panel.columns.values.index(f"{row.component}.L{row.layer}H{row.head}")
        assert cells["effect"][0, r, c] == row.effect and cells["lo"][0, r, c] == row.lo
    assert "z.L5H8 → v.L9H2" in str(bars(effects).layout.yaxis.ticktext)
    assert heatmap(effects).data[0].z.shape == (4, 2)
    assert heatmap(effects, example=2).data[0].z.shape == (4, 2)
    (again,) = back(effects, tmp_path=tmp_path)
    pd.testing.assert_frame_equal(again.frame(), effects.frame(), check_exact=True)


def test_paths_from_heads_into_one_place_are_a_grid_of_heads():
    frame = synthetic.head_effects(3).frame()
    frame["sender"] = [f"z.L{layer}H{head}" for layer, head in zip(frame["layer"], frame["head"], strict=True)]
    frame = frame.assign(component="resid_post", layer=29, head=pd.NA)
    (panel,) = split(Effects(frame))
    assert isinstance(panel, EdgePanel) and panel.receiver == "resid_post.L29"
    expected = synthetic.head_effects(3).summary().set_index(["layer", "head"])["effect"]
    assert panel.cells(panel.variants[0])["effect"][0, 18, 6] == expected[(18, 6)]
    assert '"edge":{"receiver":"resid_post.L29"}' in report(Effects(frame)).html


def test_a_folder_of_results_becomes_a_page(tmp_path: Path):
    synthetic.head_effects(2).write(tmp_path / "heads.parquet")
    synthetic.attention(1).write(tmp_path / "attention_stats.parquet")
    synthetic.patterns(1, layers=2, heads=2).write(tmp_path / "attention_patterns.parquet")
    synthetic.circuit().write(tmp_path / "found.json")
    (tmp_path / "other.json").write_text("[1, 2]")
    found = read_results(tmp_path)
    assert next(iter(found)) == "heads" and set(found) == {"heads", "attention_stats", "attention_patterns", "found"}
    assert found["found"] == synthetic.circuit() and isinstance(found["attention_patterns"], AttentionPatterns)
    assert len(report(found).sections) == 4


@pytest.mark.parametrize(("recipe", "sign"), [({}, 1), ({"mode": "denoise"}, 1), ({"mode": "noise"}, -1),
                                              ({"mode": "noise", "metric_direction": -1}, 1)])  # fmt: skip
def test_edges_are_shown_with_the_sign_of_tables_of_effects(recipe: dict, sign: int):
    """Corrupting an edge that helps lowers the metric: its noising score is negative, and its effect positive."""
    circuit = synthetic.circuit()
    made = type(circuit)(circuit.graph, circuit.edges, {}, {**synthetic.PROVENANCE, **recipe})
    edges = encode_circuit(made, made.provenance)["edges"]
    assert len(edges) == len(circuit.edges) and all(e["effect"] == sign * e["score"] != 0 for e in edges)
