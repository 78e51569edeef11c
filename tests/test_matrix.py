"""The architecture matrix, the negative controls that show it can fail, and the documentation's copy of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from interp.doctor.families.text import FAMILIES
from interp.doctor.matrix import (
    ALLOWED,
    CHECKS,
    FamilyCase,
    Verdict,
    architectures,
    difference,
    examine_family,
    header,
    run_check,
)
from interp.errors import InterpError
from interp.model.attention_call import AttentionCall
from interp.model.instrument import Instrument

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
case = lru_cache(maxsize=2)(FamilyCase)  # one family's models serve all its checks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_matrix_and_its_row_in_the_documentation(family: str) -> None:
    row = examine_family(family, case(family))
    failed = [f"{v.check}: {v.gap:.1e} {v.note}" for v in row.verdicts if not v.passed]
    assert not failed, f"{family}: {failed}"
    assert row.markdown() in PAGE.splitlines(), "write it anew: interp doctor --architectures --markdown"


def test_the_page_shows_every_family_and_check_and_no_other() -> None:
    lines = PAGE.splitlines()
    start = lines.index(header()[0])
    assert lines[start + 1] == header()[1]
    shown = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        shown.append(line.split("|")[1].strip())
    assert shown == list(FAMILIES)


# ------------------------------------------------------------------ negative controls

Change = Callable[[AttentionCall], AttentionCall]
# what to break -> (how, the check that must see it)
SABOTAGE: dict[str, tuple[Change, str]] = {
    "scale": (lambda c: replace(c, scale=c.scale * 1.05), "logits"),
    "causality": (lambda c: replace(c, causal=False, bias=None, window=None), "logits"),
    "both directions": (lambda c: replace(c, causal=True, bias=None, window=None), "logits"),
    "window": (lambda c: replace(c, window=c.window and c.window + 1), "logits"),
    "softcap": (lambda c: replace(c, softcap=c.softcap and c.softcap * 1.5), "logits"),
    "sinks": (lambda c: replace(c, sinks=None), "logits"),
    "bias": (lambda c: replace(c, bias=None), "logits"),
    "grouped": (lambda c: replace(c, k=c.k.flip(1)), "logits"),
    "padding": (lambda c: replace(c, key_padding=None, bias=None), "left padding"),
}
ALWAYS = ("scale", "padding")
CONTROLS = [(f, what) for f in FAMILIES for what in SABOTAGE]


@pytest.mark.parametrize(("family", "what"), CONTROLS)
def test_the_matrix_fails_when_attention_is_broken(family: str, what: str, monkeypatch) -> None:
    models = case(family)
    kv_heads = {c.k.shape[1] for c in models.calls()}
    there = {*ALWAYS, *models.features()}
    if "both directions" not in there:
        there.add("causality")
    change, check = SABOTAGE[what]
    if what not in there or (what == "grouped" and kv_heads == {1}) or not run_check(models, check).applies:
        return  # nothing to break here
    if (family, what) == ("paligemma", "bias"):
        return  # its bias is its mask, which hides nothing from a prompt without padding
    assert run_check(models, check).passed and models.ours32  # built before the sabotage, which loading would refuse
    real = Instrument.__call__
    monkeypatch.setattr(Instrument, "__call__", lambda self, call, bridge: real(self, change(call), bridge))
    broken = run_check(models, check)
    assert not broken.passed and 10 * ALLOWED < broken.gap < float("inf"), broken


@pytest.mark.parametrize(
    ("check", "change"),
    [
        ("cache", lambda c: replace(c, k=c.k.roll(1, 2)) if c.q.shape[2] == 1 else c),
        ("packed", lambda c: replace(c, bias=None, causal=True)),
        ("right padding", lambda c: replace(c, v=c.v * (1 + 0.01 * (c.key_padding is not None)))),
        ("generate", lambda c: replace(c, key_padding=None)),
        ("hooks", lambda c: replace(c, scale=c.scale * 1.05)),
        ("edits", lambda c: replace(c, scale=c.scale * 1.05)),
        ("gradients", lambda c: replace(c, k=c.k.detach())),
    ],
)
def test_every_other_check_can_fail_too(check: str, change: Change, monkeypatch) -> None:
    models = case("llama")
    assert run_check(models, check).passed
    real = Instrument.__call__
    monkeypatch.setattr(Instrument, "__call__", lambda self, call, bridge: real(self, change(call), bridge))
    assert not run_check(models, check).passed


def test_statistics_and_call_counts_can_fail(monkeypatch) -> None:
    import headstats

    models = case("llama")
    real = headstats.attend

    def wrong(*args, **kwargs):
        done = real(*args, **kwargs)
        if kwargs["backend"] != "reference" and done.stats.entropy is not None:
            done.stats.entropy = done.stats.entropy * 1.01
        return done

    monkeypatch.setattr(headstats, "attend", wrong)
    assert not run_check(models, "statistics").passed
    monkeypatch.undo()
    call = Instrument.__call__
    monkeypatch.setattr(Instrument, "__call__", lambda self, c, b: (call(self, c, b), call(self, c, b))[1])
    verdict = run_check(models, "calls")
    assert not verdict.passed and "2 times in one forward" in verdict.note


# ------------------------------------------------------------------ the table itself


def test_differences_never_hide_nan_or_shape() -> None:
    one = torch.ones(2, 3)
    assert difference(one, one) == 0 and difference(one * 1.5, one) == 0.5
    assert difference(one * float("nan"), one) == difference(one[:1], one) == float("inf")


def test_the_table_prints_itself_and_refuses_unknown_families() -> None:
    heard: list[str] = []
    table = architectures(["llama"], say=heard.append)
    assert table.passed and heard == ["llama: ok"] and "largest difference" in str(table)
    frame = table.frame()
    assert list(frame["check"]) == list(CHECKS) and frame["passed"].all()
    assert str(Verdict("x", 1.0)) == "✗" and str(Verdict("x", applies=False)) == "–" and str(Verdict("x")) == "✓"
    with pytest.raises(InterpError, match="unknown family 'lamma'"):
        architectures(["lamma"])
