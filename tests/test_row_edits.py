"""Rows of attention that an edit overwrites, and gates by head and query; test_edit compares both with hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import AttentionEdit, AttentionMask
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError

IDS = torch.tensor([[5, 9, 3, 7, 2, 11, 4, 8]])
N = IDS.shape[1]


@pytest.fixture(scope="module")
def llama(word_tokenizer: Any) -> interp.Model:
    return interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)


def test_a_distribution_over_spans_gives_the_share_of_the_marked_word() -> None:
    known = interp.zoo.one_head()  # head 2 of layer 1 reads the marked word, and gives the answer a logit of 20
    model, pairs = known.model, known.pairs(6, seed=0)
    mover: Any = {"queries": -1, "layers": 1, "heads": [2]}
    shares = {
        "all": {"marked": 1.0},
        "half": {"marked": 0.5, 0: 0.5},
        "none": {0: 1.0},
        "quarter": {"marked": 0.25, -1: 0.75},
    }
    edits = {name: AttentionEdit(weights=weights, **mover) for name, weights in shares.items()}
    for engine in ("auto", "naive"):
        frame: Any = interp.edit(model, pairs, edits, engine=engine, show_progress=False).frame()
        for name, logit in {"all": 20, "half": 10, "none": 0, "quarter": 5}.items():
            np.testing.assert_allclose(frame[frame["component"] == name]["patched"], logit, atol=1e-4, err_msg=name)


def test_weights_of_a_span_lie_evenly_on_its_tokens(llama: interp.Model) -> None:
    prompt = interp.Prompt("w1 w2 w3 w4 w5", {"middle": (3, 11)})
    n = len(llama.coder.encode(prompt.text))
    by_token = [0.0] * n
    by_token[-4:-1] = [0.2, 0.2, 0.2]
    by_token[-1] = 0.4
    several: Any = ({"middle": 0.6, -1: 0.4}, torch.tensor(by_token), np.array(by_token), tuple(by_token))
    rows = []
    for weights in several:
        with llama.edited(AttentionEdit(queries=-1, heads=[1], weights=weights)):
            rows.append(llama.attention_patterns(prompt).map("L1H1")[-1])  # of the kernel, rounded to 8 bits
    for row in rows:
        np.testing.assert_allclose(row, by_token, atol=0.005)


@pytest.mark.parametrize("engine", ["auto", "naive"])
def test_gates_that_are_equal_are_one_gate_to_the_bit(llama: interp.Model, engine: Any) -> None:
    pair = interp.PromptPair("w1 w2 w3 w4", "w5 w2 w3 w4", "w95", "w96")
    n = len(llama.coder.encode(pair.clean))
    same = torch.full((4, n), 0.3, dtype=torch.float64)  # as the model
    values: Any = {"number": 0.3, "heads": same[:, 0], "list": [0.3] * 4, "queries": same, "array": same.numpy()}
    edits = {name: AttentionEdit(gate=gate, heads=[0, 2]) for name, gate in values.items()}
    frame: Any = interp.edit(llama, pair, edits, engine=engine, show_progress=False).frame()
    assert frame["patched"].nunique() == 1 and (frame["raw"] != 0).all()
    outputs = []
    for edit in edits.values():
        with llama.edited(edit):
            llama.attention_stats(pair.clean)
            outputs.append(llama(torch.tensor([llama.coder.encode(pair.clean)])))
    assert all(torch.equal(x, outputs[0]) for x in outputs)


def test_gates_of_queries_stand_in_the_order_of_the_prompt(llama: interp.Model) -> None:
    gates = torch.rand(4, 2)
    with llama.edited(AttentionEdit(queries=[-1, 2], gate=gates, layers=1)):
        together = llama(IDS)
    single = [
        AttentionEdit(queries=q, heads=[h], gate=float(gates[h, i]), layers=1)
        for h in range(4)
        for i, q in enumerate((2, -1))
    ]
    with llama.edited(*single):
        torch.testing.assert_close(llama(IDS), together)


@pytest.mark.parametrize("engine", ["auto", "naive"])
def test_weights_on_keys_that_are_not_seen_are_refused(word_tokenizer: Any, engine: Any) -> None:
    pair = interp.PromptPair("w1 w2 w3 w4 w5 w6 w7 w8", "w9 w2 w3 w4 w5 w6 w7 w8", "w95", "w96", {"last": (21, 23)})
    mistral = interp.load(tiny_hf("mistral"), tokenizer=word_tokenizer)  # a window of 5
    first = AttentionEdit(queries=-1, weights={1: 1.0})
    closed = [AttentionMask(close=[(-1, 1)], window=99), first]
    for edits in (first, closed, AttentionEdit(weights={"last": 1.0})):
        with pytest.raises(InterpError, match=r"layer \d: the edit .* puts weight on the key .* does not see"):
            interp.edit(mistral, pair, {"a": edits}, engine=engine, show_progress=False)
    opened = [AttentionMask(open=[(2, "last")]), AttentionEdit(queries=2, weights={"last": 1.0})]
    frame = interp.edit(mistral, pair, {"a": opened}, engine=engine, show_progress=False).frame()
    assert bool((frame["raw"] != 0).all())
    with mistral.edited(first), pytest.raises(InterpError, match="puts weight on the key"):
        mistral(torch.tensor([mistral.coder.encode(pair.clean)]))


def test_later_keys_are_refused_before_a_forward(llama: interp.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(llama), "forward", lambda *_: pytest.fail("a forward was run"))
    pair = interp.PromptPair("w1 w2 w3", "w5 w2 w3", "w95", "w96")
    wrong: Any = (
        ({"weights": {2: 1.0}}, "at position 2, which the query at position 0 does not see"),
        ({"weights": [0.5, 0.5]}, "has 2 numbers, one for each token"),
        ({"gate": torch.ones(3)}, "one for each head of a layer first"),
        ({"gate": torch.ones(4, 2)}, r"\[heads of the layer, queries\], and the edit has"),
        ({"weights": {"name": 1.0}}, "names the span 'name'"),
    )
    for fields, message in wrong:
        with pytest.raises(InterpError, match=message):
            interp.edit(llama, pair, AttentionEdit(**fields), show_progress=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": {"a": 0.4}}, "sum to 0.4"),
        ({"weights": [1.5, -0.5]}, "the smallest is -0.5"),
        ({"weights": []}, "sum to 0"),
        ({"weights": "a"}, "numbers by position or span expected"),
        ({"weights": {1.5: 1.0}}, "numbers by position or span expected"),
        ({"weights": torch.ones(1, 1)}, "numbers by position or span expected"),
        ({"weights": [float("nan")]}, "sum to nan"),
        ({"weights": {0: 1.0}, "gain": 2.0}, "gain would have no effect"),
        ({"weights": {0: 1.0}, "keys": 0}, "act on whole rows"),
        ({"gate": torch.ones(1, 1, 1)}, r"has shape \[1, 1, 1\]"),
        ({"gate": ["a"]}, "a number, or a tensor"),
        ({"gate": [1.0, float("inf")]}, "finite numbers expected"),
        ({"gate": torch.ones(4, 2), "phase": "decoding"}, "belong to tokens of the prompt"),
    ],
)
def test_bad_weights_and_gates_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(InterpError, match=message):
        AttentionEdit(**fields)


def test_two_changes_of_one_rows_weights_are_refused(llama: interp.Model) -> None:
    pair = interp.PromptPair("w1 w2 w3", "w5 w2 w3", "w95", "w96")
    overwritten, sharper = AttentionEdit(queries=-1, weights={0: 1.0}), AttentionEdit(temperature=0.5)
    for engine in ("auto", "naive"):
        with pytest.raises(InterpError, match="two edits change the weights, which one of them overwrites"):
            interp.edit(llama, pair, {"both": [overwritten, sharper]}, engine=engine, show_progress=False)
        with pytest.raises(InterpError, match="two edits overwrite the weights"):
            interp.edit(llama, pair, {"both": [overwritten, overwritten]}, engine=engine, show_progress=False)
    parted = [overwritten, AttentionEdit(queries=[0, 1], temperature=0.5), AttentionEdit(gate=0.5)]
    assert len(interp.edit(llama, pair, {"parted": parted}, show_progress=False).frame()) == 1


@torch.no_grad()
def test_rows_of_decoded_tokens(llama: interp.Model) -> None:
    hf: Any = llama.bridge.original_model
    hf.generation_config.eos_token_id = None
    options: Any = {"max_new_tokens": 4, "do_sample": False, "output_scores": True, "pad_token_id": 1,
                    "return_dict_in_generate": True, "attention_mask": torch.ones_like(IDS)}  # fmt: skip
    plain = hf.generate(IDS, **options)
    with llama.edited(AttentionEdit(weights={0: 1.0}, layers=1)):  # all rows, those of decoded tokens too
        edited = hf.generate(IDS, **options)
        whole = hf(edited.sequences[:, :-1]).logits[0, N - 1 :]
        torch.testing.assert_close(torch.cat(edited.scores), whole.float(), atol=1e-5, rtol=1e-5)
    with llama.edited(AttentionEdit(gate=torch.zeros(4, N), layers=1)):
        gated = hf.generate(IDS, **options)
    with llama.edited(AttentionEdit(gate=0.0, layers=1, phase="prompt")):
        torch.testing.assert_close(torch.cat(gated.scores), torch.cat(hf.generate(IDS, **options).scores))
    with llama.edited(AttentionEdit(weights={2: 1.0}, phase="decoding")):
        decoding = hf.generate(IDS, **options)
    assert torch.equal(decoding.scores[0], plain.scores[0]) and not torch.equal(decoding.scores[1], plain.scores[1])


@pytest.mark.parametrize("text", ["queries=-1 weights=S1=0.5,-4=0.5", "heads=L1H2 weights=0=1"])
def test_text_is_read_back(text: str) -> None:
    assert AttentionEdit.parse(text).text == text
    by_token = AttentionEdit(weights=[0.0, 0.25, 0.75])
    assert by_token.text == "weights=1=0.25,2=0.75"
    assert str(by_token) == "sets weights to 0.25 on 1, 0.75 on 2; queries all; layers all, heads all"


def test_gates_of_zeros_are_the_ablation_and_gates_of_ones_nothing(llama: interp.Model) -> None:
    pair = interp.PromptPair("w1 w2 w3 w4", "w5 w2 w3 w4", "w95", "w96")
    n = len(llama.coder.encode(pair.clean))
    ablated = interp.ablate(llama, pair, "z.L1H2", using="zero", show_progress=False).frame()["patched"].item()
    for gates in (0.0, torch.zeros(4), torch.zeros(4, n)):
        edit = AttentionEdit(gate=gates, heads=[2], layers=1)
        frame = interp.edit(llama, pair, edit, show_progress=False).frame()
        assert frame["patched"].item() == ablated
        neutral = AttentionEdit(gate=torch.as_tensor(gates) + 1)
        assert interp.edit(llama, pair, neutral, show_progress=False).frame()["raw"].item() == 0
        later = [edit, interp.Write("z.L1H2", add=1.0)]  # a write to z acts after the gate
        numbers = [
            interp.edit(llama, pair, {"a": changes}, engine=engine, show_progress=False).frame()["patched"].item()
            for changes in (later, interp.Write("z.L1H2", set=1.0))
            for engine in ("auto", "naive")
        ]
        np.testing.assert_allclose(numbers, numbers[0], atol=1e-6)
