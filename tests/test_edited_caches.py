"""Edits and masks of decoding: nested blocks, and caches that drop keys or hold rows that are not used yet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import interp
from interp import AttentionEdit, AttentionMask
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError

IDS = torch.tensor([[5, 9, 3, 7, 2, 11, 4, 8]])
N = IDS.shape[1]
OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "pad_token_id": 1,
                           "return_dict_in_generate": True}  # fmt: skip


def loaded(family: str) -> tuple[interp.Model, Any]:
    model = interp.load(tiny_hf(family), tokenizer=False)
    model.bridge.original_model.generation_config.eos_token_id = None
    return model, model.bridge.original_model


@pytest.fixture(scope="module")
def llama() -> tuple[interp.Model, Any]:
    return loaded("llama")


@pytest.fixture(scope="module")
def mistral() -> tuple[interp.Model, Any]:
    """Its window is 5 tokens, so that its cache drops keys of the prompt."""
    return loaded("mistral")


@torch.no_grad()
def test_nested_blocks_decode_with_a_cache(llama: Any) -> None:
    model, hf = llama
    with model.edited(AttentionEdit(keys=[2, 5], gain=0.2)), model.edited(AttentionEdit(keys=3, bias=2.0)):
        nested = hf.generate(IDS, **OPTIONS)
    with model.edited(AttentionEdit(keys=[2, 5], gain=0.2), AttentionEdit(keys=3, bias=2.0)):
        whole = hf(nested.sequences[:, :-1], use_cache=False).logits[0, N - 1 :]
    torch.testing.assert_close(torch.cat(nested.scores), whole.float(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_generated_tokens_are_in_the_last_segment(llama: Any) -> None:
    model, hf = llama
    with model.edited(AttentionMask(segments=[[0, 1, 2], [3, 4, 5, 6], [7]], sees=[(2, 1)])):
        decoded = hf.generate(IDS, **OPTIONS)
    n = N + OPTIONS["max_new_tokens"] - 1
    segment = torch.tensor([0] * 3 + [1] * 4 + [2] * (n - 7))
    query, key = segment[:, None], segment[None]
    visible = torch.ones(n, n).tril().bool() & ((query == key) | ((query == 2) & (key == 1)))
    untouched = tiny_hf("llama")
    mask = torch.zeros(1, 1, n, n, dtype=untouched.dtype).masked_fill(~visible, torch.finfo(untouched.dtype).min)
    whole = untouched(decoded.sequences[:, :-1], attention_mask=mask).logits[0, N - 1 :]
    torch.testing.assert_close(torch.cat(decoded.scores), whole.float(), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_hooked_layer_has_the_same_edits_after_its_cache_has_slid(mistral: Any) -> None:
    model, hf = mistral
    hooked = [(f"blocks.{layer}.attn.hook_pattern", lambda x, hook: x) for layer in range(model.n_layers)]
    with model.edited(AttentionEdit(keys=6, bias=2.0), AttentionEdit(keys=[5, 7], gain=0.2)):
        fused = hf.generate(IDS, **OPTIONS)
        with model.bridge.hooks(fwd_hooks=hooked):
            dense = hf.generate(IDS, **OPTIONS)
    torch.testing.assert_close(torch.cat(dense.scores), torch.cat(fused.scores), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mask", [
    AttentionMask(open=[(None, [0])]), AttentionMask(window=7), AttentionMask(prefix=[0, 1, 7], open=[(None, 1)]),
])  # fmt: skip
@torch.no_grad()
def test_keys_that_a_cache_has_dropped_cannot_be_opened(mistral: Any, mask: AttentionMask) -> None:
    model, hf = mistral
    with model.edited(mask):
        with pytest.raises(InterpError, match=r"dropped the keys before .*use_cache=False"):
            hf.generate(IDS, **OPTIONS)
        hf.generate(IDS, use_cache=False, **OPTIONS)


@pytest.mark.parametrize("mask", [
    AttentionMask(close=[(None, [6, 7])]), AttentionMask(window=3), AttentionMask(segments=[range(6), [6, 7]]),
    AttentionMask(stride=2),
])  # fmt: skip
@torch.no_grad()
def test_masks_that_hide_are_exact_in_a_sliding_cache(mistral: Any, mask: AttentionMask) -> None:
    model, hf = mistral
    n = N + OPTIONS["max_new_tokens"] - 1
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    segment = (torch.arange(n) >= 6).long()
    hidden = {
        "close": (key == 6) | (key == 7), "window": query - key >= 3, "segments": segment[:, None] != segment[None],
        "stride": (query - key) % 2 != 0,
    }[mask.changes[0]]  # fmt: skip
    visible = (key <= query) & (query - key < 5) & ~hidden
    untouched = tiny_hf("mistral")
    by_hand = torch.zeros(1, 1, n, n, dtype=untouched.dtype).masked_fill(~visible, torch.finfo(untouched.dtype).min)
    with model.edited(mask):
        decoded = hf.generate(IDS, **OPTIONS)
    whole = untouched(decoded.sequences[:, :-1], attention_mask=by_hand).logits[0]
    torch.testing.assert_close(torch.cat(decoded.scores), whole[N - 1 :].float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("change", [
    AttentionEdit(queries=[3, 7], keys=2, bias=4.0), AttentionMask(close=[([6, 7], [1])]), AttentionMask(window=3),
])  # fmt: skip
def test_a_cache_of_fixed_size_is_refused(llama: Any, change: Any) -> None:
    model, hf = llama
    with model.edited(change), pytest.raises(InterpError, match="its cache of keys has a fixed size"):
        hf.generate(IDS, cache_implementation="static", **OPTIONS)


def test_masks_of_a_sliding_cache_with_padding_are_refused(mistral: Any) -> None:
    model, hf = mistral
    ids = torch.cat([torch.cat([torch.ones(1, 3).long(), IDS[:, :5]], 1), IDS])
    padding = (torch.arange(N)[None] >= torch.tensor([[3], [0]])).long()
    with (
        model.edited(AttentionMask(segments=[[0, 1, 2, 3], [4]])),
        pytest.raises(InterpError, match="has dropped padded keys, so attention masks"),
    ):
        hf.generate(ids, attention_mask=padding, **OPTIONS)


@torch.no_grad()
def test_a_mask_opens_what_the_callers_own_mask_hides(llama: Any) -> None:
    model, hf = llama
    causal = torch.ones(N, N).tril().bool()
    opened = causal.clone()
    opened[1:3, 4:6] = True
    untouched = tiny_hf("llama")
    dense = [torch.zeros(1, 1, N, N, dtype=hf.dtype).masked_fill(~x, torch.finfo(hf.dtype).min)
             for x in (causal, opened)]  # fmt: skip
    with model.edited(AttentionMask(open=[([1, 2], [4, 5])])):
        ours = hf(IDS, attention_mask=dense[0]).logits
    torch.testing.assert_close(ours, untouched(IDS, attention_mask=dense[1]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", ["use_split_qkv_input", "use_attn_in"])
@pytest.mark.parametrize("change", [AttentionEdit(gate=0.0), AttentionMask(window=2)])
def test_attention_that_edits_do_not_reach_is_refused(llama: Any, option: str, change: Any) -> None:
    model, _ = llama
    switch = getattr(model.bridge, f"set_{option}")
    switch(True)
    try:
        with model.edited(change), pytest.raises(InterpError, match="do not reach attention whose heads have inputs"):
            model(IDS)
    finally:
        switch(False)
