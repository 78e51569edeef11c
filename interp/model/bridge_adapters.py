"""TransformerLens adapters, and repairs of transformers' models.

They cover architectures that TransformerLens lacks or reads wrongly. `register` adds the adapters to TransformerLens'
own registry; `repair` corrects a Hugging Face model object. Both are called before a bridge is built.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

# transformers' class -> the class by which TransformerLens recognises the same architecture
SAME_AS = {
    "PhimoeForCausalLM": "PhiMoEForCausalLM",
    "SmolVLMForConditionalGeneration": "Idefics3ForConditionalGeneration",
}


@cache
def register() -> None:
    """Add interp's adapters to TransformerLens' registry, once in a process."""
    from transformer_lens.factories import architecture_adapter_factory as factory

    from interp.model.vision_adapters import image_adapters

    registry = factory.SUPPORTED_ARCHITECTURES
    ours = {name: registry[same] for name, same in SAME_AS.items()} | {"FalconForCausalLM": _falcon()}
    ours |= {name: _post_norm(registry[name]) for name in ("BertForMaskedLM", "RobertaForMaskedLM")}
    ours |= {name: _headless(ours[f"{name[:-5]}ForMaskedLM"]) for name in ("BertModel", "RobertaModel")}
    ours |= {"WhisperForConditionalGeneration": _whisper()}
    ours |= {"OPTForCausalLM": _opt(), "FalconH1ForCausalLM": _falcon_h1()}
    ours |= {"ModernBertForMaskedLM": _modernbert(), "ModernBertModel": _headless(_modernbert())}
    ours |= image_adapters()
    for name, adapter in ours.items():
        registry[name] = adapter  # where configs are recognised
        factory.ArchitectureAdapterFactory.register_adapter(name, adapter)  # where adapters are made


def _falcon() -> type:
    """Adapter for Falcon with grouped keys.

    TransformerLens assumes one key head and three contiguous parts of the fused weight.
    """
    from transformer_lens.model_bridge.supported_architectures.falcon import FalconArchitectureAdapter

    class Falcon(FalconArchitectureAdapter):
        def __init__(self, cfg: Any) -> None:
            grouped = cfg.n_key_value_heads
            super().__init__(cfg)
            if self._is_new_arch:
                self.cfg.n_key_value_heads = grouped

        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            if self._is_new_arch and hf_model.config.num_ln_in_parallel_attn == 1:  # Falcon 2: one shared norm
                self.component_mapping["blocks"].submodules["ln1"].name = "input_layernorm"

        def _split_falcon_qkv(self, original_attention_component: Any) -> Any:
            if not self._is_new_arch:
                return super()._split_falcon_qkv(original_attention_component)
            module = original_attention_component
            return split_by_group(
                module.query_key_value, self.cfg.n_key_value_heads or self.cfg.n_heads, module.head_dim
            )

    return Falcon


def _falcon_h1() -> type:
    """Adapter for Falcon-H1: a block multiplies attention's output before it adds it to the residual stream.

    ``hook_attn_out`` and ``hook_result`` show what is added, as they do for Granite.
    """
    from transformer_lens.model_bridge.generalized_components.block import ScaledResidualBlockBridge
    from transformer_lens.model_bridge.supported_architectures.falcon_h1 import FalconH1ArchitectureAdapter

    class FalconH1(FalconH1ArchitectureAdapter):
        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            scale = float(hf_model.config.attention_out_multiplier)
            if scale in (0.0, 1.0):
                return
            mapping: Any = self.component_mapping
            blocks = ScaledResidualBlockBridge(
                name="model.layers",
                config=mapping["blocks"].config,
                submodules=mapping["blocks"].submodules,
                residual_contribution_scale=scale,
                scaled_mlp_submodule=None,
            )
            blocks.hook_aliases["hook_mlp_out"] = "mlp.hook_out"  # the MLP multiplies its output itself
            mapping["blocks"] = blocks

    return FalconH1


def _opt() -> type:
    """Adapter for OPT, whose models with norms behind their sums (350m) have no final norm."""
    from transformer_lens.model_bridge.supported_architectures.opt import OptArchitectureAdapter

    class Opt(OptArchitectureAdapter):
        def prepare_model(self, hf_model: Any) -> None:
            super().prepare_model(hf_model)
            mapping: Any = self.component_mapping
            if hf_model.model.decoder.final_layer_norm is None:
                mapping.pop("ln_final", None)
            if not hf_model.config.do_layer_norm_before:
                # the second norm then runs on [batch, position, d_model], not where OPT has joined the first two axes
                blocks = mapping["blocks"]
                for point in (blocks.submodules["ln2"].hook_in, blocks.submodules["ln2"].hook_out, blocks.hook_mlp_in):
                    point.hook_conversion = None

    return Opt


def _post_norm(adapter: type) -> type:
    """Adapter for BERT and RoBERTa whose ``hook_attn_out`` is attention's output.

    TransformerLens shows the state after the residual sum and its norm under this name, and of the MLP its output.
    """

    class PostNorm(adapter):
        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            blocks = self.component_mapping["blocks"]
            blocks.hook_aliases = {**blocks.hook_aliases, "hook_attn_out": "attn.o.hook_out"}

    return PostNorm


def _headless(masked: type) -> type:
    """Adapter for an encoder without its language-model head.

    It is that of the whole model, with shorter paths.
    """

    class Headless(masked):
        def prepare_model(self, hf_model: Any) -> None:
            for head in ("mlm_head", "mlm_norm", "unembed"):
                self.component_mapping.pop(head, None)
            if self.component_mapping["ln_final"].name.split(".")[0] in ("cls", "lm_head"):  # it belongs to the head
                del self.component_mapping["ln_final"]
            for component in self.component_mapping.values():
                component.name = component.name.split(".", 1)[1]

    return Headless


def _modernbert() -> type:
    """Adapter for ModernBERT: fused projections, rotary positions.

    Local and global layers alternate.
    """
    from transformer_lens.model_bridge import generalized_components as parts
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter

    class ModernBert(ArchitectureAdapter):
        supports_generation = False
        supports_fold_ln = False  # layer 0's attention reads the residual stream without a norm
        supports_center_writing_weights = False

        def __init__(self, cfg: Any) -> None:
            super().__init__(cfg)
            self.cfg.normalization_type = "LN"
            self.cfg.positional_embedding_type = "rotary"
            self.cfg.attention_dir = "bidirectional"
            self.cfg.gated_mlp = self.cfg.attn_only = self.cfg.final_rms = False
            self.weight_processing_conversions = {}
            attention = parts.JointQKVPositionEmbeddingsAttentionBridge(
                name="attn",
                config=self.cfg,
                split_qkv_matrix=lambda module: split_in_thirds(module.Wqkv),
                submodules={"qkv": parts.LinearBridge(name="Wqkv"), "o": parts.LinearBridge(name="Wo")},
            )
            attention.is_causal = (
                False  # else TransformerLens' own attention hides later positions where there is no mask
            )
            block = {
                "ln1": self._norm("attn_norm"),
                "attn": attention,
                "ln2": self._norm("mlp_norm"),
                "mlp": self._ungated_mlp(up="Wi", down="Wo"),
            }
            self.component_mapping = {
                "embed": parts.EmbeddingBridge(name="model.embeddings.tok_embeddings"),
                "embed_ln": self._norm("model.embeddings.norm"),
                "rotary_emb": parts.RotaryEmbeddingBridge(name="model.rotary_emb"),
                "blocks": parts.BlockBridge(name="model.layers", config=self.cfg, submodules=block),
                "ln_final": self._norm("model.final_norm"),
                "mlm_head": parts.LinearBridge(name="head.dense"),
                "mlm_norm": self._norm("head.norm"),
                "unembed": parts.UnembeddingBridge(name="decoder"),
            }

        def _norm(self, name: str) -> Any:
            return parts.NormalizationBridge(name=name, config=self.cfg, use_native_layernorm_autograd=True)

    return ModernBert


def _whisper() -> type:
    """Adapter for Whisper: BART's blocks with norms before them.

    It reads frames of sound instead of tokens.
    """
    from transformer_lens.model_bridge import generalized_components as parts
    from transformer_lens.model_bridge.supported_architectures.bart import BartFamilyArchitectureAdapter

    class Whisper(BartFamilyArchitectureAdapter):
        has_final_stack_norm = True
        supports_generation = False

        def _build_component_mapping(self) -> dict[str, Any]:
            mapping = super()._build_component_mapping()
            del mapping["embed"]
            mapping["unembed"] = parts.UnembeddingBridge(name="proj_out")
            return mapping

    return Whisper


def split_in_thirds(fused: Any) -> list[torch.nn.Linear]:
    """Split a fused projection with rows of all queries, all keys, all values."""
    return [
        _linear(weight.clone(), None if fused.bias is None else fused.bias.detach().chunk(3)[i].clone())
        for i, weight in enumerate(fused.weight.detach().chunk(3))
    ]


def _linear(weight: Tensor, bias: Tensor | None) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(weight)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias)
    return linear


def split_by_group(fused: Any, n_groups: int, d_head: int) -> list[torch.nn.Linear]:
    """Split a fused projection with rows of queries, key and value per key head.

    For each key head these are its query heads, its key and its value.
    """
    rows = fused.weight.detach().unflatten(0, (n_groups, -1, d_head))
    bias = None if fused.bias is None else fused.bias.detach().unflatten(0, (n_groups, -1, d_head))
    runs = (slice(0, -2), slice(-2, -1), slice(-1, None))
    return [
        _linear(rows[:, run].flatten(0, 2).clone(), None if bias is None else bias[:, run].flatten().clone())
        for run in runs
    ]


def repair(hf: Any) -> None:
    """Correct a model object whose eager attention in transformers is wrong.

    It is changed in place.
    """
    if type(hf).__name__.startswith("Falcon") and getattr(hf.config, "alibi", False):
        for block in hf.transformer.h:
            block.register_forward_pre_hook(_alibi_once, with_kwargs=True)


def _alibi_once(block: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Zero Falcon's ALiBi, which its dense mask already holds.

    Its eager attention, unlike SDPA, would add it again.
    """
    mask: Tensor | None = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 4 and kwargs.get("alibi") is not None:
        kwargs["alibi"] = torch.zeros_like(kwargs["alibi"])
    return args, kwargs
