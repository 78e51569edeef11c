"""Every recipe of the registry in a sweep gives what its function gives, part by part."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import interp
from interp.errors import InterpError
from interp.recipes.registry import RECIPES
from interp.sweep.config import parse

UP, DOWN = ["w1 w2", "w3 w2 w4 w5 w6 w7"], ["w9 w8"]
WORDS = ("w2", "w5", "w7", "w8")
PAIRS = [
    interp.PromptPair(f"w1 {a} w3 w4", f"w1 {b} w3 w4", "w95", "w96").span("name", a)
    for a, b in zip(WORDS, (*WORDS[1:], "w9"), strict=True)
]
# by recipe: the table of the config, and the same as a call
CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "patch": ({"mode": "noise", "window": 1}, lambda m, s: interp.patch(m, PAIRS, s, mode="noise")),
    "ablate": ({"using": "mean"}, lambda m, s: interp.ablate(m, PAIRS, s, using="mean")),
    "trace": ({"metric": "logit_diff"}, lambda m, s: interp.trace(m, PAIRS, metric="logit_diff")),
    "mediate": ({}, lambda m, s: interp.mediate(m, PAIRS, s)),
    "path_patch": (
        {"using": "mean", "receivers": "logits,q"},
        lambda m, s: interp.path_patch(m, PAIRS, m.sites("z"), ["logits", *m.sites("q")], using="mean"),
    ),
    "knock_out": ({"keys": "name", "window": 1}, lambda m, s: interp.knock_out(m, PAIRS, "name", window=1)),
    "edit": (
        {"edit": {"cut": "knockout queries=-1 keys=name", "even": ["counterfactual=uniform layers=1"],
                  "blind": "close=*>name layers=0-1",
                  "both": ["site=z.L1H2 tokens=name set=0.5", "weights=name=0.75,0=0.25 queries=-1"]}},
        lambda m, s: interp.edit(
            m, PAIRS, {
                "cut": interp.AttentionEdit(queries=-1, keys="name", knockout=True),
                "even": interp.AttentionEdit(layers=1, counterfactual="uniform"),
                "blind": interp.AttentionMask(close=[(None, "name")], layers=range(2)),
                "both": [interp.Write("z.L1H2", "name", set=0.5),
                         interp.AttentionEdit(queries=-1, weights={"name": 0.75, 0: 0.25})],
            },
        ),
    ),
    "peek": ({"full": 1, "context": "keep"}, lambda m, s: interp.peek(m, PAIRS, full=1, context="keep")),
    "steer": (
        {"positive": UP, "negative": DOWN, "at": "resid_pre.L1", "scale": 2},
        lambda m, s: interp.steer(
            m, PAIRS, s, interp.mean_difference(m, UP, DOWN, "resid_pre.L1"), scale=2.0
        ),
    ),
    "leave_out": (
        {"spans": ["name"], "instead": {"name": "w40"}},
        lambda m, s: interp.leave_out(m, PAIRS, "name", instead={"name": "w40"}),
    ),
}  # fmt: skip


def config_of(recipe: str, pairs: Any, **options: Any) -> dict[str, Any]:
    table = {"recipe": recipe, **CASES[recipe][0], **options}
    document = {
        "name": recipe, "examples_per_part": 2, "models": [{"name": "tiny", "load": "tiny"}],
        "tasks": [{"name": "own", "pairs": str(pairs), "require": 0}], "recipes": [table],
    }  # fmt: skip
    if RECIPES[recipe].sites is not None:
        document["sites"] = [{"sites": "resid_pre@all,mlp_out@-1"}]
    return document


@pytest.fixture
def pairs(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [
        {"clean": p.clean, "corrupt": p.corrupt, "answer": p.answer, "foil": p.foil, "spans": {"name": WORDS[i]}}
        for i, p in enumerate(PAIRS)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_sweep_gives_what_the_function_gives(tiny, pairs, tmp_path, recipe: str) -> None:
    model = tiny("llama")
    sweep = interp.Sweep(config_of(recipe, pairs), tmp_path / "run", models={"tiny": model})
    assert sweep.run().failed == 0
    sites = [*model.sites("resid_pre", positions="all"), *model.sites("mlp_out", positions=-1)]
    wanted = CASES[recipe][1](model, sites).frame()
    (effects,) = sweep.effects().values()
    got = effects.frame()
    assert set(got["metric"]) == {"logit_diff" if recipe != "knock_out" and recipe != "leave_out" else "logprob"}
    keys = ["example", "component", "layer", "head", "position", "sender", "role", "intervention"]
    got, wanted = (f.sort_values(keys, kind="stable").reset_index(drop=True) for f in (got, wanted))
    assert len(got) == len(wanted)
    for column in ("clean", "corrupt", "patched"):
        # parts hold other examples together than one call does: float32 products in another order
        np.testing.assert_allclose(got[column], wanted[column], rtol=1e-4, atol=1e-5, err_msg=column)


def test_a_plan_takes_what_a_run_does_where_donors_come_from_other_parts(tiny, pairs, tmp_path) -> None:
    document = {**config_of("ablate", pairs, using="resample"), "examples_per_part": 1}
    sweep = interp.Sweep(document, tmp_path / "run", models={"tiny": tiny("llama")})
    (planned,) = sweep.plan().rows
    assert (planned.trouble, planned.parts) == (None, len(PAIRS))
    result = sweep.run()
    assert (result.present, result.failed) == (len(PAIRS), 0)
    (effects,) = sweep.effects().values()
    assert planned.cells == len(effects.frame())


def test_steering_needs_its_texts_and_single_sites(pairs) -> None:
    with pytest.raises(InterpError, match=r"recipes\[0\] lacks the key 'negative'"):
        document = config_of("steer", pairs)
        del document["recipes"][0]["negative"]
        parse(document, folder=pairs.parent)
    with pytest.raises(InterpError, match="steer takes no groups of sites, and 'movers' has some"):
        document = config_of("steer", pairs)
        document["sites"] = [{"name": "movers", "groups": {"a": "resid_pre.L0"}}]
        parse(document, folder=pairs.parent)


def test_digits_written_as_text_are_the_name_of_a_span(tiny, tmp_path) -> None:
    """As in Python: keys = 1 is token 1, keys = "1" a span of that name, whatever characters it has."""
    model = tiny("llama")
    for span in ("1", "²", "--1"):
        pair = interp.PromptPair("w1 w2 w3 w4", "w1 w9 w3 w4", "w95", "w96").span(span, "w3")
        (tmp_path / "p.jsonl").write_text(json.dumps(
            {"clean": pair.clean, "corrupt": pair.corrupt, "answer": "w95", "foil": "w96", "spans": {span: "w3"}}
        ))  # fmt: skip
        document = {**config_of("knock_out", tmp_path / "p.jsonl", keys=span), "name": f"span{ord(span[0])}"}
        sweep = interp.Sweep(document, tmp_path / f"run{ord(span[0])}", models={"tiny": model})
        assert sweep.run().failed == 0
        (effects,) = sweep.effects().values()
        wanted = interp.knock_out(model, pair, span, window=1).frame()
        np.testing.assert_allclose(effects.frame()["patched"], wanted["patched"], rtol=1e-5)


def test_texts_may_repeat(pairs) -> None:
    document = config_of("steer", pairs, positive=[*UP, UP[0]])
    assert parse(document, folder=pairs.parent).recipes[0].options["positive"] == [*UP, UP[0]]


def test_pairs_with_almost_no_gap_are_told_where_a_sweep_is_read(tiny, pairs, tmp_path, monkeypatch, caplog) -> None:
    sweep = interp.Sweep(config_of("patch", pairs), tmp_path / "run", models={"tiny": tiny("llama")})
    sweep.run()
    monkeypatch.setattr("interp.results.gaps.SMALL", 0.0)
    sweep.effects()
    assert "almost no difference" not in caplog.text
    monkeypatch.setattr("interp.results.gaps.SMALL", 0.99)  # then some gap is below that share of the mean gap
    (effects,) = sweep.effects().values()
    gaps = effects.frame().drop_duplicates("example").eval("abs(clean - corrupt)")
    expected = int((gaps < 0.99 * gaps.mean()).sum())
    assert 0 < expected < len(PAIRS) and f"{expected} of {len(PAIRS)} pairs have almost no difference" in caplog.text
