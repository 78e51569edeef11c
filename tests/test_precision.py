"""Rounded weights and activations: bfloat16 and float16 within their budget, GGUF files, torch.compile."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf
from interp.doctor.matrix import difference
from interp.errors import ModelError

TOKENS = torch.tensor([[5, 9, 5, 77, 12, 9, 5, 31, 2]])
# The weights here are large, so that attention is sharp and rounding shows: of the largest logit, per dtype.
BUDGET = {torch.bfloat16: 0.08, torch.float16: 0.01}


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox", "mistral", "gemma2"])
@pytest.mark.parametrize("dtype", BUDGET)
def test_half_precision_stays_near_float32_and_as_near_as_eager(word_tokenizer, family: str, dtype) -> None:
    with torch.no_grad():
        exact = tiny_hf(family, torch.float32)(TOKENS).logits
        eager = difference(tiny_hf(family, dtype)(TOKENS).logits, exact)
        model = interp.load(tiny_hf(family, dtype), tokenizer=word_tokenizer)
        ours = difference(model(TOKENS), exact)
    assert model.dtype == dtype and 0 < ours < BUDGET[dtype] and ours < 2 * eager + 1e-3, (ours, eager)
    stats = model.attention_stats("w1 w2 w3 w4")
    assert stats.values["entropy"][0].dtype == np.float32  # statistics are not rounded to 16 bits
    full = interp.load(tiny_hf(family, torch.float32), tokenizer=word_tokenizer).attention_stats("w1 w2 w3 w4")
    assert np.abs(stats.values["entropy"][0] - full.values["entropy"][0]).max() < 10 * BUDGET[dtype]


def test_a_gguf_file_loads_with_its_tokenizer(tmp_path: Path) -> None:
    """A llama of two layers, written in float32 here and read back by name: logits equal those of the weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    hf = LlamaForCausalLM(config).eval()
    path = tmp_path / "tiny.gguf"
    write_gguf(path, hf)
    model = interp.load(str(path))
    tokens = torch.tensor([[1, 5, 9, 7, 30]])
    with torch.no_grad():
        assert difference(model(tokens), hf(tokens).logits) < 1e-5
    assert model.name == "tiny" and model.tokenizer is not None and model.coder.encode("a")


def write_gguf(path: Path, hf) -> None:
    """llama.cpp's layout: its tensor names, and queries and keys permuted for its rotary embedding."""
    from gguf import GGUFWriter

    c = hf.config
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    letters = "abcdefghijklmnopqrstuvwxyz012345678"
    words = ["<unk>", "<s>", "</s>", "Ġ", *letters, "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3, *[1] * (len(words) - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    }  # fmt: skip
    for name, weight in hf.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        array = weight.float().numpy()
        if "attn_q." in name or "attn_k." in name:
            heads = c.num_attention_heads if "attn_q" in name else c.num_key_value_heads
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.slow
def test_a_compiled_forward_gives_the_same_logits(word_tokenizer) -> None:
    """Compiled after loading, by torch's tracer alone (no C++ compiler is needed for that)."""
    model = interp.load(tiny_hf("llama", torch.float32), tokenizer=word_tokenizer)
    compiled = torch.compile(model.bridge.original_model, backend="eager")
    with torch.no_grad():
        assert difference(compiled(TOKENS).logits, model(TOKENS)) < 1e-5


def test_a_model_compiled_before_loading_is_refused(word_tokenizer) -> None:
    with pytest.raises(ModelError, match="compile comes after loading"):
        interp.load(torch.compile(tiny_hf("llama", torch.float32), backend="eager"), tokenizer=word_tokenizer)
