"""Route the attention of every layer of a TransformerBridge to its instrument."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from interp.errors import ModelError
from interp.model.attention_bridges import adapt
from interp.model.attention_call import AttentionCall
from interp.model.edited_attention import attend
from interp.model.instrument import LINK, Instrument, Link
from interp.model.masks import compact_mask, read_mask
from interp.model.protocols import Bridge

IMPLEMENTATION = "interp_headstats"
CHOICE = "_attn_implementation"  # field of a config: which attention function its modules call


def _hf_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Compute attention for transformers' attention modules.

    Inputs are [B, H, M, D], the output is [B, M, H, Dv].
    """
    if dropout and module.training:
        raise ModelError("attention dropout is active: call model.eval() (interp runs models in evaluation mode)")
    link = module.__dict__.get(LINK)
    if softcap is None:
        softcap = getattr(module, "attn_logit_softcapping", None)
    masks, position_bias = read_mask(attention_mask), kwargs.get("position_bias")
    if position_bias is not None:  # T5's relative positions
        masks["bias"] = position_bias if masks.get("bias") is None else masks["bias"] + position_bias
    call = AttentionCall(
        layer=link.layer if link else -1, q=query, k=key, v=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap, sinks=s_aux, **masks,
    )  # fmt: skip
    out = link.run(call) if link else attend(call).out
    return out.transpose(1, 2).contiguous(), None


def stacks(bridge: Bridge) -> dict[str, dict[int, Any]]:
    """Attention bridges by stack and layer.

    A model has one stack, named "", or an "encoder", a "decoder" and "cross" (the cross-attention). A hybrid model has
    bridges in some layers only. A vision–language model also has "vision" if the inside of its vision tower is bridged.
    """
    if not hasattr(bridge, "encoder_blocks"):
        layers = {i: getattr(block, "attn", None) for i, block in enumerate(bridge.blocks)}
        tower = getattr(getattr(bridge, "vision_encoder", None), "encoder_layers", None)
        vision = {} if tower is None else {"vision": {i: block.attn for i, block in enumerate(tower)}}
        return {"": {i: attn for i, attn in layers.items() if attn is not None}, **vision}
    encoder, decoder = bridge.encoder_blocks, bridge.decoder_blocks
    return {
        "encoder": {i: block.attn for i, block in enumerate(encoder)},
        "decoder": {i: block.self_attn for i, block in enumerate(decoder)},
        "cross": {i: block.cross_attn for i, block in enumerate(decoder)},
    }


def install(bridge: Bridge, instruments: dict[str, Instrument]) -> None:
    """Route every layer's attention of a bridge through its stack's instrument.

    Raises ModelError, which names the class, for attention that cannot be intercepted.
    """
    from transformer_lens.model_bridge.sources.native.model import NativeAttention
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _hf_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, compact_mask)
    attentions = [(name, layer, attn) for name, layers in stacks(bridge).items() for layer, attn in layers.items()]
    if not attentions:
        raise ModelError(
            f"{type(bridge.original_model).__name__} has no softmax attention in any of its {len(bridge.blocks)} "
            "layers (a recurrent or state-space model): there are no patterns for interp to read"
        )
    for stack, layer, attn in attentions:
        link = Link(instruments[stack], attn, layer)
        attn.__dict__[LINK] = link
        for module in attn.original_component.modules():  # e.g. BertSelfAttention calls us from inside BertAttention
            module.__dict__[LINK] = link
        adapt(attn)
    if not isinstance(attentions[0][2].original_component, NativeAttention):
        _select(bridge.original_model)


def _select(hf: Any) -> None:
    """Make a Hugging Face model call our functions for attention and masks.

    Models that predate the attention interface refuse the switch, but still build their masks as their config says;
    their attention modules are then reached through their bridges.
    """
    with suppress(ValueError, NotImplementedError):
        hf.set_attn_implementation(IMPLEMENTATION)
    for module in hf.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, CHOICE, None) == "eager":
            setattr(config, CHOICE, IMPLEMENTATION)
    configs = {id(c): c for module in hf.modules() if hasattr(c := getattr(module, "config", None), CHOICE)}
    hf.register_forward_pre_hook(ChosenAttention([(c, getattr(c, CHOICE)) for c in configs.values()]))


@dataclass
class ChosenAttention:
    """Forward pre-hook of a model: raises ModelError once another attention implementation has been chosen.

    Attention would then bypass the instrument: hooks, statistics and edits would be left out without a word, and some
    families would lose their causal mask.
    """

    configs: list[tuple[Any, str | None]]  # each config of the model, and its choice after `install`

    def __call__(self, _module: Any, _args: Any) -> None:
        """Compare each config's choice with that of loading."""
        for config, chosen in self.configs:
            if (now := getattr(config, CHOICE, None)) != chosen:
                raise ModelError(
                    f"the attention implementation of this model was changed to {now!r} after it was loaded, so that "
                    f"attention would bypass interp's hooks, statistics and edits: set_attn_implementation({chosen!r}) "
                    "puts it back; model.release() gives the plain model back"
                )
