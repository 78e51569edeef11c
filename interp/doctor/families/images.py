"""Tiny models that read images: vision encoders and vision–language models."""

from __future__ import annotations

from typing import Any

from interp.doctor.families.family import COMMON, GROUPED, NARROW, SIZES, Family

IMAGE: dict[str, Any] = {"image_size": 12, "patch_size": 4, "num_channels": 3}
PATCHES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, **IMAGE,
}  # fmt: skip
DINO: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_ratio": 2, **IMAGE, "num_labels": 5,
    "layerscale_value": 0.5,
}  # fmt: skip
IMAGE_TOKEN = 99  # the last of the 100 tokens is the image placeholder
TEXT: dict[str, Any] = {**COMMON, **SIZES, **GROUPED, "max_position_embeddings": 128}
LLAMA, GEMMA = {"model_type": "llama", **TEXT}, {"model_type": "gemma", **TEXT, **NARROW}
QWEN: dict[str, Any] = {
    **TEXT, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}  # fmt: skip
QWEN_IDS = {"image_token_id": IMAGE_TOKEN, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}
QFORMER = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20,
    "encoder_hidden_size": 32,
}  # fmt: skip
OPT = {
    "model_type": "opt", **COMMON, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip

IMAGE_FAMILIES: dict[str, Family] = {
    "vit": Family("ViTConfig", {**PATCHES, "num_labels": 5}, kind="vision", auto="AutoModelForImageClassification"),
    "clip_vision": Family(
        "CLIPVisionConfig", {**PATCHES, "projection_dim": 16}, kind="vision", auto="CLIPVisionModelWithProjection"
    ),
    "siglip_vision": Family("SiglipVisionConfig", PATCHES, kind="vision", auto="SiglipVisionModel"),
    "dinov2": Family("Dinov2Config", DINO, kind="vision", auto="AutoModelForImageClassification"),
    "dinov2_registers": Family(
        "Dinov2WithRegistersConfig", {**DINO, "num_register_tokens": 2}, kind="vision",
        auto="Dinov2WithRegistersModel",
    ),
    "llava": Family(
        "LlavaConfig",
        {"vision_config": {"model_type": "clip_vision_model", **PATCHES}, "text_config": LLAMA,
         "image_token_index": IMAGE_TOKEN},
        kind="vision-language", auto="LlavaForConditionalGeneration",
    ),
    "llava_next": Family(
        "LlavaNextConfig",
        {"vision_config": {"model_type": "clip_vision_model", **PATCHES}, "text_config": LLAMA,
         "image_token_index": IMAGE_TOKEN, "image_grid_pinpoints": [[12, 24], [24, 12]]},
        kind="vision-language", auto="LlavaNextForConditionalGeneration",
    ),
    "idefics3": Family(
        "Idefics3Config",
        {"vision_config": {**PATCHES, "image_size": 16}, "text_config": LLAMA, "image_token_id": IMAGE_TOKEN,
         "scale_factor": 2, "pad_token_id": 1},
        kind="vision-language", auto="Idefics3ForConditionalGeneration",
    ),
    "smolvlm": Family(
        "SmolVLMConfig",
        {"vision_config": {**PATCHES, "image_size": 16}, "text_config": LLAMA, "image_token_id": IMAGE_TOKEN,
         "scale_factor": 2, "pad_token_id": 1},
        kind="vision-language", auto="SmolVLMForConditionalGeneration",
    ),
    "qwen2_vl": Family(
        "Qwen2VLConfig",
        {"vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
         "text_config": QWEN, **QWEN_IDS},
        kind="vision-language", auto="Qwen2VLForConditionalGeneration",
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLConfig",
        {"vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
                           "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
         "text_config": QWEN, **QWEN_IDS},
        kind="vision-language", auto="Qwen2_5_VLForConditionalGeneration",
    ),
    "paligemma": Family(
        "PaliGemmaConfig",
        {"vision_config": {"model_type": "siglip_vision_model", **PATCHES}, "text_config": GEMMA,
         "image_token_index": IMAGE_TOKEN, "projection_dim": 32, "hidden_size": 32},
        kind="vision-language", auto="PaliGemmaForConditionalGeneration",
    ),
    "blip2": Family(
        "Blip2Config",
        {"vision_config": {**{k: v for k, v in PATCHES.items() if k != "num_channels"}, "initializer_range": 0.02},
         "qformer_config": QFORMER, "text_config": OPT, "num_query_tokens": 6, "image_token_index": IMAGE_TOKEN},
        kind="vision-language", auto="Blip2ForConditionalGeneration", float64=False,
    ),
}  # fmt: skip
