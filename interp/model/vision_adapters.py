"""TransformerLens adapters for models that read images.

They cover models that TransformerLens does not cover. Vision encoders: CLIP, SigLIP, DINOv2. Vision–language models:
Qwen2-VL, PaliGemma, BLIP-2, and Qwen2.5-VL, for which TransformerLens has an adapter that requires torchvision.
Adapters only map names; what the modules compute stays Hugging Face's.
"""

from __future__ import annotations

from typing import Any

# transformers' classes of vision encoders -> the path of their transformer, and the names of its blocks' parts
CLIP_BLOCK = {"ln1": "layer_norm1", "ln2": "layer_norm2", "attn": "self_attn", "o": "out_proj"}
DINO_BLOCK = {"ln1": "norm1", "ln2": "norm2", "attn": "attention", "o": "o_proj"}
ENCODERS: dict[str, tuple[str, str, dict[str, str], str]] = {
    # class: (prefix, list of blocks, names in a block, final norm)
    "CLIPVisionModel": ("", "encoder.layers", CLIP_BLOCK, "post_layernorm"),
    "CLIPVisionModelWithProjection": ("vision_model.", "encoder.layers", CLIP_BLOCK, "post_layernorm"),
    "CLIPForImageClassification": ("vision_model.", "encoder.layers", CLIP_BLOCK, ""),  # its classifier skips the norm
    "SiglipVisionModel": ("", "encoder.layers", CLIP_BLOCK, "post_layernorm"),
    "SiglipForImageClassification": ("vision_model.", "encoder.layers", CLIP_BLOCK, "post_layernorm"),
    "Dinov2Model": ("", "encoder.layer", DINO_BLOCK, "layernorm"),
    "Dinov2ForImageClassification": ("dinov2.", "encoder.layer", DINO_BLOCK, "layernorm"),
    "Dinov2WithRegistersModel": ("", "encoder.layer", DINO_BLOCK, "layernorm"),
    "Dinov2WithRegistersForImageClassification": (
        "dinov2_with_registers.", "encoder.layer", DINO_BLOCK, "layernorm",
    ),
}  # fmt: skip


def image_adapters() -> dict[str, type]:
    """Make the adapters, by the name of transformers' class."""
    adapters: dict[str, type] = {name: _vision_encoder(name) for name in ENCODERS}
    adapters["Qwen2VLForConditionalGeneration"], adapters["Qwen2_5_VLForConditionalGeneration"] = _qwen_vl()
    adapters["PaliGemmaForConditionalGeneration"] = _paligemma()
    adapters["Blip2ForConditionalGeneration"] = _blip2()
    return adapters


def _vision_encoder(architecture: str) -> type:
    """Adapter for pre-norm blocks over patches.

    With DINO's layer scale, attn_out and mlp_out are scaled outputs.
    """
    from transformer_lens.model_bridge import generalized_components as parts
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.generalized_components.vision_classifier_head import VisionClassifierHeadBridge

    prefix, blocks, names, final = ENCODERS[architecture]

    class VisionEncoder(ArchitectureAdapter):
        supports_generation = False
        supports_fold_ln = False
        supports_center_writing_weights = False

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            vision = getattr(cfg, "vision_config", None) or cfg
            self.cfg.is_visual_model = True
            self.cfg.normalization_type = "LN"
            self.cfg.positional_embedding_type = "standard"
            self.cfg.final_rms = self.cfg.gated_mlp = self.cfg.attn_only = False
            self.cfg.attention_dir = "bidirectional"
            if vision is not cfg:  # the whole model's config also describes a text tower
                self.cfg.n_layers, self.cfg.n_heads = vision.num_hidden_layers, vision.num_attention_heads
                self.cfg.d_model, self.cfg.d_head = vision.hidden_size, vision.hidden_size // vision.num_attention_heads
                self.cfg.d_mlp = vision.intermediate_size
            self.weight_processing_conversions = {}
            self.component_mapping = {}

        def prepare_model(self, hf_model: Any) -> None:
            block: dict[str, Any] = {
                "ln1": self._norm(names["ln1"]),
                "ln2": self._norm(names["ln2"]),
                "attn": parts.AttentionBridge(
                    name=names["attn"],
                    config=self.cfg,
                    submodules={x: parts.LinearBridge(name=names.get(x, f"{x}_proj")) for x in ("q", "k", "v", "o")},
                ),
                "mlp": self._mlp(hf_model),
            }
            scaled = {}
            if names is DINO_BLOCK:
                block["ls1"] = GeneralizedComponent(name="layer_scale1")
                block["ls2"] = GeneralizedComponent(name="layer_scale2")
                scaled = {"hook_attn_out": "ls1.hook_out", "hook_mlp_out": "ls2.hook_out"}
            mapping: dict[str, Any] = {
                "embed": GeneralizedComponent(name=f"{prefix}embeddings"),
                "blocks": parts.BlockBridge(
                    name=prefix + blocks, config=self.cfg, submodules=block, hook_alias_overrides=scaled
                ),
            }
            if final:
                mapping["ln_final"] = self._norm(prefix + final)
            if architecture.endswith("ForImageClassification"):
                mapping["unembed"] = VisionClassifierHeadBridge(name="classifier")
            elif hasattr(hf_model, "visual_projection"):
                mapping["unembed"] = VisionClassifierHeadBridge(name="visual_projection")
            self.component_mapping = mapping

        def _norm(self, name: str) -> Any:
            return parts.NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

        def _mlp(self, hf_model: Any) -> Any:
            if getattr(hf_model.config, "use_swiglu_ffn", False):  # the largest DINOv2
                return GeneralizedComponent(name="mlp")
            linears: dict[str, GeneralizedComponent] = {
                "in": parts.LinearBridge(name="fc1"),
                "out": parts.LinearBridge(name="fc2"),
            }
            return parts.MLPBridge(name="mlp", config=self.cfg, submodules=linears)

    return VisionEncoder


def _qwen_vl() -> tuple[type, type]:
    """Adapters for Qwen2-VL and Qwen2.5-VL, which have the same text model.

    Qwen2-VL's vision tower is not bridged. TransformerLens requires torchvision, which only their processors need.
    """
    from transformer_lens.model_bridge import generalized_components as parts
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.supported_architectures.qwen2_5_vl import Qwen2_5_VLArchitectureAdapter

    class Qwen25VL(Qwen2_5_VLArchitectureAdapter):
        required_libraries: list[str] = []  # noqa: RUF012 - TransformerLens' own attribute

    class Qwen2VL(Qwen25VL):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            assert self.component_mapping is not None
            self.component_mapping["vision_encoder"] = GeneralizedComponent(name="model.visual")
            self.component_mapping["vision_projector"] = parts.VisionProjectionBridge(name="model.visual.merger")

    return Qwen2VL, Qwen25VL


def _paligemma() -> type:
    """Adapter for PaliGemma: Gemma after SigLIP.

    It reads its whole prompt in both directions.
    """
    from transformer_lens.model_bridge import generalized_components as parts
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    class PaliGemma(ArchitectureAdapter):
        supports_generation = False

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.cfg.is_multimodal = True
            self._set_rms_rotary_defaults()
            self.cfg.rmsnorm_uses_offset = True
            self.cfg.attn_implementation = "eager"
            self._extract_vision_dims(cfg)
            self.weight_processing_conversions = {}
            text = "model.language_model."
            block = {
                "ln1": self._rms("input_layernorm"),
                "ln2": self._rms("post_attention_layernorm"),
                "attn": parts.PositionEmbeddingsAttentionBridge(
                    name="self_attn",
                    config=self.cfg,
                    submodules={x: parts.LinearBridge(name=f"{x}_proj") for x in ("q", "k", "v", "o")},
                    requires_attention_mask=True,
                    requires_position_embeddings=True,
                ),
                "mlp": self._gated_mlp(),
            }
            self.component_mapping = {
                "vision_encoder": parts.SiglipVisionEncoderBridge(name="model.vision_tower", config=self.cfg),
                "vision_projector": parts.VisionProjectionBridge(name="model.multi_modal_projector"),
                "embed": parts.EmbeddingBridge(name=f"{text}embed_tokens"),
                "rotary_emb": parts.RotaryEmbeddingBridge(name=f"{text}rotary_emb"),
                "blocks": parts.BlockBridge(name=f"{text}layers", submodules=block),
                "ln_final": self._rms(f"{text}norm"),
                "unembed": parts.UnembeddingBridge(name="lm_head"),
            }

        def _rms(self, name: str) -> Any:
            return parts.RMSNormalizationBridge(name=name, config=self.cfg)

    return PaliGemma


def _blip2() -> type:
    """Adapter for BLIP-2 with OPT.

    Its vision tower and its Q-Former are not bridged inside.
    """
    from transformer_lens.model_bridge import generalized_components as parts
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
    from transformer_lens.model_bridge.supported_architectures.opt import OptArchitectureAdapter

    class Blip2(OptArchitectureAdapter):
        supports_generation = False

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.cfg.is_multimodal = True
            mapping = self.component_mapping
            assert mapping is not None
            for component in mapping.values():
                component.name = f"language_model.{component.name}"
            mapping["vision_encoder"] = GeneralizedComponent(name="vision_model")
            mapping["vision_projector"] = parts.VisionProjectionBridge(name="language_projection")

    return Blip2
