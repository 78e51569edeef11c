"""Bad input to recipes: one message that says what was wrong, before any cell is run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.engine import Engine
from interp.errors import InterpError, PromptError, SiteError
from interp.sites import Site


def words(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def test_bad_input_teaches(tiny, monkeypatch) -> None:
    model = tiny("llama")
    pair = interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w95", "w96")
    forwards = []
    monkeypatch.setattr(type(model), "last_logits", lambda self, t: forwards.append(t) or 1 / 0)
    for kind, words_, call in [
        (InterpError, "unknown mode", lambda: interp.patch(model, pair, model.sites("z"), mode="both")),
        (InterpError, "unknown engine", lambda: interp.patch(model, pair, model.sites("z"), engine="turbo")),
        (InterpError, "unknown metric", lambda: interp.patch(model, pair, model.sites("z"), metric="loss")),
        (InterpError, "must be an interp.Metric", lambda: interp.patch(model, pair, model.sites("z"), metric=3)),
        (InterpError, "unknown ablation", lambda: interp.ablate(model, pair, model.sites("z"), using="median")),
        (PromptError, "only one", lambda: interp.ablate(model, pair, model.sites("z"), using="resample")),
        (SiteError, "layers 0 to 2", lambda: interp.patch(model, pair, "z.L3H0")),
        (SiteError, "heads 0 to 3", lambda: interp.patch(model, pair, "z.L0H4")),
        (SiteError, "no sites", lambda: interp.patch(model, pair, [])),
        (PromptError, "outside a prompt of 4 tokens", lambda: interp.patch(model, pair, "resid_pre.L0@7")),
        (PromptError, "names the span 'S2'", lambda: interp.patch(model, pair, "resid_pre.L0@S2")),
        (PromptError, "no prompt pairs", lambda: interp.patch(model, [], model.sites("z"))),
        (PromptError, "needs a foil", lambda: interp.patch(model, interp.PromptPair("w1", "w2", "w3"), "z.L0H0")),
        (InterpError, "cannot trace", lambda: interp.trace(model, interp.Fact("w1", "w1", "w2"), "z")),
        (InterpError, "noise must be positive", lambda: interp.trace(model, interp.Fact("w1", "w1", "w2"), noise=0)),
    ]:
        with pytest.raises(kind, match=words_):
            call()
    assert not forwards


RECIPES = {
    "patch": lambda m, p, metric: interp.patch(m, p, m.sites("z"), metric),
    "ablate": lambda m, p, metric: interp.ablate(m, p, m.sites("z"), metric),
    "trace": lambda m, p, metric: interp.trace(m, p, metric=metric),
    "mediate": lambda m, p, metric: interp.mediate(m, p, m.sites("z"), metric),
    "path_patch": lambda m, p, metric: interp.path_patch(m, p, m.sites("z"), metric=metric),
    "knock_out": lambda m, p, metric: interp.knock_out(m, p, "name", metric=metric),
    "peek": lambda m, p, metric: interp.peek(m, p, context="keep", metric=metric),
    "steer": lambda m, p, metric: interp.steer(m, p, m.sites("attn_out"), torch.ones(m.d_model), metric=metric),
    "leave_out": lambda m, p, metric: interp.leave_out(m, p, metric=metric),
}


@pytest.fixture
def pair() -> interp.PromptPair:
    return interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w95", "w96").span("name", "w2 w3")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_metric_that_is_nan_is_refused_before_a_cell_is_run(tiny, pair, monkeypatch, recipe: str) -> None:
    model = tiny("llama")
    for name in ("score", "score_prompts"):
        monkeypatch.setattr(Engine, name, lambda *a, **k: pytest.fail("cells were run"))
    for value in (float("nan"), float("inf")):
        with pytest.raises(InterpError, match=r"'broken' returned NaN or infinity for .* before anything was changed"):
            RECIPES[recipe](model, pair, interp.Metric("broken", lambda x, r, v=value: x[:, 0] * v))


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_no_model_or_no_prompts_is_refused(tiny, recipe: str) -> None:
    for prompts in (3, None, "w1 w2", [3]):
        with pytest.raises(PromptError, match=r"expected, got|expected PromptPair objects, got"):
            RECIPES[recipe](tiny("llama"), prompts, "logit_diff")


def test_a_name_is_not_a_model(pair) -> None:
    with pytest.raises(InterpError, match=r"a model expected, e\.g\. interp\.load\('smollm2'\), got 'smollm2'"):
        interp.patch("smollm2", pair, "z.L0H0")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"trace"}))
def test_where_there_is_no_difference_it_is_said_and_raw_is_given(tiny, caplog, recipe: str) -> None:
    """Clean and corrupt score the same: there is no scale for recovery."""
    pairs = [interp.PromptPair("w1 w2 w3", text, "w95", "w96").span("name", "w2") for text in ("w1 w2 w3", "w1 w9 w3")]
    e = RECIPES[recipe](tiny("llama"), pairs, interp.logit_diff).frame()
    assert "the same on the clean and the corrupt prompt of 1 of" in caplog.text and "NaN" in caplog.text
    one = e[e["example"] == 0]
    assert one["effect"].isna().all() and np.isfinite(e["raw"]).all() and e["effect"].notna().any()
    if recipe in ("patch", "mediate", "path_patch"):
        assert (one["raw"] == 0).all()


def test_words_that_the_vocabulary_lacks_are_no_answers(tiny) -> None:
    """A word-level tokenizer reads all of them as one token, whose logit means nothing."""
    model = tiny("llama")
    with pytest.raises(PromptError, match="pair 0: answer 'zebra' is not in the model's vocabulary"):
        interp.patch(model, interp.PromptPair("w1 w2", "w1 w3", "zebra", "w96"), "z.L0H0")
    with pytest.raises(PromptError, match="pair 0: foil 'zebra' is not in"):
        interp.patch(model, interp.PromptPair("w1 w2", "w1 w3", "w96", "zebra"), "z.L0H0")
    with pytest.raises(PromptError, match="pair 0: answer must be text, with its leading space, got None"):
        interp.patch(model, interp.PromptPair("w1 w2", "w1 w3", None, "w96"), "z.L0H0")  # pyright: ignore[reportArgumentType]


def test_indices_may_come_from_other_libraries(tiny, pair) -> None:
    """Of numpy, pandas and torch too: the row says where it was, and only whole numbers are places."""
    model = tiny("llama")
    site = Site("z", np.int64(1), torch.tensor(2), np.int64(-1))  # pyright: ignore[reportArgumentType]
    assert site == Site("z", 1, 2, -1) and type(site.position) is int
    row = interp.patch(model, pair, [site]).frame().iloc[0]
    assert (row["layer"], row["head"], row["position"], row["token"]) == (1, 2, -1, "w3")
    assert model.sites("resid_pre", layers=np.arange(2), positions=np.arange(2)) == model.sites(
        "resid_pre", layers=[0, 1], positions=[0, 1]
    )
    for wrong in (1.0, True, "L1"):
        with pytest.raises(SiteError, match=r"whole number|layer"):
            model.sites("z", layers=[wrong])  # pyright: ignore[reportArgumentType]
    with pytest.raises(SiteError, match=r"position=1\.5: a whole number is expected"):
        Site("z", 0, 0, 1.5)  # pyright: ignore[reportArgumentType]


def test_summaries_say_what_they_cannot_do(tiny, pair) -> None:
    effects = interp.patch(tiny("llama"), pair, tiny("llama").sites("z"))
    assert len(effects.summary(by="layer")) == 3
    for options, words_ in (
        ({"by": ["lyr"]}, "no column 'lyr'"), ({"level": 95}, "level=95"), ({"n_boot": 0}, "n_boot=0"),
    ):  # fmt: skip
        with pytest.raises(InterpError, match=words_):
            effects.summary(**options)


def test_what_is_no_site_group_or_number_is_refused(tiny) -> None:
    model = tiny("llama")
    pair, fact = interp.PromptPair("w1 w2 w3", "w1 w9 w3", "w95", "w96"), interp.Fact("w1 w2 w3", "w2", "w95")
    for words_, call in (
        ("sites expected", lambda: interp.patch(model, pair, 5)),
        ("groups=", lambda: interp.patch(model, pair, groups=3)),
        ("samples a number", lambda: interp.trace(model, fact, samples=1.5)),
        ("window must be", lambda: interp.knock_out(model, pair, 1, window=True)),
        ("not finite", lambda: interp.steer(model, pair, "resid_pre.L0@1", torch.ones(model.d_model), float("nan"))),
        ("a site is expected", lambda: interp.patch(model, pair, [3])),
        ("samples a number", lambda: interp.trace(model, fact, samples=True)),
        ("noise must be positive", lambda: interp.trace(model, fact, noise=float("inf"))),
        ("a number of bytes", lambda: interp.patch(model, pair, "z.L0H0", memory=float("inf"))),
        ("seed='x'", lambda: interp.ablate(model, pair, "z.L0H0", using="resample", seed="x")),
        ("a tensor and a number", lambda: interp.steer(model, pair, "resid_pre.L0@1", "up")),
        ("real numbers", lambda: interp.steer(model, pair, "resid_pre.L0@1", torch.ones(32, dtype=torch.complex64))),
        ("a list of at least one", lambda: interp.mean_difference(model, "w1 w2", ["w3"], "resid_post.L1")),
        (
            "the range of its characters",
            lambda: interp.leave_out(model, interp.PromptPair("w1 w2", "w1 w3", "w95", "w96", {"x": (0, None)})),
        ),
    ):
        with pytest.raises(InterpError, match=words_):
            call()
