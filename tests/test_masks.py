"""Attention masks of a model, against a 4-D mask handed to an untouched Hugging Face model."""

from __future__ import annotations

import pytest
import torch

import interp
from interp import AttentionMask
from interp.doctor.families.text import tiny_hf

IDS = [[5, 9, 3, 7, 2, 11, 4, 8]]
N = len(IDS[0])
Q, K = torch.arange(N)[:, None], torch.arange(N)[None]  # query, key
CAUSAL = K <= Q
HALVES = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
SAME_HALF = HALVES[:, None] == HALVES
CASES = {
    "open later keys": (AttentionMask(open=[([1, 2], [4, 5])]), CAUSAL | ((Q >= 1) & (Q <= 2) & (K >= 4) & (K <= 5))),
    "close": (AttentionMask(close=[(range(5, 8), [0, 2])]), CAUSAL & ~((Q >= 5) & ((K == 0) | (K == 2)))),
    "prefix": (AttentionMask(prefix=range(4)), CAUSAL | ((Q < 4) & (K < 4))),
    "blocks": (AttentionMask(blocks=3), CAUSAL | (Q // 3 == K // 3)),
    "segments": (AttentionMask(segments=[range(4), range(4, 8)]), CAUSAL & SAME_HALF),
    "numbers": (AttentionMask(segments=HALVES.tolist()), CAUSAL & SAME_HALF),
    "sees": (AttentionMask(segments=HALVES.tolist(), sees=[(1, 0)]), CAUSAL),
    "window": (AttentionMask(window=3), CAUSAL & (Q - K < 3)),
    "stride": (AttentionMask(stride=3), CAUSAL & ((Q - K) % 3 == 0)),
    "stride with a window": (AttentionMask(stride=3, window=2), CAUSAL & (((Q - K) % 3 == 0) | (Q - K < 2))),
    "sinks under a window": (
        AttentionMask(window=2, open=[(None, [0, 1, 2])]), CAUSAL & ((Q - K < 2) | (K < 3)),
    ),
    "middle sinks": (AttentionMask(window=2, open=[(None, [1, 2])]), CAUSAL & ((Q - K < 2) | (K == 1) | (K == 2))),
    "one layer": (AttentionMask(prefix=range(4), layers=0), CAUSAL),
}  # fmt: skip


def all_logits(model: interp.Model) -> torch.Tensor:
    with torch.no_grad():
        return model.bridge.original_model(input_ids=torch.tensor(IDS)).logits


def logits_by_hand(hf, visible: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(1, 1, N, N).masked_fill(~visible, torch.finfo(torch.float32).min)
    with torch.no_grad():
        return hf(input_ids=torch.tensor(IDS), attention_mask=mask).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox"])
def test_every_rule_equals_a_mask_handed_to_an_untouched_model(word_tokenizer, family: str) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    hf.set_attn_implementation("eager")
    for name, (mask, visible) in CASES.items():
        if name == "one layer":
            continue
        with model.edited(mask):
            ours = all_logits(model)
        torch.testing.assert_close(ours, logits_by_hand(hf, visible), atol=1e-5, rtol=0, msg=f"{family} {name}")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_stays_hidden(word_tokenizer, side: str) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    pad, real = [1, 1], [1] * N
    ids = [*pad, *IDS[0]] if side == "left" else [*IDS[0], *pad]
    padding = [0, 0, *real] if side == "left" else [*real, 0, 0]
    rows = slice(2, None) if side == "left" else slice(0, N)
    positions = torch.arange(N + 2)[None] - (2 if side == "left" else 0)
    for name, (mask, _) in CASES.items():
        with model.edited(mask), torch.no_grad():
            alone = all_logits(model)[0]
            padded = model.bridge.original_model(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.tensor([padding]),
                position_ids=positions.clamp(min=0),
            ).logits[0, rows]
        torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("mask", [
    AttentionMask(window=N), AttentionMask(blocks=1), AttentionMask(open=[(range(4, 8), range(4))]),
    AttentionMask(segments=[range(8)]), AttentionMask(open=[(None, [0, 1, 2])]), AttentionMask(stride=1),
    AttentionMask(close=[([0, 1], [5, 6])]),
])  # fmt: skip
def test_a_mask_equal_to_the_models_own_changes_no_bit(word_tokenizer, mask: AttentionMask) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    plain = all_logits(model)
    with model.edited(mask):
        assert torch.equal(all_logits(model), plain)


def test_a_query_that_sees_no_key_gives_zero(word_tokenizer) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    with model.edited(AttentionMask(close=[([3], None)])):
        _, cache = model.run_with_cache(torch.tensor(IDS))
    assert not cache["blocks.0.attn.hook_z"][0, 3].any()
    assert cache["blocks.0.attn.hook_z"][0, 4].any()


def test_a_patch_under_a_mask_that_opens_the_future_is_that_of_full_forwards(word_tokenizer) -> None:
    model = interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    pair = interp.PromptPair("w1 w5 w2 w6 w7 w2", "w1 w5 w2 w6 w9 w2", "w95", "w96")
    sites = model.sites("z")
    with model.edited(AttentionMask(open=[([1], [5])])):
        auto = interp.patch(model, pair, sites, show_progress=False).frame()
        naive = interp.patch(model, pair, sites, engine="naive", show_progress=False).frame()
    assert auto["raw"].tolist() == naive["raw"].tolist()
    assert (auto["raw"].abs() > 0).any()


@pytest.mark.parametrize("text", [
    "open=image>question,*>0+1 layers=0-3", "segments=doc1,doc2,0-3 sees=1>0", "segments=0/0/1/1 window=4",
    "prefix=image future=true open=*>1", "blocks=4 stride=2", "close=a:last>*",
])  # fmt: skip
def test_text_is_read_back(text: str) -> None:
    mask = AttentionMask.parse(text)
    assert AttentionMask.parse(mask.text).text == mask.text
    assert str(mask).endswith("layers 0–3" if "layers" in text else "layers all")


@pytest.mark.parametrize(("fields", "message"), [
    ({}, "changes nothing"), ({"window": 0}, "at least 1"), ({"open": "image"}, "pairs"),
    ({"sees": [(0, 1)], "window": 2}, "segments= is not set"), ({"segments": [0, "a"]}, "either spans"),
    ({"segments": ["a", "b"], "sees": [(0, 2)]}, "0 to 1"), ({"window": 2, "future": True}, "future"),
])  # fmt: skip
def test_bad_masks_are_refused(fields, message: str) -> None:
    with pytest.raises(interp.InterpError, match=message):
        AttentionMask(**fields)
