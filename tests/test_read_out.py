"""Metrics read at any position, against hooks on an untouched Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, PromptError

PAIRS = [
    interp.PromptPair(f"w{a} w5 w{b} w6 w7 w2", "w8 w5 w9 w6 w7 w2", "w95", "w96", {"start": (0, 5)})
    for a, b in ((1, 3), (2, 4))
]  # tokens: <bos> and six words; "start" is tokens 1 and 2
N = 7
QUIET: dict[str, Any] = {"show_progress": False}
ENGINES = ("auto", "naive")


def blocks_of(hf: Any) -> Any:
    return next(m for m in hf.modules() if isinstance(m, torch.nn.ModuleList))


@contextmanager
def output_changed(module: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change a module's output [1, position, width] in every forward."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        changed = change(first.clone())
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def logits_of(hf: Any, ids: Any) -> Tensor:
    with torch.no_grad():
        return hf(input_ids=torch.tensor([list(ids)])).logits[0]


def token(model: interp.Model, text: str) -> int:
    return model.coder.continuation(text)[0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_steering_is_read_at_every_position(word_tokenizer, family: str, engine: Any) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    direction = torch.linspace(-9, 9, model.d_model)
    sites = [interp.Site("resid_post", layer, position=3) for layer in range(model.n_layers)]
    effects = interp.steer(model, PAIRS[0], sites, direction, metric="logprob", at="each", engine=engine, **QUIET)
    frame, ids = effects.frame(), model.coder.encode(PAIRS[0].clean)
    assert frame["read_at"].tolist() == [str(i) for i in range(N)] * model.n_layers
    answer = token(model, "w95")
    for layer in range(model.n_layers):

        def add(x: Tensor) -> Tensor:
            x[:, 3] += direction.to(x)
            return x

        with output_changed(blocks_of(hf)[layer], add):
            expected = logits_of(hf, ids).log_softmax(-1)[:, answer].numpy()
        part: Any = frame[frame["layer"] == layer]
        np.testing.assert_allclose(part["patched"], expected, atol=1e-5)
        np.testing.assert_allclose(part["clean"], logits_of(hf, ids).log_softmax(-1)[:, answer].numpy(), atol=1e-5)
        changed = part["raw"].abs().to_numpy() > 1e-6
        last = layer == model.n_layers - 1
        assert changed[:3].sum() == 0 and changed[3] and changed[4:].any() == (not last)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_patches_are_read_at_a_span_and_as_its_mean(word_tokenizer, family: str, engine: Any) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    sites = model.sites("resid_post", positions="each")
    runs: dict[str, pd.DataFrame] = {
        at: interp.patch(model, PAIRS, sites, metric="logit_diff", at=at, engine=engine, **QUIET).frame()
        for at in ("start", "start:mean", "start:last")
    }
    answer, foil = token(model, "w95"), token(model, "w96")
    for example, pair in enumerate(PAIRS):
        clean, corrupt = (model.coder.encode(text) for text in (pair.clean, pair.corrupt))
        for layer, block in enumerate(blocks_of(hf)):
            states: list[Tensor] = []
            with output_changed(block, lambda x, states=states: states.append(x.clone()) or x):
                logits_of(hf, clean)
            for position in range(N):

                def put(x: Tensor, position: int = position, states: list[Tensor] = states) -> Tensor:
                    x[:, position] = states[0][:, position]
                    return x

                with output_changed(block, put):
                    logits = logits_of(hf, corrupt)
                expected = (logits[:, answer] - logits[:, foil])[1:3].numpy()
                of_site = {
                    at: f[(f["example"] == example) & (f["layer"] == layer) & (f["position"] == position)]
                    for at, f in runs.items()
                }
                assert of_site["start"]["read_at"].tolist() == ["start[0]", "start[1]"]
                np.testing.assert_allclose(of_site["start"]["patched"], expected, atol=1e-5)
                np.testing.assert_allclose(of_site["start:mean"]["patched"], expected.mean(), atol=1e-5)
                np.testing.assert_allclose(of_site["start:last"]["patched"], expected[1], atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_late_changes_stay_in_their_rows(word_tokenizer, family: str, engine: Any) -> None:
    """Zero ablation of MLPs: in the last block only the ablated rows are computed, others are the base run's."""
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    sites = model.sites("mlp_out", positions="each")
    call: dict[str, Any] = {"metric": "token_kl", "using": "zero", "engine": engine, **QUIET}
    frame = interp.ablate(model, PAIRS[0], sites, at="each", **call).frame()
    ids = model.coder.encode(PAIRS[0].clean)
    before = logits_of(hf, ids).log_softmax(-1)
    for layer, block in enumerate(blocks_of(hf)):
        for position in range(N):

            def silence(x: Tensor, position: int = position) -> Tensor:
                x[:, position] = 0
                return x

            with output_changed(block.mlp, silence):
                after = logits_of(hf, ids).log_softmax(-1)
            expected = (before.exp() * (before - after)).sum(-1).numpy()
            part: Any = frame[(frame["layer"] == layer) & (frame["position"] == position)]
            np.testing.assert_allclose(part["patched"], expected, atol=1e-5)
            if engine == "auto":
                reached = range(position, position + 1 if layer == model.n_layers - 1 else N)
                out_of_reach = [i for i in range(N) if i not in reached]
                assert (part["patched"].to_numpy()[out_of_reach] == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_seq_logprob_is_a_sum_over_the_prompts_own_tokens(tiny, engine: Any) -> None:
    model, hf = tiny("llama"), tiny_hf("llama")
    ids = model.coder.encode(PAIRS[0].clean)
    logprobs = logits_of(hf, ids)[:-1].log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]
    expected = {"all": logprobs.sum(), "start": logprobs[:2].sum(), "start:last": logprobs[1], "last": logprobs[-1],
                2: logprobs[1]}  # fmt: skip
    for at, value in expected.items():
        effects = interp.ablate(
            model, PAIRS[0], "mlp_out.L1", metric="seq_logprob", using="zero", at=at, engine=engine, **QUIET
        )
        np.testing.assert_allclose(effects.frame()["clean"], float(value), atol=1e-5)
        assert set(effects.frame()["read_at"].fillna("last")) == {str(at)}


def test_custom_metrics_get_all_positions_at_once(tiny) -> None:
    model = tiny("gpt2")

    def entropy(logits: Tensor, read: Any) -> Tensor:
        assert logits.shape[1] == 2 and read.tokens.shape == logits.shape[:2]
        assert read.clean_logits.shape == read.run_logits.shape == logits.shape
        logprobs = logits.log_softmax(-1)
        return -(logprobs.exp() * logprobs).sum(-1).mean(-1)

    metric = interp.Metric("entropy", entropy, over="positions")
    frames = [
        interp.patch(model, PAIRS, model.sites("z"), metric, at="start", engine=engine, **QUIET).frame()
        for engine in ENGINES
    ]
    np.testing.assert_allclose(frames[0]["patched"], frames[1]["patched"], atol=1e-6)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_token_kl_compares_with_the_run_that_is_changed(tiny, mode: Any) -> None:
    model, hf = tiny("llama"), tiny_hf("llama")
    frame = interp.patch(model, PAIRS[0], "resid_pre.L0@1", metric="token_kl", mode=mode, at="each", **QUIET).frame()
    clean, corrupt = (logits_of(hf, model.coder.encode(t)).log_softmax(-1) for t in (PAIRS[0].clean, PAIRS[0].corrupt))
    base, other = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    expected = (base.exp() * (base - other)).sum(-1).numpy()
    np.testing.assert_allclose(frame["clean" if mode == "denoise" else "corrupt"], expected, atol=1e-6)
    assert set(frame["corrupt" if mode == "denoise" else "clean"]) == {0.0}


RECIPES: dict[str, Callable[..., interp.Effects]] = {
    "patch": lambda model, **k: interp.patch(model, PAIRS, model.sites("z"), "logit_diff", **k),
    "window": lambda model, **k: interp.patch(model, PAIRS, model.sites("resid_pre"), "prob", window=2, **k),
    "resample": lambda model, **k: interp.ablate(model, PAIRS, model.sites("z"), "logprob", "resample", **k),
    "mediate": lambda model, **k: interp.mediate(model, PAIRS, model.sites("attn_out"), "kl", **k),
    "path": lambda model, **k: interp.path_patch(model, PAIRS, model.sites("z"), metric="logit_diff", **k),
    "knock_out": lambda model, **k: interp.knock_out(model, PAIRS, "start", None, window=1, metric="rank", **k),
    "edit": lambda model, **k: interp.edit(
        model, PAIRS, interp.AttentionEdit(keys="start", knockout=True), "logit_diff", "denoise", each="head", **k
    ),
    "trace": lambda model, **k: interp.trace(
        model, [interp.Fact("w3 w4 w5 w6", "w4", "w9")], "mlp_out", window=2, samples=2, sigma=1.0, **k
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_packed_equals_naive_at_every_position(tiny, name: str) -> None:
    model, recipe = tiny("llama"), RECIPES[name]
    packed, naive = (recipe(model, at="each", engine=e, **QUIET).frame() for e in ("fast", "naive"))
    np.testing.assert_allclose(packed["patched"], naive["patched"], atol=1e-6)
    assert packed["read_at"].tolist() == naive["read_at"].tolist()
    last: Any = recipe(model, **QUIET).frame()
    assert last["read_at"].isna().all()
    n = 5 if name == "trace" else N
    np.testing.assert_allclose(packed[packed["read_at"] == str(n - 1)]["patched"], last["patched"], atol=1e-6)
    of_three = recipe(model, at=[3, "last"], **QUIET).frame()
    np.testing.assert_allclose(
        of_three[of_three["read_at"] == "3"]["patched"], packed[packed["read_at"] == "3"]["patched"], atol=1e-6
    )


def test_summaries_and_joined_tables_keep_read_outs_apart(tiny, tmp_path) -> None:
    model = tiny("gpt2")
    each = interp.patch(model, PAIRS, "attn_out.L1", at="start", **QUIET)
    last = interp.patch(model, PAIRS, "attn_out.L1", **QUIET)
    assert sorted(each.summary()["read_at"]) == ["start[0]", "start[1]"]
    assert "read_at" in each.summary(by="layer") and len(each.summary(by="layer")) == 2
    assert "read_at" not in last.summary() and len(interp.Effects.concat([each, last]).summary()) == 3
    each.write(tmp_path / "e.parquet")
    assert interp.Effects.read(tmp_path / "e.parquet").frame().equals(each.frame())
    old = last.frame().drop(columns="read_at")
    assert interp.Effects(old).frame().equals(last.frame())
    page = interp.report(each).html
    assert "start[1]" in page


def test_positions_of_unequal_prompts_count_from_the_last_token(tiny) -> None:
    model = tiny("gpt2")
    longer = interp.PromptPair("w1 w5 w3 w6 w7 w2 w4", "w8 w5 w9 w6 w7 w2 w4", "w95", "w96")
    frame = interp.patch(model, [PAIRS[0], longer], "attn_out.L1", at="each", **QUIET).frame()
    assert frame["read_at"].tolist() == [str(i) for i in range(-N, 0)] + [str(i) for i in range(-N - 1, 0)]


def test_explain_counts_the_rows_that_are_read(tiny) -> None:
    model = tiny("llama")
    plans = {at: interp.explain(interp.patch, model, PAIRS, model.sites("z"), at=at) for at in ("last", 2, "each")}
    assert plans[2].flops < plans["last"].flops < plans["each"].flops
    assert "up to 7 positions read" in str(plans["each"]) and "positions read" not in str(plans["last"])


@pytest.mark.parametrize(
    ("at", "metric", "words"),
    [
        ([], "logprob", "empty list"), (True, "logprob", "at=True"), (1.5, "logprob", "at=1.5"),
        (7, "logprob", "outside a prompt of 7"), (-8, "logprob", "outside"), ("nowhere", "logprob", "names the span"),
        ("all", "logprob", "at='each'"), ("each", "seq_logprob", "at='all'"), (0, "seq_logprob", "before the first"),
        ("start:middle", "logprob", "names the span"), ("start:mean", "seq_logprob", "gives one number"),
    ],
)  # fmt: skip
def test_bad_positions_are_refused_before_any_forward(tiny, monkeypatch, at: Any, metric: str, words: str) -> None:
    model = tiny("gpt2")
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("a forward was run"))
    with pytest.raises((InterpError, PromptError), match=words):
        interp.patch(model, PAIRS, model.sites("z"), metric, at=at, **QUIET)


def test_metrics_that_need_more_are_refused(tiny) -> None:
    model = tiny("gpt2")
    with pytest.raises(InterpError, match="token_kl"):
        interp.trace(model, interp.Fact("w3 w4 w5 w6", "w4", "w9"), metric="token_kl", **QUIET)
    with pytest.raises(InterpError, match="token_kl"):
        interp.mediate(model, PAIRS, model.sites("z"), metric="token_kl", **QUIET)


def test_sweeps_and_the_command_line_say_where_to_read() -> None:
    from interp.recipes.registry import RECIPES

    for name, recipe in RECIPES.items():
        options = {o.name: o for o in recipe.options}
        option = options.get("read_at" if name == "steer" else "at")
        assert option is not None and recipe.takes("at")
        read = [option.type.argument(None, option.checked(x)) for x in ("last", "-2", "subject:mean", "each, 3")]
        assert read == ["last", -2, "subject:mean", ["each", 3]]
        assert option.type.check([1, "subject"]) == [1, "subject"]


def test_a_sweep_stores_the_positions_that_are_read(tiny, tmp_path) -> None:
    model = tiny("llama")
    file = tmp_path / "pairs.csv"
    file.write_text("clean,corrupt,answer,foil,span:name\nw1 w2 w3 w4,w1 w5 w3 w4,w95,w96,w2 w3\n")
    recipe = {"recipe": "patch", "at": ["name", -1], "metric": "logprob"}
    document = {
        "name": "read", "models": [{"name": "tiny", "load": "tiny"}], "recipes": [recipe],
        "tasks": [{"name": "own", "pairs": str(file), "require": 0}], "sites": [{"sites": "attn_out"}],
    }  # fmt: skip
    sweep = interp.Sweep(document, tmp_path / "run", models={"tiny": model})
    assert sweep.run().failed == 0
    (effects,) = sweep.effects().values()
    wanted = interp.patch(
        model, interp.PromptPair("w1 w2 w3 w4", "w1 w5 w3 w4", "w95", "w96").span("name", "w2 w3"),
        model.sites("attn_out"), "logprob", at=["name", -1], **QUIET,
    ).frame()  # fmt: skip
    got = effects.frame()
    assert got["read_at"].tolist() == wanted["read_at"].tolist()
    assert got["read_at"].tolist()[:4] == ["name[0]", "name[1]", "-1", "name[0]"]
    np.testing.assert_allclose(got["patched"], wanted["patched"], atol=1e-6)


def test_an_answer_of_several_tokens_can_be_read_as_a_span_of_the_prompt(tiny) -> None:
    """log P(w7 w2 | w1 w5 w3 w6) with an MLP ablated, against a full forward with a hook."""
    model, hf = tiny("gpt2"), tiny_hf("gpt2")
    pair = interp.PromptPair("w1 w5 w3 w6", "w8 w5 w3 w6", "w7 w2")
    as_answer = interp.ablate(model, pair, "mlp_out.L0", "logprob", "zero", **QUIET).frame()
    pair = interp.PromptPair("w1 w5 w3 w6 w7 w2", "w8 w5 w3 w6 w7 w2", "w9").span("answer", "w7 w2")
    frame = interp.ablate(model, pair, "mlp_out.L0", "seq_logprob", "zero", at="answer", **QUIET).frame()
    ids = model.coder.encode(pair.clean)
    with output_changed(blocks_of(hf)[0].mlp, torch.zeros_like):
        logprobs = logits_of(hf, ids).log_softmax(-1)
    np.testing.assert_allclose(frame["patched"], float(logprobs[4, ids[5]] + logprobs[5, ids[6]]), atol=1e-5)
    np.testing.assert_allclose(as_answer["patched"], frame["patched"], atol=1e-6)


def test_parts_of_a_sweep_name_positions_alike(tiny, tmp_path) -> None:
    """Each part has prompts of one length, and the set has two: "each" counts from the last token in all of them."""
    model, file = tiny("llama"), tmp_path / "pairs.csv"
    pairs = [
        interp.PromptPair("w1 w2 w3 w4", "w1 w5 w3 w4", "w95", "w96"),
        interp.PromptPair("w9 w1 w2 w3 w4", "w9 w1 w5 w3 w4", "w95", "w96"),
    ]
    interp.PairSet(pairs).frame().to_csv(file, index=False)
    document = {
        "name": "read", "models": [{"name": "tiny", "load": "tiny"}], "examples_per_part": 1,
        "recipes": [{"recipe": "patch", "at": "each", "metric": "logprob"}], "sites": [{"sites": "attn_out"}],
        "tasks": [{"name": "own", "pairs": str(file), "require": 0}],
    }  # fmt: skip
    sweep = interp.Sweep(document, tmp_path / "run", models={"tiny": model})
    assert sweep.run().failed == 0
    ((_, effects),) = sweep.effects().items()
    wanted = interp.patch(model, pairs, model.sites("attn_out"), "logprob", at="each", **QUIET)
    keys = ["example", "layer", "read_at"]
    got, want = (e.frame().sort_values(keys)[[*keys, "patched"]].reset_index(drop=True) for e in (effects, wanted))
    assert got["read_at"].tolist() == want["read_at"].tolist()
    np.testing.assert_allclose(got["patched"], want["patched"], atol=1e-6)


def test_equal_scores_are_counted_by_position(caplog) -> None:
    known = interp.zoo.one_head()
    pairs = known.pairs(3, seed=0)
    interp.patch(known.model, pairs, ["z.L1H2"], at=["marked", "last"])
    assert "at 3 of 6 positions that are read" in caplog.text
