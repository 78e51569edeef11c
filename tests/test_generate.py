"""`Model.generate` against transformers' own generate on untouched models, and against full forwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from architectures import of_kind
from headstats import StatSpec

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError
from interp.model.generation.sampling import Sampling, choose

PROMPTS = [[3, 4, 5, 6, 9, 12], [7, 9], [11, 3, 8, 2]]
OTHERS = ("gpt2", "gemma3", "falcon_alibi", "gpt_oss", "bamba")
DECODERS = of_kind("decoder", "hybrid")
SPEC = StatSpec(entropy=True, argmax=True, sink=2)
NEW = 10


def loaded(family: str) -> interp.Model:
    """A tiny model without tokens that end a text."""
    hf = tiny_hf(family)
    hf.generation_config.eos_token_id = None
    return interp.load(hf, tokenizer=False)


@pytest.fixture(scope="module")
def llama() -> interp.Model:
    return loaded("llama")


def ids_of(out) -> list[list[int]]:
    return [row.ids for row in out.rows]


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_tokens_are_those_of_an_untouched_model_alone_and_padded(family) -> None:
    hf, model = tiny_hf(family), loaded(family)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = [hf.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]
    assert ids_of(model.generate(PROMPTS, NEW)) == want
    assert ids_of(model.generate([PROMPTS[1]], NEW)) == [want[1]]
    several, alone = (model.generate(p, NEW, n=2, temperature=1.0, seed=1) for p in (PROMPTS, [PROMPTS[1]]))
    assert ids_of(several)[2:4] == ids_of(alone)
    assert ids_of(alone)[0] != ids_of(alone)[1]


@pytest.mark.parametrize("family", ["llama", "mistral", *(pytest.param(f, marks=pytest.mark.slow) for f in OTHERS)])
def test_numbers_of_a_step_are_those_of_the_full_forwards_row(family) -> None:
    hf, model = tiny_hf(family), loaded(family)
    out = model.generate(PROMPTS, NEW, stats=SPEC, keep=["resid_post.L1", "z.L1H2"])
    assert out.stats is not None
    for i, (prompt, row) in enumerate(zip(PROMPTS, out.rows, strict=True)):
        ids, first = torch.tensor([[*prompt, *row.ids]]), len(prompt) - 1
        logprobs = hf(ids).logits[0, first:-1].log_softmax(-1)
        tolerance = 1e-5 if logprobs.dtype == torch.float64 else 1e-4  # their norms and softmax round to float32
        np.testing.assert_allclose(
            row.logprob, logprobs.gather(-1, ids[0, first + 1 :, None])[:, 0].detach(), atol=tolerance
        )
        np.testing.assert_allclose(row.entropy, torch.special.entr(logprobs.exp()).sum(-1).detach(), atol=tolerance)
        top = logprobs.exp().topk(2).values
        np.testing.assert_allclose(row.margin, (top[:, 0] - top[:, 1]).detach(), atol=tolerance)
        full = model.attention_stats(out.prompts()[i], SPEC)
        for name, values in out.stats.values.items():
            np.testing.assert_allclose(values[i], full.values[name][0][:, :, first:-1], atol=10 * tolerance)
        hidden = hf(ids, output_hidden_states=True).hidden_states[2][0, first:-1]
        torch.testing.assert_close(out.kept["resid_post.L1"][i], hidden.detach(), atol=tolerance, rtol=1e-4)
        assert out.kept["z.L1H2"][i].shape[0] == NEW


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "neox"])
def test_edits_while_decoding_are_those_of_full_forwards(family) -> None:
    model = loaded(family)
    everywhere = [
        interp.AttentionEdit(keys=[0, 1], gain=0.2), interp.AttentionEdit(layers=1, heads=[1], gate=0.5),
    ]  # fmt: skip
    edits = [*everywhere, interp.AttentionEdit(counterfactual="uniform", layers=0, phase="decoding")]
    plain, out = model.generate(PROMPTS, NEW), model.generate(PROMPTS, NEW, edits=edits)
    assert ids_of(out) != ids_of(plain)
    for prompt, row in zip(PROMPTS, out.rows, strict=True):
        ids, first = torch.tensor([[*prompt, *row.ids]]), len(prompt) - 1
        decoded = list(range(len(prompt), ids.shape[1]))
        with model.edited(*everywhere, interp.AttentionEdit(counterfactual="uniform", layers=0, queries=decoded)):
            logits = model(ids)[0, first:-1]
        assert row.ids == logits.argmax(-1).tolist()
        want = logits.log_softmax(-1).gather(-1, ids[0, first + 1 :, None])[:, 0]
        np.testing.assert_allclose(row.logprob, want.detach(), atol=1e-9)


def test_an_edit_of_decoding_leaves_the_first_step_as_it_is(llama) -> None:
    plain = llama.generate(PROMPTS, NEW)
    edited = llama.generate(PROMPTS, NEW, edits=interp.AttentionEdit(gate=0.0, layers=[0, 1], phase="decoding"))
    for before, after in zip(plain.rows, edited.rows, strict=True):
        assert before.logprob[0] == after.logprob[0] and before.logprob[1:] != after.logprob[1:]
    neutral = llama.generate(PROMPTS, NEW, edits=interp.AttentionEdit(gain=1.0))
    assert ids_of(neutral) == ids_of(plain) and [r.logprob for r in neutral.rows] == [r.logprob for r in plain.rows]


def test_edits_with_samples_and_ended_rows_are_those_of_each_row_alone(llama) -> None:
    hf = llama.bridge.original_model
    prompts = [interp.Prompt(p, {"start": (0, 2)}) for p in PROMPTS]  # type: ignore[arg-type]
    edit = interp.AttentionEdit(keys="start", gain=0.2)
    free = llama.generate(prompts, 12, n=4, temperature=1.5, seed=3, edits=edit)
    hf.generation_config.eos_token_id = ends = sorted({row.ids[k] for k, row in enumerate(free.rows[:6])})
    try:
        several = llama.generate(prompts, 12, n=4, temperature=1.5, seed=3, edits=edit)
    finally:
        hf.generation_config.eos_token_id = None
    assert {row.end for row in several.rows} == {"eos", "length"} or {row.end for row in several.rows} == {"eos"}
    for row, long in zip(several.rows, free.rows, strict=True):
        cut = next((k for k, token in enumerate(long.ids) if token in ends), 11)
        assert row.ids == long.ids[: cut + 1] and len(row.logprob) == cut + 1
        np.testing.assert_allclose(row.logprob, long.logprob[: cut + 1], atol=1e-9)


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -30.0]])
    for sampling in (Sampling(0.7), Sampling(1.0, top_k=2), Sampling(1.0, top_p=0.8), Sampling(2.0, 4, 0.9)):
        probs = (logits[0].double() / sampling.temperature).softmax(-1)
        if sampling.top_k:
            probs[sampling.top_k :] = 0
        if sampling.top_p:
            probs /= probs.sum()
            probs[probs.cumsum(0) - probs >= sampling.top_p] = 0
        probs /= probs.sum()
        draws = [sampling.draws_of([1, 2], i, 0) for i in range(4000)]
        drawn = choose(logits.expand(4000, -1), sampling, draws).bincount(minlength=5) / 4000
        assert (drawn - probs).abs().max() < 0.03 and (drawn[probs == 0] == 0).all()
    large = torch.randn(3, 2000, generator=torch.Generator().manual_seed(0)) * 0.1  # more tokens than are sorted first
    kept = {int(choose(large[:1], Sampling(1.0, top_p=0.5), [Sampling(1.0).draws_of([0], i, 0)])) for i in range(300)}
    order = large[0].double().softmax(-1).sort(descending=True)
    allowed = set(order.indices[: int((order.values.cumsum(0) - order.values < 0.5).sum())].tolist())
    assert kept <= allowed and len(kept) > 200


def test_equal_prompts_are_sampled_apart_and_tables_say_which_is_which(llama) -> None:
    out = llama.generate([PROMPTS[0], PROMPTS[0]], 5, n=2, temperature=1.0)
    assert len({tuple(row.ids) for row in out.rows}) == 4
    frame = out.frame()
    assert frame.groupby(["example", "sample"]).size().tolist() == [5] * 4
    assert (frame["end"] == "length").all() and len(out.texts) == 4
    prompt = out.prompts()[3]
    assert prompt.text == (*PROMPTS[0], *out.rows[3].ids) and prompt.spans["response"] == (6, 11)
    assert len(llama.attention_stats(out.prompts()).tokens) == 4


def test_models_without_a_cache_of_their_own_generate_too() -> None:
    model = interp.zoo.trained_induction().model
    prompts = [interp.Prompt("a b c d a b", {"second": (2, 3)}), "x y z w v x y"]
    edits = [interp.AttentionEdit(keys=[2], gain=0), interp.AttentionEdit(layers=1, gate=0.5, phase="decoding")]
    for options, again in (({}, []), ({"edits": edits}, [edits[0]])):
        out = model.generate(prompts, 3, **options)
        for row in out.rows:
            ids, first = torch.tensor([[*row.prompt, *row.ids]]), len(row.prompt)
            decoded = [interp.AttentionEdit(layers=1, gate=0.5, queries=list(range(first, first + 3)))] if again else []
            with model.edited(*again, *decoded):
                logits = model(ids)[0, first - 1 : -1]
            assert row.ids == logits.argmax(-1).tolist()
    samples = model.generate(prompts, 3, n=2, temperature=1.0, seed=1)
    assert ids_of(samples)[2:] == ids_of(model.generate(prompts[1], 3, n=2, temperature=1.0, seed=1))
    assert model.generate("a b c d a b", 2).texts[0].split() == ["c", "d"]


@pytest.mark.model
def test_stop_strings_and_texts(smollm2) -> None:
    prompt = "One two three four five six"
    plain = smollm2.generate(prompt, 8)
    assert plain.texts[0].startswith(" seven eight nine ten")
    out = smollm2.generate(prompt, 8, stop=[" nine", "zebra"])
    assert out.texts == [" seven eight"] and out.rows[0].end == "stop" and len(out.rows[0].ids) == 3
    assert smollm2.generate(prompt, 8, stop="ight").texts == [" seven e"]


def test_an_interruption_keeps_what_is_written(llama, monkeypatch, caplog) -> None:
    from interp.model.generation import loop

    calls = 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return choose(*args)

    monkeypatch.setattr(loop, "choose", interrupted)
    out = llama.generate(PROMPTS, NEW, stats=SPEC)
    assert "interrupted" in caplog.text and [row.end for row in out.rows].count("interrupted") == 3
    assert sum(len(row.ids) for row in out.rows) == sum(x.shape[-1] for x in out.stats.values["entropy"]) == 3
    assert torch.isfinite(llama(torch.tensor([[1, 2, 3]]))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 5000}, "would not fit into.*context of"),
        ({"n": 2}, "would all be the same"),
        ({"top_p": 0.5}, "top_k and top_p have no effect"),
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 1.0, "top_p": 0}, "top_p=0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": "."}, "no tokenizer"),
        ({"stop": [""]}, "stop=''"),
        ({"stats": "entropy"}, "StatSpec is expected"),
        ({"stats": StatSpec(**dict.fromkeys(StatSpec().requested(), False), received=True)}, "one number for a query"),
        ({"keep": "resid_post"}, "resid_post"),
        ({"keep": "resid_post.L9"}, "has no resid_post in layer 9"),
        ({"keep": "z.L0H0@2"}, "without a position"),
        ({"edits": ["gain=0"]}, "takes AttentionEdits"),
        ({"edits": interp.AttentionEdit(keys="nowhere", gain=0)}, "nowhere"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused_before_any_forward(llama, options, message) -> None:
    calls = llama.instrument.record(0).calls
    with pytest.raises(InterpError, match=message):
        llama.generate(PROMPTS, **{"max_new_tokens": 5, **options})
    assert llama.instrument.record(0).calls == calls


def test_prompts_and_models_that_cannot_generate_are_refused(llama) -> None:
    for prompts, message in (([], "no prompts"), (interp.Embeddings(torch.zeros(3, 32)), "vectors"), ("text", "token")):
        with pytest.raises(InterpError, match=message):
            llama.generate(prompts, 3)
    for family in ("bert", "t5"):
        with pytest.raises(InterpError, match="no decoder of text"):
            interp.load(tiny_hf(family), tokenizer=False).generate([[1, 2]], 3)


@pytest.mark.model
def test_the_command_prints_texts_and_writes_tokens(tmp_path) -> None:
    from typer.testing import CliRunner

    from interp.cli.main import app

    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["generate", *words])

    table = tmp_path / "tokens.csv"
    result = run("One two three four five six", "--max-new-tokens", "3", "--stop", " nine", "-o", str(table))
    assert result.exit_code == 0, result.output
    assert "0 (stop): ' seven eight'" in result.output
    assert pd.read_csv(table)["token"].tolist() == [" seven", " eight", " nine"]
    edited = run("One two three four five six", "--max-new-tokens", "3", "--edit", "keys=-1 gain=0 layers=0-29")
    assert edited.exit_code == 0 and " seven eight nine" not in edited.output
    for words, message in (
        ([], "nothing to continue"), (["a", "-o", "a.txt"], ".parquet or .csv"), (["a", "--n", "2"], "temperature"),
        (["a", "--edit", "site=z.L0H0 set=0"], "writes an activation"),
    ):  # fmt: skip
        refused = run(*words)
        assert isinstance(refused.exception, InterpError) and message in str(refused.exception)
