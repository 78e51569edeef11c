"""The report without a browser: what is embedded, what is refused, what comes back."""

from __future__ import annotations

import ast
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import plots_synthetic as synthetic
import pytest

from interp.errors import InterpError
from interp.plots import Report, report
from interp.plots.codec import pack, unpack
from interp.plots.labels import visible
from interp.plots.report import PAGE_BYTES, embedded_json
from interp.results.attention_patterns import AttentionPatterns, PatternExample
from interp.results.attention_stats import AttentionStats
from interp.results.effects import COLUMNS, Effects

HOSTILE = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=document.title='owned'>",
    "&lt;b&gt;",
    "\u202eevil\u202c",
    "שלום",
    "👩‍👩‍👧",
    "nul\0here",
    "x" * 10_000,
    "\u2028\u2029",
    "{{data}}",
    "",
    "\ufffe\ue000",
    "\u0301",
    "\n\t ",
    "]]>",
]

LONE = "\ud800"  # half a character, as byte-level tokenizers can produce


def embedded(page: Report) -> dict:
    return json.loads(embedded_json(page.html))


def hostile() -> list:
    """Results in which every string is an attack."""
    effects = synthetic.position_effects(3)
    frame = effects.frame()
    frame["token"] = [HOSTILE[p] for p in frame["position"]]
    frame["role"] = [HOSTILE[p] if p == 0 else "" for p in frame["position"]]
    frame["metric"], frame["intervention"] = HOSTILE[0], HOSTILE[1]
    stats = synthetic.attention(2)
    return [
        {HOSTILE[1]: Effects(frame, {HOSTILE[0]: HOSTILE, "model": HOSTILE[0]})},
        AttentionStats([[*HOSTILE[:-1], LONE]] * 2, stats.values, stats.backends, {"task": HOSTILE[1]}),
        HOSTILE[0],
        hostile_patterns(),
    ]


def hostile_patterns() -> AttentionPatterns:
    """Tokens and names of segments that are attacks."""
    texts = [*HOSTILE[:-1], LONE]
    segments = [(HOSTILE[0], 0, 7), (HOSTILE[3], 7, 15)]
    run = synthetic.pattern_run(synthetic.weights(15, 2), texts, segments)
    example = PatternExample(segments, np.arange(16), {"clean": run})
    return AttentionPatterns([(0, 0), (0, 1)], [], 30, 9, [example], {"task": HOSTILE[0]})


def all_nan() -> Effects:
    return Effects(synthetic.head_effects(1).frame().assign(raw=np.nan, effect=np.nan))


def assert_same_stats(a: AttentionStats, b: AttentionStats) -> None:
    assert a.tokens == b.tokens and a.names == b.names and a.backends == b.backends
    for name in a.names:
        for x, y in zip(a.values[name], b.values[name], strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def test_numbers_in_the_page_are_the_summary():
    effects = synthetic.head_effects(8)
    (panel,) = embedded(report(effects))["results"][0]["panels"]
    (variant,) = panel["variants"]
    assert panel["rows"]["values"] == list(range(30)) and panel["columns"]["values"] == list(range(9))
    summary = effects.summary().set_index(["layer", "head"]).sort_index()
    for name in ("effect", "lo", "hi", "pooled", "pooled_lo", "pooled_hi", "raw", "raw_lo", "raw_hi", "n"):
        np.testing.assert_array_equal(variant["cells"][name], summary[name].to_numpy(dtype=float))


def test_position_panels_average_by_span_when_wording_differs():
    (panel,) = embedded(report(synthetic.position_effects(6, reordered=True)))["results"][0]["panels"]
    assert panel["columns"] == {"kind": "role", "values": ["IO", "S1", "S2", "end", ""],
                                "labels": ["IO", "S1", "S2", "end", "other tokens"]}  # fmt: skip
    effects = synthetic.position_effects(6, reordered=True)
    summary = effects.summary(by=["layer", "role"]).set_index(["layer", "role"])
    cells = np.array(panel["variants"][0]["cells"]["effect"]).reshape(30, 5)
    assert cells[5, 2] == summary.loc[(5, "S2"), "effect"]


def test_position_panels_keep_positions_when_wording_agrees():
    (panel,) = embedded(report(synthetic.position_effects(6)))["results"][0]["panels"]
    assert panel["columns"]["kind"] == "position"
    assert panel["columns"]["labels"][:5] == ["<|begin|>", "When", "‹IO›", "·and", "‹S1›"]


@pytest.mark.parametrize("n", [1, 8])
def test_read_gives_back_identical_results(tmp_path: Path, n: int):
    effects = Effects.concat([synthetic.position_effects(n), synthetic.head_effects(n, mode="noise")])
    stats = synthetic.attention(n)
    page = report({"patching": effects}, "prose\n\nhere", stats, title="T <&>", notes="N")
    back = Report.read(page.write(tmp_path / "deep" / "r.html"))
    assert (back.title, back.notes) == ("T <&>", "N")
    assert [name for name, _ in back.sections] == ["patching", None, None]
    again, prose, attention = back.results
    assert isinstance(again, Effects) and isinstance(attention, AttentionStats) and prose == "prose\n\nhere"
    pd.testing.assert_frame_equal(again.frame(), effects.frame(), check_exact=True)
    assert again.provenance == effects.provenance
    assert_same_stats(attention, stats)
    assert back.html == page.html


def test_values_that_are_not_derivable_survive(tmp_path: Path):
    frame = synthetic.head_effects(2).frame()
    frame.loc[3, ["effect", "raw", "patched"]] = [0.123456789012345, -0.0, np.nan]
    frame.loc[4, "raw"] = np.inf
    frame.loc[5, ["role", "token"]] = pd.NA
    effects = Effects(frame)
    (back,) = Report.read(report(effects).write(tmp_path / "r.html")).results
    assert isinstance(back, Effects)
    pd.testing.assert_frame_equal(back.frame(), effects.frame(), check_exact=True)


@pytest.mark.parametrize("n", [8, 64])
def test_page_of_a_demo_fits_its_budget_and_says_what_it_left_out(n: int):
    page = report(*synthetic.demo_sized(n))
    assert len(page.html) <= PAGE_BYTES
    attention = embedded(page)["results"][-1]
    assert 1 <= len(attention["examples"]) <= attention["n"] == n
    stats = page.results[-1]
    assert isinstance(stats, AttentionStats)
    np.testing.assert_array_equal(attention["statistics"][0]["mean"], stats.per_head("entropy").ravel())


def test_left_out_examples_are_named_after_reading(tmp_path: Path):
    stats = synthetic.attention(4)
    (back,) = Report.read(report(stats, max_bytes=330_000).write(tmp_path / "r.html")).results
    assert isinstance(back, AttentionStats)
    assert len(back) == 1 and back.provenance["report_examples"] == "first 1 of 4"


def test_hostile_text_stays_text(tmp_path: Path):
    page = report(*hostile(), title=HOSTILE[0], notes=HOSTILE[1])
    assert page.html.isascii()
    assert page.html.count("<script") == 2 and page.html.count("</script>") == 2
    assert "<img" not in page.html
    back = Report.read(page.write(tmp_path / "r.html"))
    stats = back.results[1]
    assert isinstance(stats, AttentionStats) and stats.tokens[0] == [*HOSTILE[:-1], LONE]
    assert "<script>" not in page._repr_html_() and 'sandbox="allow-scripts allow-downloads"' in page._repr_html_()


def test_page_allows_no_network():
    html = report(synthetic.head_effects(2)).html
    assert "default-src 'none'" in html and "unsafe" not in html.split("<style>")[0]
    assert "http:" not in html.replace("http://www.w3.org/2000/svg", "") and "https:" not in html


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ([], "nothing to report"),
        (["only prose"], "nothing to report"),
        ([Effects(pd.DataFrame({c: [] for c in COLUMNS}))], "result 1 is an empty Effects table"),
        ([{"ioi": all_nan()}], r"result 1 \(ioi\): every effect is NaN"),
        ([AttentionStats([], {"entropy": []})], "0 examples"),
        ([AttentionStats([], {})], "0 examples"),
        ([synthetic.head_effects(1), 3.0], "result 2 is a float"),
        ([synthetic.head_effects(1, model="gpt2"), synthetic.attention(1)], "gpt2 .*smollm2-135m-instruct"),
        ([Effects.concat([synthetic.head_effects(1, model="gpt2"), synthetic.head_effects(1)])], "gpt2 .*smollm2"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_a_reason(results: list, message: str):
    with pytest.raises(InterpError, match=message):
        report(*results)


def test_unwritable_path_leaves_nothing_behind(tmp_path: Path):
    page = report(synthetic.head_effects(1))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InterpError, match="cannot write"):
        page.write(tmp_path / "file" / "r.html")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InterpError, match="cannot write"):
        page.write(tmp_path / "taken")
    with pytest.raises(InterpError, match="cannot write"):
        page.write(tmp_path / "nul\0.html")
    assert sorted(os.listdir(tmp_path)) == ["file", "taken"]


def test_written_page_can_be_read_by_others(tmp_path: Path):
    path = report(synthetic.head_effects(1)).write(tmp_path / "r.html")
    plain = tmp_path / "plain"
    plain.write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda html: "<p>hello</p>", "no embedded results"),
        (lambda html: html.replace('"schema":1', '"schema":99'), "newer interp"),
        (lambda html: html.replace('{"format"', '{"format', 1), "damaged"),
        (lambda html: html.replace('"table":', '"tables":'), "damaged"),
        (lambda html: html.replace('"data":"eNr', '"data":"AAAA'), "damaged"),
        (lambda html: html.replace('"kind":"effects"', '"kind":"poem"'), "unknown kind 'poem'"),
    ],
)
def test_read_refuses_what_is_not_a_whole_report(tmp_path: Path, change, message: str):
    path = tmp_path / "r.html"
    path.write_text(change(report(synthetic.head_effects(1)).html))
    with pytest.raises(InterpError, match=message):
        Report.read(path)


def test_read_of_a_missing_file(tmp_path: Path):
    with pytest.raises(InterpError, match="does not exist"):
        Report.read(tmp_path / "none.html")
    with pytest.raises(InterpError, match="cannot be read"):
        Report.read(tmp_path)


def test_undefined_recovery_is_said_and_raw_is_shown():
    frame = synthetic.head_effects(4).frame()
    frame["clean"] = frame["corrupt"]
    frame["effect"] = np.nan
    (panel,) = embedded(report(Effects(frame)))["results"][0]["panels"]
    (variant,) = panel["variants"]
    assert variant["value"] == "raw" and "the raw change is shown" in variant["caution"]
    assert set(variant["cells"]["effect"]) == {None}
    frame.loc[frame["example"] > 0, "effect"] = 0.5
    (variant,) = embedded(report(Effects(frame)))["results"][0]["panels"][0]["variants"]
    assert variant["value"] == "effect" and "In 1 of 4 examples" in variant["caution"]


def test_recipe_and_unit_are_stated():
    stated = {"ablation": "activation set to 0", "metric_unit": "logits"}
    effects = Effects(synthetic.head_effects(4, mode="noise", intervention="ablate zero").frame(), stated)
    variant = embedded(report(effects))["results"][0]["panels"][0]["variants"][0]
    assert "0 = the clean run, 1 = the corrupt run" in variant["scale"]
    assert "ablate zero (activation set to 0)" in variant["scale"] and variant["unit"] == "logits"
    assert "4 examples" in variant["spread"] and "95% bootstrap" in variant["spread"]


def test_provenance_of_any_kind_is_kept():
    odd = {
        "path": Path("x"),
        "nan": float("nan"),
        "np": np.float32(0.5),
        "deep": {"a": [1, None, True]},
        "array": np.arange(2),
    }
    data = embedded(report(Effects(synthetic.head_effects(1).frame(), odd)))["results"][0]["provenance"]
    assert data == {"path": "x", "nan": "nan", "np": 0.5, "deep": {"a": [1, None, True]}, "array": [0, 1]}


@pytest.mark.parametrize(
    "array",
    [np.array([0.1, np.nan, -0.0, np.inf]), np.float32([[1e30, 1e-40]]), np.arange(-3, 70000), np.array([True, False]),
     np.float16([0.5, np.nan]), np.array([], dtype=np.int64), np.array([1e300])],
)  # fmt: skip
def test_pack_is_exact(array: np.ndarray):
    back = unpack(json.loads(json.dumps(pack(array))))
    assert back.dtype == array.dtype and back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" John", "·John"),
        ("\n", "⏎"),
        ("", "∅"),
        ("\0", "␀"),
        ("a\u202eb", "a⟨202E⟩b"),
        ("x" * 99, "x" * 23 + "…"),
        (pd.NA, ""),
        ("👩‍👧", "👩‍👧"),
    ],
)
def test_tokens_are_visible(token, shown: str):
    assert visible(token) == shown


def test_plots_needs_no_model():
    allowed = {
        "numpy",
        "pandas",
        "plotly",
        "interp.results",
        "interp.errors",
        "interp.sites",
        "interp.circuits",
        "interp.circuits.topology",
        "jaxtyping",
        "interp.utils.damage",
        "interp.utils.files",
        "interp.utils.json_text",
    }
    for path in (Path(__file__).parents[2] / "interp" / "plots").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        names |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
        for name in names - allowed:
            first, room = name.split(".")[0], ".".join(name.split(".")[:2])
            assert (
                room in allowed
                or first in allowed
                or first in sys.stdlib_module_names
                or name.startswith("interp.plots")
            ), (path, name)
