"""Plotly figures: the numbers they carry, their labels, and what they refuse."""

from __future__ import annotations

import numpy as np
import plotly.io as pio
import plots_synthetic as synthetic
import pytest

from interp.errors import InterpError
from interp.plots import (
    attention_map,
    bars,
    exact_against_estimated,
    faithfulness,
    heads,
    heatmap,
    layer_curve,
    report,
)
from interp.results.effects import Effects


def test_heatmap_carries_the_summary_symmetric_around_zero():
    effects = synthetic.head_effects(8)
    (trace,) = heatmap(effects).data
    summary = effects.summary().set_index(["layer", "head"]).sort_index()
    np.testing.assert_array_equal(np.ravel(trace.z), summary["effect"])
    assert trace.zmin == -trace.zmax and trace.zmax == summary["effect"].abs().max()
    assert "L18H6" in trace.customdata[18][6] and "n = 8" in trace.customdata[18][6]


def test_neurons_are_not_called_heads():
    figure = heatmap(synthetic.neuron_effects())
    assert figure.layout.xaxis.title.text == "neuron" and "L3N0" in figure.data[0].customdata[0][0]


def test_red_is_positive():
    (trace,) = heatmap(synthetic.head_effects(4)).data
    first, last = (
        tuple(int(c[1][i : i + 2], 16) for i in (1, 3, 5)) for c in (trace.colorscale[0], trace.colorscale[-1])
    )
    assert first[2] > first[0] and last[0] > last[2]


@pytest.mark.parametrize("value", ["raw", "pooled"])
def test_heatmap_of_other_values(value: str):
    effects = synthetic.head_effects(4)
    (trace,) = heatmap(effects, value=value).data
    np.testing.assert_array_equal(np.ravel(trace.z), effects.summary().sort_values(["layer", "head"])[value])


def test_position_axis_shows_roles_for_means_and_tokens_for_an_example():
    effects = synthetic.position_effects(4, reordered=True)
    assert heatmap(effects).layout.xaxis.ticktext == ("IO", "S1", "S2", "end", "other tokens")
    one = heatmap(effects, example=1)
    assert one.layout.xaxis.ticktext[:3] == ("&lt;|begin|&gt;", "When", "·Paul")
    frame = effects.frame().query("example == 1 and layer == 2").sort_values("position")
    np.testing.assert_array_equal(one.data[0].z[2], frame["effect"])
    assert len(heatmap(effects, by="position").layout.xaxis.ticktext) == 15


def test_bars_are_the_strongest_with_intervals():
    effects = synthetic.head_effects(8)
    figure = bars(effects, top=5)
    (trace,) = figure.data
    top = effects.summary().head(5)[::-1]
    np.testing.assert_array_equal(trace.x, top["effect"])
    np.testing.assert_allclose(trace.error_x.array, top["hi"] - top["effect"])
    assert figure.layout.yaxis.ticktext[-1] == "L18H6"


def test_heads_map():
    stats = synthetic.attention(3)
    (trace,) = heads(stats, "previous").data
    np.testing.assert_array_equal(trace.z, stats.per_head("previous"))
    with pytest.raises(InterpError, match="not collected"):
        heads(stats, "nonsense")


def test_token_text_is_not_markup():
    frame = synthetic.position_effects(1).frame()
    frame["token"] = "<a href='javascript:alert(1)'>x</a>"
    figure = heatmap(Effects(frame), title="<b>t</b>")
    assert "<a" not in str(figure.layout.xaxis.ticktext) and "<b>" not in figure.layout.title.text


def test_global_theme_is_left_alone():
    before = pio.templates.default
    heatmap(synthetic.head_effects(2))
    assert pio.templates.default == before


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: heatmap(e, value="p"), "value must be one of"),
        (lambda e: heatmap(e, by="head"), "by must be"),
        (lambda e: heatmap(e, layer=99), "no effects are left"),
        (lambda e: heatmap(e, example=7), "no example 7"),
        (lambda e: bars(e, 0), "at least 1"),
        (lambda e: heatmap(Effects.concat([e, synthetic.head_effects(2, mode="noise")])), "pass mode='denoise'"),
        (lambda e: heatmap(Effects(e.frame().assign(effect=np.nan, clean=0.0, corrupt=0.0))), "pass value='raw'"),
    ],
)
def test_figures_refuse_with_a_reason(call, message: str):
    with pytest.raises(InterpError, match=message):
        call(synthetic.head_effects(2))


def test_every_part_of_a_report_has_a_plotly_figure():
    before = pio.templates.default
    figures = report(*synthetic.study()).to_plotly()
    names = " | ".join(figures)
    for part in ("Patching heads", "Attention", "Patterns", "Where", "Paths", "Mediation", "curve"):
        assert part in names
    summary = synthetic.head_effects(8).summary().set_index(["layer", "head"]).sort_index()
    np.testing.assert_array_equal(
        np.ravel(figures["Patching heads: z, patch, denoising, logit_diff"].data[0].z), summary["effect"]
    )
    assert pio.templates.default == before


def test_maps_curves_and_comparisons_carry_their_numbers():
    patterns = synthetic.patterns(1, layers=2, heads=2)
    (trace,) = attention_map(patterns, (1, 0), run="corrupt").data
    np.testing.assert_array_equal(trace.customdata, patterns.map((1, 0), run="corrupt"))
    curve = synthetic.curve()
    line = faithfulness(curve).data[-1]
    np.testing.assert_array_equal(line.y, curve.frame()["faithfulness"])
    effects = synthetic.head_effects(4)
    points = exact_against_estimated(effects, effects).data[-1]
    assert len(points.x) == 270 and tuple(points.x) == tuple(points.y)
    layers = layer_curve(effects).data[0]
    np.testing.assert_allclose(layers.y, effects.summary(by=["layer"]).sort_values("layer")["effect"])
    with pytest.raises(InterpError, match="no site in common"):
        exact_against_estimated(effects, synthetic.position_effects(2))
    with pytest.raises(InterpError, match="no run 'corrupted'"):
        attention_map(patterns, (0, 0), run="corrupted")
    for name in ("L1H0", "z.L1H0", [1, 0], np.array([1, 0]).tolist()):
        np.testing.assert_array_equal(attention_map(patterns, name, run="corrupt").data[0].customdata, trace.customdata)
    for name, words in (("L9H9", "^L9H9 was not collected"), ("LLH1", "'LLH1' names no head"), (3, "3 names no head")):
        with pytest.raises(InterpError, match=words):
            attention_map(patterns, name)
