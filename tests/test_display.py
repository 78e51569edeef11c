"""Objects that show themselves in a notebook: small, escaped, and with the facts that matter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import interp
from interp.results.effects import Effects
from interp.sites import Site

sys.path.insert(0, str(Path(__file__).parent / "plots"))
import plots_synthetic as synthetic

EVIL = "<script>alert(1)</script>"


def effects() -> Effects:
    frame = synthetic.head_effects(2).frame()
    return Effects(frame.assign(metric=EVIL, intervention=EVIL))


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: Site("z", 9, 6), ["z.L9H6", "blocks.9.attn.hook_z", "all at once"]),
        (lambda: Site("mlp_post", 2, 130, "S2"), ["mlp_post.L2N130@S2", "neuron", "130"]),
        (lambda: interp.PromptPair(EVIL + "x" * 999, "b", " c"), ["PromptPair", "&lt;script&gt;", "…"]),
        (effects, ["Effects", "540", "&lt;script&gt;", "18"]),
        (lambda: Effects(effects().frame().iloc[:0]), ["Effects", "rows <b>0"]),
        (lambda: synthetic.attention(2), ["AttentionStats", "previous", "L11H1"]),
        (lambda: synthetic.patterns(1), ["AttentionPatterns", "clean, corrupt"]),
        (synthetic.circuit, ["Circuit", "80 of", "name mover"]),
    ],
)
def test_a_notebook_shows_what_matters(make, wanted: list[str]):
    html = make()._repr_html_()
    assert len(html) < 6000 and "<script" not in html and "style" not in html
    for text in wanted:
        assert text in html
    assert repr(make())


def test_a_model_shows_its_size(tiny):
    html = tiny("llama")._repr_html_()
    assert "Model" in html and "d_model" in html and len(html) < 1000


def test_statistics_of_no_prompts_show_themselves():
    from interp.results.attention_stats import AttentionStats

    assert repr(AttentionStats([], {})) == "AttentionStats(empty)" and "0" in AttentionStats([], {})._repr_html_()
