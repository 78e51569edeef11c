"""Tiny random-weight models of the architectures that researchers open, for the matrix tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

COMMON: dict[str, Any] = {"vocab_size": 100, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64,
}  # fmt: skip
GROUPED: dict[str, Any] = {"num_key_value_heads": 2}
NARROW: dict[str, Any] = {**GROUPED, "head_dim": 8}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# family -> (transformers config class, arguments beside COMMON)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SIZES, **GROUPED}),
    "gpt2": ("GPT2Config", GPT),
    "neox": ("GPTNeoXConfig", SIZES),
    "mistral": ("MistralConfig", {**SIZES, **NARROW, "sliding_window": 5}),
    "gemma2": (
        "Gemma2Config",
        {**SIZES, **NARROW, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
         "query_pre_attn_scalar": 8},
    ),
    "gpt_neo": (
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
         "window_size": 4, "max_position_embeddings": 64},
    ),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "opt": (
        "OPTConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48,
         "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mpt": ("MptConfig", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "falcon": ("FalconConfig", {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}),
    "smollm3": ("SmolLM3Config", {**SIZES, **GROUPED, "no_rope_layers": [1, 0, 1]}),
    "mixtral": ("MixtralConfig", {**SIZES, **GROUPED, "num_local_experts": 4}),
    "qwen2": ("Qwen2Config", {**SIZES, **GROUPED}),
    "qwen2_moe": ("Qwen2MoeConfig", {**SIZES, **GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": ("Qwen3Config", {**SIZES, **NARROW}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SIZES, **NARROW, **EXPERTS}),
    "gemma": ("GemmaConfig", {**SIZES, **NARROW}),
    "gemma3": (
        "Gemma3TextConfig",
        {**SIZES, **NARROW, "sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
    ),
    "phi": ("PhiConfig", SIZES),
    "phi3": ("Phi3Config", {**SIZES, **GROUPED}),
    "gpt_oss": (
        "GptOssConfig",
        {**SIZES, **NARROW, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
         "layer_types": ALTERNATING},
    ),
    "olmo": ("OlmoConfig", {**SIZES, **GROUPED}),
    "olmo2": ("Olmo2Config", {**SIZES, **GROUPED}),
    "granite": (
        "GraniteConfig",
        {**SIZES, **GROUPED, "logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5,
         "embedding_multiplier": 2.0},
    ),
    "cohere": ("CohereConfig", {**SIZES, **GROUPED, "logit_scale": 0.5}),
    "stablelm": ("StableLmConfig", {**SIZES, **GROUPED}),
}  # fmt: skip


def config(family: str) -> Any:
    """The family's tiny transformers config."""
    import transformers

    name, arguments = FAMILIES[family]
    make: Callable[..., Any] = getattr(transformers, name)
    return make(**COMMON, **arguments)


ARCHITECTURES = ("llama", "gpt2", "neox", "mistral", "gemma2")  # the ways in which attention is intercepted
OTHERS = [pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in ARCHITECTURES]
NO_FLOAT64 = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")  # torch's grouped matrix product has no float64
EVERY = [*ARCHITECTURES, *OTHERS]


def tiny_hf(kind: str, dtype: torch.dtype = torch.float64):
    """A Hugging Face model with large random weights, so that attention is far from uniform."""
    import transformers as tf

    if kind in NO_FLOAT64:
        dtype = torch.float32
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config(kind), attn_implementation="eager").to(dtype).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(8.0 if "embed" not in name and "wte" not in name else 20.0)
    model.config.architectures = [type(model).__name__]
    return model
