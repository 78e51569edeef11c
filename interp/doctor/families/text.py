"""Tiny random-weight models for `interp doctor --architectures`.

They have the architectures that researchers use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from interp.doctor.families.family import COMMON, GROUPED, NARROW, SIZES, Family
from interp.doctor.families.images import IMAGE_FAMILIES
from interp.model.hf_classes import hf_config, hf_model

if TYPE_CHECKING:
    import torch

    from interp.model.hf_classes import PreTrainedModel

FALCON: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
PAIRED: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 0,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


FAMILIES: dict[str, Family] = {
    "llama": Family("LlamaConfig", {**SIZES, **GROUPED}),
    "gpt2": Family("GPT2Config", GPT),
    "neox": Family("GPTNeoXConfig", SIZES),
    "mistral": Family("MistralConfig", {**SIZES, **NARROW, "sliding_window": 5}),
    "gemma2": Family(
        "Gemma2Config",
        {**SIZES, **NARROW, "sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
         "query_pre_attn_scalar": 8},
    ),
    "gpt_neo": Family(
        "GPTNeoConfig",
        {"hidden_size": 32, "num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]],
         "window_size": 4, "max_position_embeddings": 64},
    ),
    "gptj": Family("GPTJConfig", {**GPT, "rotary_dim": 4}),
    "opt": Family(
        "OPTConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48,
         "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "opt_post_norm": Family(
        "OPTConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48,
         "max_position_embeddings": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": Family("BloomConfig", {"hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "mpt": Family("MptConfig", {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),
    "falcon": Family("FalconConfig", FALCON),  # multi-query
    "falcon_grouped": Family("FalconConfig", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_alibi": Family(
        # transformers' eager attention adds ALiBi twice: to its mask and to its scores
        "FalconConfig", {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False}, eager=False,
    ),
    "smollm3": Family("SmolLM3Config", {**SIZES, **GROUPED, "no_rope_layers": [1, 0, 1]}),
    "mixtral": Family("MixtralConfig", {**SIZES, **GROUPED, "num_local_experts": 4}, float64=False),
    "qwen2": Family("Qwen2Config", {**SIZES, **GROUPED}),
    "qwen2_moe": Family(
        "Qwen2MoeConfig", {**SIZES, **GROUPED, **EXPERTS, "shared_expert_intermediate_size": 16}, float64=False
    ),
    "qwen3": Family("Qwen3Config", {**SIZES, **NARROW}),
    "qwen3_moe": Family("Qwen3MoeConfig", {**SIZES, **NARROW, **EXPERTS}, float64=False),
    "gemma": Family("GemmaConfig", {**SIZES, **NARROW}),
    "gemma3": Family(
        "Gemma3TextConfig",
        {**SIZES, **NARROW, "sliding_window": 5, "query_pre_attn_scalar": 8, "layer_types": ALTERNATING},
    ),
    "phi": Family("PhiConfig", SIZES),
    "phi3": Family("Phi3Config", {**SIZES, **GROUPED}),
    "gpt_oss": Family(
        "GptOssConfig",
        {**SIZES, **NARROW, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5,
         "layer_types": ALTERNATING},
        float64=False,
    ),
    "olmo": Family("OlmoConfig", {**SIZES, **GROUPED}),
    "olmo2": Family("Olmo2Config", {**SIZES, **GROUPED}),
    "granite": Family(
        "GraniteConfig",
        {**SIZES, **GROUPED, "logits_scaling": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5,
         "embedding_multiplier": 2.0},
    ),
    "cohere": Family("CohereConfig", {**SIZES, **GROUPED, "logit_scale": 0.5}),
    "stablelm": Family("StableLmConfig", {**SIZES, **GROUPED}),
    "llama3": Family("LlamaConfig", {**SIZES, **GROUPED, "rope_parameters": LLAMA3_ROPE}),
    "cohere2": Family(
        "Cohere2Config", {**SIZES, **GROUPED, "logit_scale": 0.5, "sliding_window": 5, "layer_types": ALTERNATING}
    ),
    "olmo3": Family("Olmo3Config", {**SIZES, **GROUPED, "sliding_window": 5, "layer_types": ALTERNATING}),
    "olmoe": Family("OlmoeConfig", {**SIZES, **GROUPED, "num_experts": 4, "num_experts_per_tok": 2}, float64=False),
    "phimoe": Family(
        "PhimoeConfig", {**SIZES, **GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}, float64=False
    ),
    "deepseek_v2": Family("DeepseekV2Config", {**SIZES, **LATENT}, float64=False),
    "deepseek_v3": Family("DeepseekV3Config", {**SIZES, **LATENT}, float64=False),
    "falcon_h1": Family(
        "FalconH1Config",
        {**SIZES, **GROUPED, **MAMBA, "mamba_d_ssm": 64, "attention_out_multiplier": 0.5, "ssm_out_multiplier": 0.7,
         "key_multiplier": 0.8, "embedding_multiplier": 2.0, "mlp_multipliers": [0.9, 0.6], "lm_head_multiplier": 0.5},
        kind="hybrid",
    ),
    "bamba": Family("BambaConfig", {**SIZES, **GROUPED, **MAMBA, "attn_layer_indices": [1]}, kind="hybrid"),
    "jamba": Family(
        "JambaConfig",
        {**SIZES, **GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
         "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        kind="hybrid", float64=False,
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        {**SIZES, **NARROW, **EXPERTS, "shared_expert_intermediate_size": 16,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
         "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
        kind="hybrid", float64=False,
    ),
    "lfm2": Family(
        "Lfm2Config", {**SIZES, **GROUPED, "layer_types": ["conv", "full_attention", "conv"]}, kind="hybrid"
    ),
    "bert": Family("BertConfig", SIZES, kind="encoder", auto="AutoModelForMaskedLM"),
    "bert_headless": Family("BertConfig", SIZES, kind="encoder", auto="AutoModel"),
    "roberta": Family(
        "RobertaConfig", {**SIZES, "max_position_embeddings": 66}, kind="encoder", auto="AutoModelForMaskedLM"
    ),
    "modernbert": Family(
        "ModernBertConfig",
        {**SIZES, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 1},
        kind="encoder", auto="AutoModelForMaskedLM",
    ),
    "modernbert_headless": Family(
        "ModernBertConfig",
        {**SIZES, "local_attention": 6, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 1},
        kind="encoder", auto="AutoModel",
    ),
    "t5": Family(
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0,
         "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16},
        kind="seq2seq", auto="AutoModelForSeq2SeqLM", gain=4.0,  # its scores are not divided by √d
    ),
    "bart": Family(
        "BartConfig", {**PAIRED, "max_position_embeddings": 64}, kind="seq2seq", auto="AutoModelForSeq2SeqLM"
    ),
    "whisper": Family(
        "WhisperConfig",
        {**PAIRED, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 32},
        kind="seq2seq", auto="AutoModelForSpeechSeq2Seq",
    ),
    **IMAGE_FAMILIES,
}  # fmt: skip


def config(family: str) -> Any:
    """Build the family's tiny transformers config."""
    row = FAMILIES[family]
    common = {} if row.kind.startswith("vision") else COMMON
    return hf_config(row.config, **common, **row.arguments)


def tiny_hf(kind: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Build a tiny Hugging Face model with large random weights.

    Attention is then far from uniform. The default dtype is float64 if the family supports it. The same family gives
    the same weights every time; the global generator is left as it was.
    """
    import torch

    family = FAMILIES[kind]
    if not family.float64:
        dtype = torch.float32
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        attention = "eager" if family.eager else "sdpa"
        model = hf_model(family.auto, config(kind), attn_implementation=attention)
        model = model.to(dtype or torch.float64).eval()  # pyright: ignore[reportArgumentType]
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                weight.mul_(family.gain if "embed" not in name and "wte" not in name else 20.0)
    model.config.architectures = [type(model).__name__]
    return model
