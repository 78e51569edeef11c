"""Leave-one-out and peeking, read at any position, against an untouched Hugging Face model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from test_read_out import PAIRS, QUIET, N, logits_of, token

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, PromptError

PAIR = interp.PromptPair("w1 w2 w3 w4 w5 w6 w7", "w8 w2 w3 w4 w5 w6 w7", "w95", "w96", {"a": (3, 8), "end": (15, 20)})
IDS = list(range(8))  # <bos> and seven words; "a" is tokens 2 and 3, "end" tokens 6 and 7
FAMILIES = ["llama", "gpt2", "neox"]


def shortened(ids: list[int], start: int, stop: int, instead: list[int]) -> tuple[list[int], dict[int, int]]:
    """The prompt with a part replaced, and where each of its remaining tokens stands."""
    places = {r: r for r in range(start)} | {r: r - (stop - start) + len(instead) for r in range(stop, len(ids))}
    return [*ids[:start], *instead, *ids[stop:]], places


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("instead", [None, {"a": " w9 w8 w10"}])
def test_tokens_that_remain_are_read_where_they_move(word_tokenizer: Any, family: str, instead: Any) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    call: dict[str, Any] = {"instead": instead, "at": ["each", "last", "end:mean", "a"], **QUIET}
    ids, answer, foil = model.coder.encode(PAIR.clean), token(model, "w95"), token(model, "w96")
    words = [token(model, w) for w in ("w9", "w8", "w10")] if instead else []
    whole = logits_of(hf, ids)
    short, places = shortened(ids, 2, 4, words)
    without = logits_of(hf, short)

    def kl(before: torch.Tensor, after: torch.Tensor) -> float:
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        return float((p.exp() * (p - q)).sum())

    differences: Any = interp.leave_out(model, PAIR, "a", metric="logit_diff", **call).frame().set_index("read_at")
    divergences: Any = interp.leave_out(model, PAIR, "a", metric="token_kl", **call).frame().set_index("read_at")
    assert set(differences.index.dropna()) == {*map(str, places), "end:mean"}  # "a" itself is left out
    for r, place in places.items():
        row = differences.loc[str(r)]
        np.testing.assert_allclose(row["clean"], float(whole[r, answer] - whole[r, foil]), atol=1e-5)
        np.testing.assert_allclose(row["patched"], float(without[place, answer] - without[place, foil]), atol=1e-5)
        np.testing.assert_allclose(divergences.loc[str(r), "patched"], kl(whole[r], without[place]), atol=1e-5)
    assert (divergences.loc[["0", "1"], "patched"].abs() < 1e-9).all()  # before the span nothing changes
    ending = np.mean([float(without[places[r], answer] - without[places[r], foil]) for r in (6, 7)])
    np.testing.assert_allclose(differences.loc["end:mean", "patched"], ending, atol=1e-5)
    last = differences[differences.index.isna()].iloc[0]
    assert last["patched"] == pytest.approx(float(without[-1, answer] - without[-1, foil]), abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_probability_of_an_ending_without_a_span(word_tokenizer: Any, family: str) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    frame: Any = interp.leave_out(model, PAIR, ["a", "end"], metric="seq_logprob", at="end", **QUIET).frame()
    assert frame["role"].tolist() == ["a"]  # the ending cannot be read where it is left out
    ids = model.coder.encode(PAIR.clean)
    for column, text in (("clean", ids), ("patched", shortened(ids, 2, 4, [])[0])):
        logprobs = logits_of(hf, text).log_softmax(-1)
        n = len(text)
        expected = sum(float(logprobs[r - 1, text[r]]) for r in (n - 2, n - 1))
        assert frame[column][0] == pytest.approx(expected, abs=1e-5)
    # the token behind the span is predicted from what stands before the span
    next_to_it: Any = interp.leave_out(model, PAIR, "a", metric="seq_logprob", at=4, **QUIET).frame()
    expected = float(logits_of(hf, ids[:2])[-1].log_softmax(-1)[ids[4]])
    assert next_to_it["patched"][0] == pytest.approx(expected, abs=1e-5)


def test_the_last_position_is_that_of_default_and_facts_are_read(tiny: Any) -> None:
    model = tiny("llama")
    before: Any = interp.leave_out(model, PAIR, metric="logit_diff", **QUIET).frame()
    frame: Any = interp.leave_out(model, PAIR, metric="logit_diff", at=["last", 0], **QUIET).frame()
    last = frame[frame["read_at"].isna()]
    assert before["role"].tolist() == last["role"].tolist() == ["a", "end"]
    # also of the one whose end is left out: the last position is that of the last token that remains
    np.testing.assert_allclose(before["patched"], last["patched"], atol=1e-12)
    assert (frame[frame["read_at"] == "0"]["raw"].abs() < 1e-6).all()
    fact = interp.Fact("w3 w4 w5 w6", "w4", "w9")
    of_fact = interp.leave_out(model, fact, metric="prob", at="each", **QUIET).frame()
    assert of_fact["read_at"].tolist() == ["0", "1", "3", "4"] and of_fact["corrupt"].isna().all()


def test_nothing_to_read_is_refused_before_any_forward(tiny: Any, monkeypatch: Any) -> None:
    model = tiny("llama")
    plans = [interp.explain(interp.leave_out, model, PAIR, at=at) for at in ("last", "each")]
    assert plans[0].flops < plans[1].flops
    monkeypatch.setattr(type(model), "forward", lambda *a, **k: pytest.fail("a forward was run"))
    with pytest.raises(PromptError, match="at='a': every number that it asks for needs a token that is left out"):
        interp.leave_out(model, PAIR, "a", at="a", **QUIET)
    with pytest.raises(PromptError, match="names the span 'nowhere'"):
        interp.leave_out(model, PAIR, "a", at="nowhere", **QUIET)
    with pytest.raises(PromptError, match="before the first token"):
        interp.leave_out(model, PAIR, "a", at=0, metric="seq_logprob", **QUIET)
    with pytest.raises(InterpError, match=r"at=1\.5"):
        interp.peek(model, PAIRS, at=1.5, context="keep", **QUIET)  # type: ignore[arg-type]


def test_a_sweep_reads_the_tokens_that_remain(tiny: Any, tmp_path: Any) -> None:
    model, file = tiny("llama"), tmp_path / "pairs.csv"
    file.write_text("clean,corrupt,answer,foil,span:name\nw1 w2 w3 w4,w1 w5 w3 w4,w95,w96,w2 w3\n")
    recipes = [
        {"recipe": "leave_out", "at": ["each"], "metric": "token_kl"},
        {"recipe": "peek", "at": ["name", -1], "context": "keep", "metric": "logprob"},
    ]
    document = {
        "name": "read", "models": [{"name": "tiny", "load": "tiny"}], "recipes": recipes,
        "tasks": [{"name": "own", "pairs": str(file), "require": 0}],
    }  # fmt: skip
    sweep = interp.Sweep(document, tmp_path / "run", models={"tiny": model})
    assert sweep.run().failed == 0
    frames: list[Any] = [effects.frame() for effects in sweep.effects().values()]
    (left_out,) = (f for f in frames if f["component"].iloc[0] == "embed")
    assert sorted(left_out["read_at"]) == ["0", "1", "4"] and left_out["raw"].iloc[-1] > 0
    (peeked,) = (f for f in frames if f["component"].iloc[0] == "resid_post")
    assert sorted(set(peeked["read_at"])) == ["-1", "name[0]", "name[1]"]


# ---------------------------------------------------------------- peeking


def peeking_by_hand(hf: Any, ids: list[int], wait: int, full: int) -> torch.Tensor:
    """Logits of a model in whose layers after ``wait`` tokens see the first one and themselves; the last sees all in
    the ``full`` layers behind it."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    n = len(ids)

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: float, **_: Any) -> Any:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        seen = torch.ones(n, n).tril().bool()
        if module.layer_idx > wait:
            alone = torch.eye(n).bool()
            alone[:, 0] = True
            if module.layer_idx <= wait + full:
                alone[-1] = True
            seen = seen & alone
        p = (q @ k.mT * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
        return (p @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("peeking", attend)
    AttentionMaskInterface.register("peeking", ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    hf.set_attn_implementation("peeking")
    return logits_of(hf, ids)


@pytest.mark.parametrize("engine", ["auto", "naive"])
@pytest.mark.parametrize("family", FAMILIES)
def test_peeking_is_read_at_every_position(word_tokenizer: Any, family: str, engine: Any) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    call: dict[str, Any] = {"full": 1, "context": "keep", "metric": "logprob", "engine": engine, **QUIET}
    frame: Any = interp.peek(model, PAIRS[0], at=["each", "start:mean", "last"], **call).frame()
    answer, ids = token(model, "w95"), model.coder.encode(PAIRS[0].clean)
    for wait in range(model.n_layers):
        expected = peeking_by_hand(hf, ids, wait, full=1).log_softmax(-1)[:, answer].numpy()
        part: Any = frame[frame["layer"] == wait]
        assert part["read_at"].tolist()[: N + 1] == [*map(str, range(N)), "start:mean"]
        np.testing.assert_allclose(part["patched"][:N], expected, atol=1e-5)
        np.testing.assert_allclose(part["patched"].iloc[N:], [expected[1:3].mean(), expected[-1]], atol=1e-5)
    last = interp.peek(model, PAIRS[0], **call).frame()
    np.testing.assert_allclose(last["patched"], frame[frame["read_at"].isna()]["patched"], atol=1e-12)


def test_waiting_with_means_is_read_alike_by_both_engines(tiny: Any) -> None:
    pairs = [interp.PromptPair(f"w{a} w5 w{b} w6 w7", "w8 w5 w9 w6 w7", "w95", "w96") for a in (1, 2) for b in (3, 4)]
    fast, naive = (
        interp.peek(tiny("llama"), pairs, metric="token_kl", at="each", engine=engine, **QUIET).frame()
        for engine in ("fast", "naive")
    )
    np.testing.assert_allclose(fast["patched"], naive["patched"], atol=1e-9)
    assert fast["patched"].max() > 1e-3 and len(fast) == 4 * tiny("llama").n_layers * 6
