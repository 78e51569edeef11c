"""Routing attention through headstats changes nothing but who computes it."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
import torch
import transformers
from architectures import ARCHITECTURES
from headstats import STATISTICS, StatSpec

import interp
from interp.doctor.families.text import FAMILIES, tiny_hf
from interp.engine import Engine
from interp.errors import ModelError
from interp.model import bridge_adapters as adapters
from interp.results.attention_stats import KEY_STATISTICS

# transformers' eager attention rounds its softmax to float32 even in float64 models; logits here are of order 10.
EAGER = {"atol": 2e-5, "rtol": 1e-5}

PROMPT = "When John and Mary went to the store, John gave a drink to"


def eager_logits(kind: str, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return tiny_hf(kind)(**inputs).logits


def tokens(batch: int = 3, length: int = 11) -> torch.Tensor:
    return torch.randint(2, 100, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_equal_eager(tiny, kind: str) -> None:
    model = tiny(kind)
    torch.testing.assert_close(model(tokens()), eager_logits(kind, input_ids=tokens()), **EAGER)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_eager_at_real_tokens(word_tokenizer, kind: str, side: str) -> None:
    """In float32: transformers' eager float64 mask overflows its float32 softmax on padded rows."""
    real = torch.ones(3, 11, dtype=torch.long)
    for row, pad in enumerate((0, 3, 7)):
        real[row, slice(0, pad) if side == "left" else slice(11 - pad, 11)] = 0
    inputs = {
        "input_ids": tokens(),
        "attention_mask": real,
        "position_ids": (real.cumsum(-1) - 1).clamp(min=0),
    }
    model = interp.load(tiny_hf(kind, torch.float32), tokenizer=word_tokenizer)
    with torch.no_grad():
        theirs = tiny_hf(kind, torch.float32)(**inputs).logits[real.bool()]
        ours = model.bridge.original_model(**inputs).logits[real.bool()]
        unpadded = model.bridge.original_model(**{**inputs, "attention_mask": None}).logits[real.bool()]
    scale = theirs.abs().max().item()
    assert (ours - theirs).abs().max() < 1e-4 * scale
    if side == "left":  # negative control: without its mask, padding is attended to (on the right causality hides it)
        assert (unpadded - theirs).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_incremental_decoding_equals_one_forward(tiny, kind: str) -> None:
    model, ids = tiny(kind), tokens(2, 9)
    expected = eager_logits(kind, input_ids=ids)
    if FAMILIES[kind].kind == "hybrid":  # recurrent layers may step otherwise than they scan: Bamba's differ by half
        expected = incremental(tiny_hf(kind), ids)
    torch.testing.assert_close(incremental(model.bridge.original_model, ids), expected, **EAGER)


@torch.no_grad()
def incremental(model, ids: torch.Tensor) -> torch.Tensor:
    from transformers import DynamicCache

    cache = DynamicCache(config=getattr(model, "config", None) or model.bridge.original_model.config)
    pieces = [ids[:, :4], *(ids[:, i : i + 1] for i in range(4, ids.shape[1]))]
    outputs = [model(piece, past_key_values=cache, use_cache=True) for piece in pieces]
    return torch.cat([getattr(out, "logits", out) for out in outputs], 1)


# On these TransformerLens fires the scores and pattern hooks after the fact: scores hold the pattern, edits are lost.
FIRED_AFTERWARDS = ("gpt_neo", "gptj", "opt", "opt_post_norm", "jamba", "phimoe")


def untouched_bridge(kind: str, word_tokenizer):
    from transformer_lens.model_bridge import TransformerBridge

    word_tokenizer.init_kwargs.update(name_or_path="", add_bos_token=True)
    hf = tiny_hf(kind)
    adapters.register()
    adapters.repair(hf)
    return TransformerBridge.boot_transformers(
        kind, hf_model=hf, tokenizer=word_tokenizer, device="cpu", dtype=hf.dtype
    )


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_hook_that_transformer_lens_fires_fires_with_the_same_value(tiny, word_tokenizer, kind: str) -> None:
    theirs = untouched_bridge(kind, word_tokenizer)
    _, expected = theirs.run_with_cache(tokens(), return_cache_object=False)
    _, got = tiny(kind).bridge.run_with_cache(tokens(), return_cache_object=False)
    causal = torch.ones(11, 11, dtype=torch.bool).tril()
    missing = set(expected) - set(got)
    # TransformerLens re-fires these two after the fact on models that it does not re-implement
    assert not missing, missing
    for name, value in expected.items():
        if not isinstance(value, torch.Tensor) or value.dtype == torch.bool:
            continue
        ours = got[name]
        if kind in FIRED_AFTERWARDS and name.endswith("hook_attn_scores"):
            continue
        if name.endswith("hook_attn_scores"):  # masked cells hold "very negative", whose value is a convention
            value, ours = (x.masked_fill(~causal | (x < -1e30), 0) for x in (value, ours))
        torch.testing.assert_close(ours.double(), value.double(), **EAGER, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("hook", ["attn_scores", "pattern", "z", "v"])
def test_edits_take_effect_as_in_transformer_lens(tiny, word_tokenizer, kind: str, hook: str) -> None:
    name = f"blocks.1.attn.hook_{hook}"

    def edit(x: torch.Tensor, hook) -> torch.Tensor:
        x = x.clone()
        x[:, 1] = x[:, 1] * 0.5
        return x

    reference, same = (name, edit)
    if kind in FIRED_AFTERWARDS and hook in ("attn_scores", "pattern"):
        # halving a head's scores is halving its queries; halving its pattern is halving its output
        reference = f"blocks.1.attn.hook_{'q' if hook == 'attn_scores' else 'z'}"

        def same(x: torch.Tensor, hook) -> torch.Tensor:
            x = x.clone()
            x[:, :, 1] = x[:, :, 1] * 0.5
            return x

    theirs = untouched_bridge(kind, word_tokenizer).run_with_hooks(tokens(), fwd_hooks=[(reference, same)])
    model = tiny(kind)
    ours = model.bridge.run_with_hooks(tokens(), fwd_hooks=[(name, edit)])
    assert (ours - model(tokens())).abs().max() > 1e-6
    torch.testing.assert_close(ours, theirs, **EAGER)


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("dense", [False, True])
def test_gradients_equal_eager(tiny, kind: str, dense: bool) -> None:
    """Gradients with respect to the token embedding, with and without a hooked (dense) layer."""
    theirs, ours = tiny_hf(kind), tiny(kind)
    ids = tokens(2, 8)
    theirs(ids).logits[:, -1].logsumexp(-1).sum().backward()
    expected = theirs.get_input_embeddings().weight.grad
    weight = ours.bridge.original_model.get_input_embeddings().weight
    weight.grad = None
    hooks = [("blocks.1.attn.hook_pattern", lambda x, hook: x)] if dense else []
    with ours.bridge.hooks(fwd_hooks=hooks):
        ours(ids)[:, -1].logsumexp(-1).sum().backward()
    torch.testing.assert_close(weight.grad, expected, **EAGER)
    ours.bridge.zero_grad()


def test_only_the_hooked_layer_goes_dense_and_is_reported(tiny) -> None:
    model = tiny("llama")
    model.instrument.layers.clear()
    model.bridge.run_with_hooks(tokens(), fwd_hooks=[("blocks.1.attn.hook_pattern", lambda x, hook: None)])
    report = model.backend_report().set_index("layer")
    assert report.loc[1, "backend"] == "dense ×1" and "hook_pattern" in report.loc[1, "dense_because"]
    assert "dense" not in report.loc[0, "backend"] and report.loc[0, "dense_because"] == ""
    assert (report["calls"] == 1).all()


def test_the_report_says_why_the_latest_call_was_dense(tiny, monkeypatch) -> None:
    monkeypatch.setattr("interp.model.apply_masks.SMALL_TABLE", 1)  # no rule is small enough for the kernel
    monkeypatch.setattr("interp.model.apply_masks.LARGEST_SHARE", 0)
    model = tiny("llama")
    hook = ("blocks.1.attn.hook_pattern", lambda x, hook: None)
    outer = interp.AttentionMask(close=[(-1, 0)], layers=1)
    inner = interp.AttentionMask(open=[(0, 1)], layers=1)

    def why() -> list[str]:
        return [re.sub(r" \(it treats .*? own way\)", "", x) for x in model.backend_report()["dense_because"]][:2]

    model(tokens())
    assert why() == ["", ""]
    with model.edited(outer):
        model(tokens())
        assert why() == ["", f"attention mask: {outer}"]
        with model.edited(inner):
            model.bridge.run_with_hooks(tokens(), fwd_hooks=[hook])
            assert why() == ["", f"attention mask: {outer}; {inner}; hook_pattern hooked"]
        model(tokens())
        assert why() == ["", f"attention mask: {outer}"]
    with pytest.raises(ZeroDivisionError), model.edited(inner):
        model(tokens())
        raise ZeroDivisionError
    stats = model.attention_stats("w1 w2 w3")  # as all of the model's earlier calls of layer 1 were not
    assert why() == ["", ""] and "dense" not in stats.backends[1]
    with model.edited(interp.AttentionMask(window=2, layers=1)):
        model(tokens())
    assert why() == ["", ""]  # the kernel has windows


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_per_head_results_sum_to_the_attention_output(tiny, kind: str) -> None:
    model = tiny(kind)
    model.bridge.set_use_attn_result(True)
    try:
        logits, cache = model.bridge.run_with_cache(
            tokens(), names_filter=lambda n: "hook_result" in n or "attn_out" in n
        )
    finally:
        model.bridge.set_use_attn_result(False)
    bias = getattr(model.bridge.blocks[1].attn, "b_O", None)
    total = cache["blocks.1.attn.hook_result"].sum(2) + (0 if bias is None else bias)
    torch.testing.assert_close(total, cache["blocks.1.hook_attn_out"], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(logits, model(tokens()), atol=1e-9, rtol=1e-9)


def test_default_cache_leaves_the_square_tensors_out_and_says_so_once(tiny, caplog) -> None:
    model = tiny("llama")
    model._has_warned_about_cache = False
    model.instrument.layers.clear()
    with caplog.at_level(logging.WARNING, "interp"):
        _, cache = model.run_with_cache(tokens())
        model.run_with_cache(tokens())
    assert not [k for k in cache if k.endswith(("hook_pattern", "hook_attn_scores"))]
    assert "blocks.0.attn.hook_z" in cache and len(caplog.records) == 1
    assert not model.backend_report()["backend"].str.contains("dense").any()
    _, asked = model.run_with_cache(tokens(), names_filter="blocks.1.attn.hook_pattern")
    assert list(asked) == ["blocks.1.attn.hook_pattern"]


def test_every_statistic_of_keys_is_known_as_one():
    assert list(KEY_STATISTICS) == [s.name for s in STATISTICS if s.axis == "key"]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_statistics_equal_those_of_the_dense_pattern(tiny, kind: str) -> None:
    model = tiny(kind)
    text = " ".join(f"w{i}" for i in (5, 9, 5, 77, 12, 9, 5, 31, 2))
    stats = model.attention_stats([text, "w1 w2 w3"], StatSpec(previous=True, received=True, participation=True))
    ids = torch.tensor([model.coder.encode(text)])
    _, cache = model.bridge.run_with_cache(ids, names_filter=lambda n: n.endswith("hook_pattern"))
    layers = model.attention_layers
    p = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"][0] for i in layers]).double().numpy()
    close = {"atol": 1e-9 if model.dtype == torch.float64 else 1e-4}
    n = p.shape[-1]
    behind = np.arange(n)[:, None] - np.arange(n)
    logs = np.log(np.where(p > 0, p, 1))
    expected = {
        "entropy": -(p * logs).sum(-1),
        "max_prob": p.max(-1),
        "argmax": p.argmax(-1),
        "sink": p[..., :4].sum(-1),
        "distance": (p * behind).sum(-1),
        "previous": np.where(np.arange(n) > 0, np.diagonal(np.roll(p, 1, -1), axis1=-2, axis2=-1), 0),
        "participation": (p**2).sum(-1),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(stats.values[name][0][layers], value, **close, err_msg=name)
    runner = Engine(model)
    runner.record([model.coder.encode(text)])
    for at, layer in enumerate(layers):
        window = runner.frame.calls[layer].window or n
        seen = np.array([min(n, j + window) - j for j in range(n)])
        np.testing.assert_allclose(stats.values["received"][0][layer], p[at].sum(-2) / seen, **close)
    others = sorted(set(range(model.n_layers)) - set(layers))
    assert np.isnan(stats.values["entropy"][0][others]).all() and (stats.values["argmax"][0][others] == -1).all()
    assert stats.frame().shape[0] == model.n_layers * 4 * sum(map(len, stats.tokens)) and len(stats) == 2


def test_next_token_logits_ignore_batching(tiny) -> None:
    model = tiny("gpt2")
    ids = [[0, 5, 6], [0, 7], [0, 9, 10], [0, 3, 4, 5, 6]]
    together = model.next_token_logits(ids)
    alone = torch.cat([model.next_token_logits([i]) for i in ids])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-6)


# ------------------------------------------------------------------ the embedded model


@pytest.mark.model
@pytest.mark.parametrize("side", ["left", "right"])
def test_smollm2_logits_equal_eager_with_padding_and_cache(smollm2, side: str) -> None:
    from transformers import AutoModelForCausalLM, DynamicCache

    from interp.zoo import embedded_model

    hf = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = smollm2.tokenizer
    tokenizer.padding_side = side
    batch = tokenizer([PROMPT, "The capital of France is", "a b c"], return_tensors="pt", padding=True)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        theirs = hf(**batch).logits
        ours = smollm2.bridge(batch["input_ids"], attention_mask=batch["attention_mask"])
        assert (ours - theirs)[real].abs().max() < 1e-4
        ids = batch["input_ids"][:1]
        if side == "right":
            cache = DynamicCache()
            parts = [smollm2(ids[:, :6], past_key_values=cache, use_cache=True)]
            parts += [smollm2(ids[:, i : i + 1], past_key_values=cache, use_cache=True) for i in range(6, ids.shape[1])]
            assert (torch.cat(parts, 1) - hf(ids).logits).abs().max() < 1e-4


@pytest.mark.model
def test_smollm2_patching_equals_transformer_lens(smollm2) -> None:
    """Every cell of a 15-token pair, resid_pre and z, against transformer_lens.patching on the same bridge."""
    from transformer_lens import patching

    clean, corrupt = PROMPT, PROMPT.replace("store, John", "store, Mary")
    pair = interp.PromptPair(clean, corrupt, " Mary", " John")
    answer, foil = (smollm2.coder.continuation(t)[0] for t in (" Mary", " John"))
    tokens = smollm2.bridge.to_tokens(corrupt)
    assert tokens.shape[1] == 15

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, answer] - logits[0, -1, foil]

    with torch.no_grad():
        _, cache = smollm2.run_with_cache(smollm2.bridge.to_tokens(clean))
        resid = patching.get_act_patch_resid_pre(smollm2.bridge, tokens, cache, metric)
        z = patching.get_act_patch_attn_head_out_all_pos(smollm2.bridge, tokens, cache, metric)
    ours = interp.patch(smollm2, pair, smollm2.sites("resid_pre")).frame()["patched"].to_numpy().reshape(30, 15)
    np.testing.assert_allclose(ours, resid.numpy(), atol=1e-4)
    ours = interp.patch(smollm2, pair, smollm2.sites("z")).frame()["patched"].to_numpy().reshape(30, 9)
    np.testing.assert_allclose(ours, z.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_statistics_under_a_sliding_cache_count_from_the_first_token(tiny, kind) -> None:
    """Decoded one by one, the last token has the statistics that it has in one forward over the whole prompt."""
    model = tiny(kind)
    ids = torch.tensor([model.coder.encode("w1 w2 w3 w4 w5 w6 w7 w8 w9")])
    spec = StatSpec(argmax=True, sink=4, topk=3, entropy=True, distance=True)
    inner = model.bridge.original_model
    with torch.no_grad(), model.instrument.collecting(spec) as collected:
        inner(input_ids=ids)
        whole = dict(collected)
    cache = transformers.DynamicCache(config=inner.config)
    with torch.no_grad(), model.instrument.collecting(spec) as collected:
        for i in range(ids.shape[1]):
            inner(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True)
        decoded = dict(collected)
    assert decoded[0].argmax.shape[-1] == 1 and any(x.is_sliding for x in cache.layers)
    for layer, stats in decoded.items():
        for name, got in stats.as_dict().items():
            want = whole[layer].as_dict()[name]
            for x, y in zip(*(z if name == "topk" else (z,) for z in (got, want)), strict=True):
                torch.testing.assert_close(x[:, :, 0], y[:, :, -1], msg=lambda m, n=name: f"{n}: {m}")
    with pytest.raises(ModelError, match="received"), model.instrument.collecting(StatSpec(received=True)):
        inner(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
