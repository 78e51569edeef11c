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


BY_NUMBER = {  # what an edit of a prompt of N tokens is in a forward of N tokens and the decoded ones
    "last query": (AttentionEdit(queries=-1, keys=1, bias=3.0), AttentionEdit(queries=N - 1, keys=1, bias=3.0)),
    "last key": (AttentionEdit(keys=-1, bias=3.0), AttentionEdit(keys=N - 1, bias=3.0)),
    "prompt": (AttentionEdit(counterfactual="uniform", phase="prompt"),
               AttentionEdit(counterfactual="uniform", queries=range(N))),
    "decoding": (AttentionEdit(keys=2, knockout=True, phase="decoding"),
                 AttentionEdit(keys=2, knockout=True, queries=[*range(N, N + 7)])),
    "last hidden": (AttentionMask(close=[(None, -1)]), AttentionMask(close=[(None, N - 1)])),
}  # fmt: skip


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", BY_NUMBER)
@torch.no_grad()
def test_edits_of_a_prompt_keep_its_tokens_while_others_are_decoded(llama: Any, name: str, use_cache: bool) -> None:
    model, hf = llama
    of_prompt, by_number = BY_NUMBER[name]
    left_padded = torch.cat([torch.cat([torch.ones(1, 2).long(), IDS + 1], 1), torch.cat([IDS, IDS[:, :2]], 1)])
    mask = torch.ones_like(left_padded)
    mask[0, :2] = 0
    with model.edited(of_prompt):
        decoded = hf.generate(IDS, use_cache=use_cache, **OPTIONS)
        alone = hf.generate(IDS + 1, use_cache=use_cache, **OPTIONS)
        padded = hf.generate(left_padded, attention_mask=mask, use_cache=use_cache, **OPTIONS)
        beams = [hf.generate(IDS, use_cache=x, num_beams=3, max_new_tokens=4, pad_token_id=1) for x in (True, False)]
    with model.edited(by_number):
        whole = hf(decoded.sequences[:, :-1], use_cache=False).logits[0, N - 1 :]
    torch.testing.assert_close(torch.cat(decoded.scores), whole.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.stack(padded.scores)[:, 0], torch.cat(alone.scores), atol=1e-5, rtol=1e-5)
    assert torch.equal(*beams)


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_the_bridge_generates_under_the_same_edits(word_tokenizer: Any, use_cache: bool) -> None:
    model = interp.load(tiny_hf("gpt2"), tokenizer=word_tokenizer)
    bridge: Any = model.bridge
    hf = bridge.original_model
    plain: Any = {"max_new_tokens": 8, "do_sample": False}
    own = {**plain, "use_past_kv_cache": use_cache, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    with model.edited(BY_NUMBER["last query"][0], BY_NUMBER["decoding"][0]):
        theirs = hf.generate(IDS, eos_token_id=None, pad_token_id=1, **plain)
        assert torch.equal(bridge.generate(IDS, **own), theirs)
        assert torch.equal(torch.cat(list(bridge.generate_stream(IDS, **own)), 1)[:, -8:], theirs[:, -8:])
        again = model(theirs[:, :10])  # a prompt of its own: the generations are over
    assert "generate" not in vars(hf) and "generate" not in vars(bridge)
    with model.edited(BY_NUMBER["last query"][0], BY_NUMBER["decoding"][0]):
        torch.testing.assert_close(model(theirs[:, :10]), again, atol=0, rtol=0)
    assert not torch.equal(theirs, hf.generate(IDS, eos_token_id=None, pad_token_id=1, **plain))


@torch.no_grad()
def test_decoding_is_refused_where_every_token_changes_the_weights(llama: Any) -> None:
    model, hf = llama
    for name in ("uniform", "random"):
        fields: Any = {"counterfactual": name, "renormalise": False}
        for use_cache in (True, False):
            with model.edited(AttentionEdit(**fields)), pytest.raises(InterpError, match="grows with every decoded"):
                hf.generate(IDS, use_cache=use_cache, **OPTIONS)
        with model.edited(AttentionEdit(**fields, phase="prompt")):
            hf.generate(IDS, **OPTIONS)


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


@torch.no_grad()
def test_a_part_of_the_model_called_alone_is_refused(llama: Any) -> None:
    model, hf = llama
    with model.edited(AttentionEdit(queries=-1, gate=0.0)):
        model(IDS)
        with pytest.raises(InterpError, match=r"has read 0\. A part of the model that is called alone"):
            hf.model(IDS[:, :4])  # as many rows as the forward before
        with (
            pytest.raises(ZeroDivisionError),
            model.bridge.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: 1 / 0)]),
        ):
            model(IDS)
        with pytest.raises(InterpError, match="called alone"):
            hf.model(IDS)
