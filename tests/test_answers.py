"""Answers and foils of several tokens, against hooks on an untouched Hugging Face model and plain arithmetic.

The expected numbers are those of full forwards of the prompt with the answer's tokens behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_read_out import blocks_of, logits_of, output_changed
from torch import Tensor

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, PromptError
from interp.prompts.pairs import encode_facts
from interp.recipes.corruption import subject_noise

FAMILIES = ("llama", "gpt2", "neox")
ENGINES = ("auto", "naive")
METRICS = ("logit_diff", "logprob", "prob", "rank")
QUIET: dict[str, Any] = {"show_progress": False}

PAIRS = [  # prompts of 5, 6 and 8 tokens; answers and foils of 1 to 4 tokens
    interp.PromptPair("w1 w5 w3 w6", "w8 w5 w9 w6", "w95 w20", "w96 w21 w22"),
    interp.PromptPair("w2 w5 w4 w7 w2", "w8 w5 w4 w7 w2", "w30 w31 w32 w33", "w30"),
    interp.PromptPair("w1 w2 w3 w4 w5 w6 w7", "w1 w2 w9 w4 w5 w8 w7", "w40", "w41"),
    interp.PromptPair("w3 w5 w4 w7 w1", "w8 w5 w4 w7 w1", "w50", "w50 w51"),
]


class Case:
    """A pair as token ids, and what a Hugging Face model makes of it under hooks."""

    def __init__(self, model: interp.Model, hf: Any, pair: interp.PromptPair):
        self.hf, coder = hf, model.coder
        self.clean, self.corrupt = coder.encode(pair.clean), coder.encode(pair.corrupt)
        self.answer, self.foil = coder.continuation(str(pair.answer)), coder.continuation(str(pair.foil))

    def rows(self, prompt: Sequence[int], string: Sequence[int]) -> Tensor:
        """Logits that predict each token of the string, under the hooks that are set."""
        return logits_of(self.hf, [*prompt, *string[:-1]])[len(prompt) - 1 :]

    def value(self, metric: str, rows: Callable[[list[int]], Tensor]) -> float:
        """The metric of both strings; ``rows`` gives the logits of one string's tokens."""
        answer = rows(self.answer)
        picked = torch.tensor(self.answer)[:, None]
        logprob = answer.log_softmax(-1).gather(1, picked).sum()
        if metric == "rank":
            return float((answer > answer.gather(1, picked)).sum(-1).max())
        if metric != "logit_diff":
            return float(logprob.exp() if metric == "prob" else logprob)
        foil = rows(self.foil).log_softmax(-1).gather(1, torch.tensor(self.foil)[:, None]).sum()
        return float(logprob - foil)

    def base(self, metric: str, prompt: Sequence[int]) -> float:
        """The metric after one of the prompts, under the hooks that are set."""
        return self.value(metric, lambda string: self.rows(prompt, string))

    def patched(
        self, module: Any, source: Sequence[int], into: Sequence[int], rows: slice, metric: str = "logit_diff",
        source_rows: slice | None = None,
    ) -> float:  # fmt: skip
        """The metric with a module's output in some rows from a run of ``source`` (of other rows: their mean)."""

        def of_string(string: list[int]) -> Tensor:
            states: list[Tensor] = []

            def put(x: Tensor) -> Tensor:
                other = states[0][:, source_rows or rows]
                x[:, rows] = other if source_rows is None else other.mean(1, keepdim=True)
                return x

            with output_changed(module, lambda x: states.append(x) or x):
                self.rows(source, string)
            with output_changed(module, put):
                return self.rows(into, string)

        return self.value(metric, of_string)


def values(effects: interp.Effects, example: int, column: str = "patched") -> list[float]:
    frame = effects.frame()
    return frame[frame["example"] == example][column].tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: Any, word_tokenizer: Any) -> tuple[interp.Model, Any]:
    return interp.load(tiny_hf(request.param), tokenizer=word_tokenizer), tiny_hf(request.param)


@pytest.mark.parametrize(
    ("mode", "engine", "metrics"),
    [("denoise", "auto", METRICS), ("noise", "auto", ["logit_diff"]), ("denoise", "naive", ["logit_diff"])],
)
@pytest.mark.slow
def test_patches_of_every_position(loaded, mode: Any, engine: Any, metrics: Sequence[str]) -> None:
    model, hf = loaded
    sites = model.sites("resid_post", positions=[1, 3, -1])
    for metric in metrics:
        effects = interp.patch(model, PAIRS, sites, metric, mode, engine, **QUIET)
        for example, pair in enumerate(PAIRS):
            case = Case(model, hf, pair)
            source, into = (case.clean, case.corrupt) if mode == "denoise" else (case.corrupt, case.clean)
            expected = [
                case.patched(block, source, into, slice(position, position + 1), metric)
                for block in blocks_of(hf)
                for position in (1, 3, len(case.clean) - 1)
            ]
            np.testing.assert_allclose(values(effects, example), expected, atol=2e-5)
            for column in ("clean", "corrupt"):
                base = case.base(metric, getattr(case, column))
                np.testing.assert_allclose(values(effects, example, column), base, atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.slow
def test_ablation_everywhere_acts_on_the_answers_tokens_too(loaded, engine: Any) -> None:
    model, hf = loaded
    runs = {
        using: interp.ablate(model, PAIRS, model.sites("mlp_out", positions="all"), using=using, engine=engine, **QUIET)
        for using in ("zero", "mean")
    }
    cases = [Case(model, hf, pair) for pair in PAIRS]
    for layer, block in enumerate(blocks_of(hf)):
        outputs: list[Tensor] = []
        for case in cases:  # the mean is over the tokens of the prompts alone
            with output_changed(block.mlp, lambda x, outputs=outputs: outputs.append(x[0]) or x):
                logits_of(hf, case.clean)
        mean = torch.cat(outputs).mean(0)
        for example, case in enumerate(cases):
            for using, value in {"zero": torch.zeros_like(mean), "mean": mean}.items():
                with output_changed(block.mlp, lambda x, value=value: value.expand_as(x)):
                    expected = case.base("logit_diff", case.clean)
                np.testing.assert_allclose(values(runs[using], example)[layer], expected, atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_resampling_takes_another_prompt_with_the_same_answer(loaded, engine: Any) -> None:
    model, hf = loaded
    pairs = [PAIRS[1], PAIRS[3]]  # of one length: each takes the other's activations
    effects = interp.ablate(
        model, pairs, model.sites("mlp_out", positions="all"), using="resample", engine=engine, **QUIET
    )
    cases = [Case(model, hf, pair) for pair in pairs]
    for layer, block in enumerate(blocks_of(hf)):
        for example, (case, other) in enumerate(zip(cases, cases[::-1], strict=True)):
            expected = case.patched(block.mlp, other.clean, case.clean, slice(None))
            np.testing.assert_allclose(values(effects, example)[layer], expected, atol=2e-5)


@contextmanager
def keys_hidden(hf: Any, keys: range, queries: range | None) -> Iterator[None]:
    """Give every forward a dense causal mask in which ``queries`` (default: all later rows) do not see ``keys``."""

    def hide(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        n = kwargs["input_ids"].shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        rows = range(keys.stop, n) if queries is None else queries
        seen[rows.start : rows.stop, keys.start : keys.stop] = False
        mask = torch.zeros(n, n).masked_fill(~seen, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": mask[None, None]}

    handle = hf.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("engine", ENGINES)
def test_attention_edits_of_all_queries_reach_the_answers_tokens(loaded, engine: Any) -> None:
    """``queries=-1`` is the last token of the prompt; without queries, the answer's tokens are among them."""
    model, hf = loaded
    edits = {
        "last": interp.AttentionEdit(queries=-1, keys=[1, 2], knockout=True),
        "prompt": interp.AttentionEdit(queries=[3, 4], keys=[1, 2], knockout=True),
        "all": interp.AttentionEdit(keys=[1, 2], gain=0.0),
    }
    pair = PAIRS[0]
    got = interp.edit(model, pair, edits, engine=engine, **QUIET).frame().set_index("component")["patched"]
    cut = interp.knock_out(model, pair.span("start", "w1 w5"), "start", -1, layers=0, window=9, metric="logit_diff",
                           engine=engine, **QUIET).frame()["patched"].item()  # fmt: skip
    case = Case(model, hf, pair)
    for name, queries in {"last": range(4, 5), "prompt": range(3, 5)}.items():
        with keys_hidden(hf, range(1, 3), queries):
            expected = case.base("logit_diff", case.clean)
        np.testing.assert_allclose(got[name], expected, atol=2e-5)
        if name == "last":
            np.testing.assert_allclose(cut, expected, atol=2e-5)
    with keys_hidden(hf, range(1, 3), range(1, 99)):
        expected = case.base("logit_diff", case.clean)
    np.testing.assert_allclose(got["all"], expected, atol=2e-5)


def test_phases_of_an_edit_divide_prompt_and_answer(tiny) -> None:
    """An edit of the prompt alone and one of decoding alone make one of all queries."""
    model = tiny("llama")
    both = [interp.AttentionEdit(keys=[1, 2], gain=0.25, phase=phase) for phase in ("prompt", "decoding")]
    edits = {"both": both, "whole": interp.AttentionEdit(keys=[1, 2], gain=0.25), "prompt": both[0], "answer": both[1]}
    frame = interp.edit(model, PAIRS[:2], edits, "logprob", **QUIET).frame()
    got: dict[tuple[int, str], float] = frame.set_index(["example", "component"])["raw"].to_dict()  # type: ignore[assignment]
    for example in (0, 1):
        np.testing.assert_allclose(got[example, "both"], got[example, "whole"], atol=1e-6)
        assert len({round(got[example, name], 6) for name in ("whole", "prompt", "answer")} | {0.0}) == 4


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.slow
def test_writes_of_all_tokens_reach_the_answers(tiny, engine: Any) -> None:
    model, hf, direction = tiny("llama"), tiny_hf("llama"), torch.linspace(-2, 2, 32)
    writes = {
        "all": interp.Write("resid_post.L1", add=direction),
        "last": interp.Write("resid_post.L1@-1", add=direction),
    }
    got = interp.edit(model, PAIRS[0], writes, engine=engine, **QUIET).frame().set_index("component")["patched"]
    case = Case(model, hf, PAIRS[0])
    for name, rows in {"all": slice(None), "last": slice(4, 5)}.items():

        def add(x: Tensor, rows: slice = rows) -> Tensor:
            x[:, rows] += direction.to(x)
            return x

        with output_changed(blocks_of(hf)[1], add):
            np.testing.assert_allclose(got[name], case.base("logit_diff", case.clean), atol=2e-5)


def test_edits_of_a_context_count_positions_of_the_prompt(tiny) -> None:
    model = tiny("llama")
    edits = {"last": interp.AttentionEdit(queries=-1, keys="start", knockout=True),
             "all": interp.AttentionEdit(keys=[1, 2], gain=0.5),
             "answer": interp.AttentionEdit(keys="start", gain=0.5, phase="decoding")}  # fmt: skip
    pair = PAIRS[0].span("start", "w1 w5")
    as_cells = interp.edit(model, pair, edits, **QUIET).frame().set_index("component")["patched"]
    for name, edit in edits.items():
        with model.edited(edit):
            effects = interp.steer(model, pair, "resid_post.L0", torch.ones(model.d_model), 0.0, **QUIET)
            donors = interp.ablate(model, [pair, PAIRS[3].span("start", "w3 w5")], "z.L0H0", using="resample", **QUIET)
        np.testing.assert_allclose(effects.frame()["clean"], as_cells[name], atol=1e-6)
        assert np.isfinite(donors.frame()["patched"]).all()
    with model.edited(interp.AttentionMask(window=2)), pytest.raises(InterpError, match="mask"):
        interp.patch(model, pair, model.sites("z"), **QUIET)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.slow
def test_steering_everywhere_and_at_the_prompts_end(loaded, engine: Any) -> None:
    model, hf = loaded
    direction = torch.linspace(-2, 2, model.d_model)
    effects = interp.steer(model, PAIRS, ["resid_post.L1@all", "resid_post.L1@-1"], direction, engine=engine, **QUIET)
    for example, pair in enumerate(PAIRS):
        case, expected = Case(model, hf, pair), []
        for rows in (slice(None), slice(len(case.clean) - 1, len(case.clean))):

            def add(x: Tensor, rows: slice = rows) -> Tensor:
                x[:, rows] += direction.to(x)
                return x

            with output_changed(blocks_of(hf)[1], add):
                expected.append(case.base("logit_diff", case.clean))
        np.testing.assert_allclose(values(effects, example), expected, atol=2e-5)


@pytest.mark.parametrize("metric", ["prob", "logprob"])
def test_traces_average_over_noise(loaded, metric: str) -> None:
    """P of the string with noise on the subject and one state restored, averaged over the samples."""
    model, hf = loaded
    fact = interp.Fact("w3 w4 w5 w6 w2", "w4 w5", "w9 w10 w11")
    runs = [
        interp.trace(model, fact, samples=2, sigma=0.3, metric=metric, layers=1, engine=engine, **QUIET)
        for engine in ENGINES
    ]
    np.testing.assert_allclose(runs[0].frame()["patched"], runs[1].frame()["patched"], atol=1e-6)
    prompt, answer = model.coder.encode(fact.prompt), model.coder.continuation(str(fact.answer))
    (encoded,) = encode_facts(fact, model.coder, strings=True)
    noises = [subject_noise(model, encoded, 0.9, 0, 0, sample) for sample in (0, 1)]
    expected = np.zeros(len(prompt))
    for noise in noises:
        for position in range(len(prompt)):
            states: list[Tensor] = []
            with output_changed(blocks_of(hf)[1], lambda x, states=states: states.append(x.clone()) or x):
                logits_of(hf, [*prompt, *answer[:-1]])

            def add(x: Tensor, noise: Tensor = noise) -> Tensor:
                x[0, : len(noise)] += noise.to(x)
                return x

            def restore(x: Tensor, position: int = position, states: list[Tensor] = states) -> Tensor:
                x[:, position] = states[0][:, position]
                return x

            with output_changed(hf.get_input_embeddings(), add), output_changed(blocks_of(hf)[1], restore):
                logprobs = logits_of(hf, [*prompt, *answer[:-1]])[len(prompt) - 1 :].log_softmax(-1)
            total = float(logprobs.gather(1, torch.tensor(answer)[:, None]).sum())
            expected[position] += (np.exp(total) if metric == "prob" else total) / 2
    np.testing.assert_allclose(runs[0].frame()["patched"], expected, atol=2e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.slow
def test_prompts_of_other_lengths_aligned_by_spans(loaded, mode: Any, engine: Any) -> None:
    model, hf = loaded
    pair = interp.PromptPair("w1 w5 w3 w6", "w8 w8 w9 w5 w3 w2 w6", "w95 w20 w21", "w96 w22")
    pair = pair.span("name", "w1", corrupt="w8 w8 w9")
    effects = interp.patch(model, pair, model.sites("resid_post", positions="name"), mode=mode, align="span",
                           engine=engine, **QUIET)  # fmt: skip
    case, name, names = Case(model, hf, pair), slice(1, 2), slice(1, 4)
    for got, block in zip(values(effects, 0), blocks_of(hf), strict=True):
        if mode == "denoise":
            expected = case.patched(block, case.clean, case.corrupt, names, source_rows=name)
        else:
            expected = case.patched(block, case.corrupt, case.clean, name, source_rows=names)
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_sources_are_run_with_the_pairs_own_answer(tiny) -> None:
    model, hf = tiny("llama"), tiny_hf("llama")
    source = interp.PromptPair("w9 w5 w9 w6", "w8 w5 w8 w6", "w1 w2 w3", "w4")
    effects = interp.patch(model, PAIRS[0], "resid_post.L0@2", sources=source, **QUIET)
    case = Case(model, hf, PAIRS[0])
    expected = case.patched(blocks_of(hf)[0], model.coder.encode(source.clean), case.corrupt, slice(2, 3))
    np.testing.assert_allclose(values(effects, 0), expected, atol=2e-5)


@pytest.mark.slow
def test_a_path_from_the_last_mlp_to_the_logits_is_its_patch(tiny) -> None:
    """All that the last MLP sends goes to the logits, from the answer's tokens too."""
    model = tiny("llama")
    site = f"mlp_out.L{model.n_layers - 1}@all"
    for engine in ENGINES:
        path = interp.path_patch(model, PAIRS, site, mode="noise", engine=engine, **QUIET)
        patch = interp.patch(model, PAIRS, site, mode="noise", engine=engine, **QUIET)
        np.testing.assert_allclose(path.frame()["patched"], patch.frame()["patched"], atol=1e-6)
    heads = [interp.path_patch(model, PAIRS, model.sites("z"), ["q.L1H0", "logits"], engine=e, **QUIET).frame()
             for e in ENGINES]  # fmt: skip
    np.testing.assert_allclose(heads[0]["patched"], heads[1]["patched"], atol=1e-6)
    assert np.abs(heads[0]["raw"].to_numpy()).max() > 1e-6


def test_mediation_is_made_of_both_patches(tiny) -> None:
    model = tiny("neox")
    frame = interp.mediate(model, PAIRS, model.sites("attn_out", positions="all"), **QUIET).frame()
    by_name = {name: f.reset_index(drop=True) for name, f in frame.groupby("intervention")}
    noise = interp.patch(model, PAIRS, model.sites("attn_out", positions="all"), mode="noise", **QUIET).frame()
    np.testing.assert_allclose(by_name["natural indirect effect"]["raw"], noise["raw"], atol=1e-6)
    np.testing.assert_allclose(by_name["total effect"]["raw"], noise["corrupt"] - noise["clean"], atol=1e-6)


# ---------------------------------------------------------------- what is read, and what it costs


@pytest.mark.parametrize("metric", METRICS)
def test_single_tokens_keep_their_numbers_to_the_bit(tiny, metric: str) -> None:
    """Among pairs with longer answers, one with single tokens has the numbers that it has alone."""
    model, pair = tiny("gpt2"), PAIRS[2]
    for engine in ENGINES:
        alone, among = (
            interp.patch(model, pairs, model.sites("resid_pre", positions="each"), metric, engine=engine, **QUIET)
            for pairs in ([pair], [PAIRS[0], pair, PAIRS[1]])
        )
        for column in ("clean", "corrupt", "patched", "effect"):
            np.testing.assert_array_equal(values(among, 1, column), values(alone, 0, column))


def test_the_difference_of_single_tokens_is_that_of_their_logprobs(tiny) -> None:
    """A pair read as strings of one token each gives the same logit difference, up to rounding."""
    model, pair = tiny("llama"), PAIRS[2]
    sites = model.sites("resid_post", positions="each")
    one = interp.patch(model, pair, sites, **QUIET).frame()["patched"]
    a, b = (
        interp.patch(model, replace(pair, answer=word, foil=None), sites, "logprob", **QUIET).frame()["patched"]
        for word in (pair.answer, pair.foil)
    )
    np.testing.assert_allclose(one, a - b, atol=1e-5)


def test_greedy_decoding_gives_strings_of_rank_0(tiny) -> None:
    model, hf = tiny("llama"), tiny_hf("llama")
    generate: Any = hf.generate
    prompt = model.coder.encode("w3 w4 w5")
    inputs = torch.tensor([prompt])
    greedy = generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=3, do_sample=False,
                         eos_token_id=None, pad_token_id=1)[0, len(prompt) :].tolist()  # fmt: skip
    other = [*greedy[:2], (greedy[2] + 1) % 90 + 5]
    pairs = [interp.PromptPair("w3 w4 w5", "w3 w9 w5", ids) for ids in (greedy, other)]
    ranks = interp.patch(model, pairs, "z.L0H0", "rank", **QUIET).frame()["clean"].tolist()
    assert ranks[0] == 0 and ranks[1] > 0
    behaviour = interp.tasks.check(model, pairs)
    assert behaviour.accuracy == 0.5
    with_foil = interp.tasks.check(model, PAIRS)
    frame = interp.patch(model, PAIRS, "z.L0H0", **QUIET).frame()
    np.testing.assert_allclose(with_foil.mean_logit_diff, frame["clean"].mean(), atol=1e-5)
    assert with_foil.accuracy == (frame["clean"] > 0).mean()


def test_the_tokens_that_are_read_are_stated(tiny) -> None:
    model = tiny("llama")
    effects = interp.patch(model, PAIRS, model.sites("z"), **QUIET)
    assert effects.provenance["answer_tokens"][0] == ["w95", "w20"] and len(effects.provenance["answer_tokens"]) == 4
    assert "minus that of the foil" in effects.provenance["read_answers"]
    assert set(effects.frame()["read_at"].fillna("last")) == {"last"}
    assert "answer_tokens" not in interp.patch(model, PAIRS[2], model.sites("z"), **QUIET).provenance
    plan = interp.explain(interp.patch, model, PAIRS[0], model.sites("z"), "logprob")
    both = interp.explain(interp.patch, model, PAIRS[0], model.sites("z"))
    assert "up to 2 positions read" in str(plan) and "up to 3 positions read" in str(both)
    assert both.n_cells == 2 * plan.n_cells == 2 * len(list(model.sites("z")))


def test_metrics_that_read_no_answer_run_as_before(tiny) -> None:
    model = tiny("llama")
    for metric, at in (("kl", "last"), ("token_kl", "each"), ("seq_logprob", "all")):
        one, several = (
            interp.patch(model, replace(PAIRS[0], answer=answer), "z.L0H1", metric, at=at, **QUIET).frame()
            for answer in ("w95", "w95 w20")
        )
        np.testing.assert_array_equal(one["patched"], several["patched"])


def test_custom_metrics_of_strings(tiny) -> None:
    model, hf = tiny("llama"), tiny_hf("llama")

    def mean_logprob(logits: Tensor, read: Any) -> Tensor:
        return logits.log_softmax(-1).gather(-1, read.tokens[..., None])[..., 0].mean(-1)

    metric = interp.Metric("mean_logprob", interp.logprob.fn, of_string=mean_logprob)
    frame = interp.patch(model, PAIRS[:2], "z.L0H1", metric, **QUIET).frame()
    for pair, got in zip(PAIRS[:2], frame["clean"], strict=True):
        case = Case(model, hf, pair)
        expected = case.base("logprob", case.clean) / len(case.answer)
        np.testing.assert_allclose(got, expected, atol=2e-5)
    with pytest.raises(InterpError, match="of_string"):
        interp.patch(model, PAIRS, "z.L0H1", lambda x, r: x[:, 0], **QUIET)


def test_sweeps_hold_answers_of_several_tokens(tiny, tmp_path) -> None:
    model, file = tiny("llama"), tmp_path / "pairs.csv"
    interp.PairSet(PAIRS).frame().to_csv(file, index=False)
    document = {
        "name": "strings", "models": [{"name": "tiny", "load": "tiny"}], "examples_per_part": 2,
        "recipes": [{"recipe": "patch"}], "sites": [{"sites": "z"}],
        "tasks": [{"name": "own", "pairs": str(file), "require": 0}],
    }  # fmt: skip
    sweep = interp.Sweep(document, tmp_path / "run", models={"tiny": model})
    assert sweep.run().failed == 0
    ((_, effects),) = sweep.effects().items()
    wanted = interp.patch(model, PAIRS, model.sites("z"), **QUIET)
    keys = ["example", "layer", "head"]
    got, want = (e.frame().sort_values(keys)["patched"].to_numpy() for e in (effects, wanted))
    np.testing.assert_allclose(got, want, atol=1e-6)


# ---------------------------------------------------------------- what is refused


@pytest.fixture
def no_forward(monkeypatch) -> None:
    monkeypatch.setattr(interp.Model, "forward", lambda *a, **k: pytest.fail("a forward was run"))


@pytest.mark.parametrize(
    ("answer", "foil", "words"),
    [
        ("w1 w2", "w1 w2", "same tokens"), ("w1 nonsense", None, "vocabulary"), ("", None, "tokens"),
        ([], None, "list of them"), ([1, True], None, "list of them"), ([1, -2], None, "list of them"),
        ([5, 10**6], None, "vocabulary|beyond"), (" ".join(["w1"] * 600), None, "context"), (2.5, None, "text"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_read(tiny, no_forward, answer: Any, foil: Any, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        interp.patch(tiny("llama"), interp.PromptPair("w1 w2", "w3 w2", answer, foil), "z.L0H0", "logprob", **QUIET)


def test_recipes_and_models_that_read_one_token(tiny, word_tokenizer, no_forward) -> None:
    model = tiny("llama")
    with pytest.raises(InterpError, match="at="):
        interp.patch(model, PAIRS, "z.L0H0", at="each", **QUIET)
    for recipe in (interp.peek, interp.leave_out, interp.circuits.attribute_edges):
        with pytest.raises(PromptError, match="exactly one"):
            recipe(model, PAIRS[0].span("start", "w1"))
    with pytest.raises(InterpError, match="mask"):
        interp.edit(model, PAIRS, interp.AttentionMask(window=2), **QUIET)
    with pytest.raises(InterpError, match="no mean by place"):
        interp.ablate(model, [PAIRS[1], PAIRS[3]], "z.L0H0", using="position_mean", **QUIET)


def test_prompts_of_vectors_take_single_tokens(tiny) -> None:
    """As examples, and as prompts that others are resampled from."""
    model, vectors = tiny("llama"), interp.Embeddings(torch.linspace(-1, 1, 128).view(4, 32))
    other = interp.Embeddings(vectors.vectors.roll(1, 0))
    with pytest.raises(PromptError, match="prompt of vectors"):
        interp.patch(model, interp.PromptPair(vectors, other, [5, 6], [7]), "z.L0H0", **QUIET)  # type: ignore[arg-type]
    pair = interp.PromptPair("w1 w2", "w3 w2", "w4", "w6")
    call: dict[str, Any] = {"using": "resample", "reference": [vectors], **QUIET}
    assert np.isfinite(interp.ablate(model, pair, "z.L0H0", **call).frame()["patched"]).all()
    with pytest.raises(PromptError, match="prompt of vectors"):
        interp.ablate(model, replace(pair, answer="w4 w5"), "z.L0H0", **call)
