"""Every object shows itself in a few lines: no repr holds a plan's cells, a model or whole arrays."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import circuits
from interp.circuits.evaluation.faithfulness import Faithfulness

LONGEST = 1800  # characters of a repr
LONGEST_HTML = 6000


def small_results() -> list[Any]:
    """One result of every kind that a small known model gives."""
    known = interp.zoo.induction()
    model, pairs = known.model, known.pairs(4)
    sites = model.sites("z")
    effects = interp.patch(model, pairs, sites)
    scores = circuits.attribute_edges(model, pairs)
    circuit = scores.top(20)
    masked = circuits.differential_masks(model, pairs, k=2, steps=2)
    return [
        known, model, pairs, model.coder, effects, scores, circuit, masked, scores.graph,
        interp.explain(interp.patch, model, pairs, sites), model.attention_stats(pairs),
        model.attention_patterns(pairs, exact=["L1H0"]), circuits.faithfulness(model, pairs, circuit, n_random=3),
        circuits.mib(model, pairs, scores), circuits.causal_head_gating(model, pairs, steps=2, n_seeds=1),
        circuits.prune_edges(model, pairs, steps=2), circuits.attention_channels(model, pairs),
        circuits.WeightCircuits(model), circuits.screen(model, pairs, sites), interp.report(effects, circuit),
        interp.tasks.TASKS,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def live() -> tuple[list[Any], list[Any]]:
    """The results, and every object that exists since they do."""
    before = {id(thing) for thing in gc.get_objects()}
    results = small_results()
    return results, [thing for thing in gc.get_objects() if id(thing) not in before]


def test_every_live_object_has_a_short_repr(live: tuple[list[Any], list[Any]]) -> None:
    """Walk every object of interp and headstats, whoever holds it."""
    too_long, seen = {}, set()
    for thing in live[1]:
        kind = type(thing)
        if str(kind.__module__).partition(".")[0] not in ("interp", "headstats") or isinstance(thing, torch.nn.Module):
            continue
        seen.add(kind.__name__)
        html = "" if kind.__name__ == "Report" or not hasattr(kind, "_repr_html_") else thing._repr_html_()  # a page
        if len(repr(thing)) > LONGEST or len(html) > LONGEST_HTML:
            too_long[kind.__name__] = (len(repr(thing)), len(html))
    assert not too_long
    assert {"Plan", "Coder", "TextEncoder", "PatternExample", "PatternRun", "Faithfulness", "MIB", "Curve"} <= seen


def test_a_plan_and_a_measure_say_what_they_are(live: tuple[list[Any], list[Any]]) -> None:
    by_type = {type(r).__name__: r for r in live[0]}
    plan, measure, mib = by_type["Plan"], by_type["Faithfulness"], by_type["MIB"]
    assert repr(plan).startswith(f"Plan({plan.n_cells} cells on 8 base run(s), packed") and "FLOP" in plan._repr_html_()
    for text in ("of 5 edges", "logit_diff", "corrupt run", "4 prompt(s)", "of 3 (paths)"):
        assert text in repr(measure), repr(measure)
    assert "corrupt run" in repr(mib) and "corrupt run" in repr(mib.signed) and "4 prompt(s)" in repr(mib)
    alone = Faithfulness(0.5, np.nan, np.nan, *[np.ones(1)] * 3, np.array([]), {})
    assert "nan" not in repr(alone)
