"""Route a TransformerBridge's attention through headstats, and keep TransformerLens hooks working.

How attention is intercepted, by kind of bridge:

* Hugging Face modules call whatever function is registered under ``config._attn_implementation``. We
  register ours, with a mask function that hands over padding, causality and window instead of an n×n mask.
* TransformerLens' bridges for rotary and fused-QKV models re-implement attention densely. Each such
  object gets a generated subclass that keeps every hook and computes attention here.
* TransformerLens' own small models ("native") get the same treatment.

Everything ends in `Instrument.__call__`, the one place where a layer's attention is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import headstats
import torch
from torch import Tensor

from interp.errors import ModelError
from interp.model.attention_call import AttentionCall, dense_attention

IMPLEMENTATION = "interp_headstats"
_LINK = "_interp_link"
NO_STATISTICS = headstats.StatSpec.none()

Handler = Callable[[AttentionCall], Tensor]


@dataclass
class LayerRecord:
    """What happened in one layer since the last reset."""

    calls: int = 0
    backends: Counter[str] = field(default_factory=Counter)
    dense_because: str = ""


class Instrument:
    """Computes attention for every layer of one model, and remembers how.

    ``handler``, when set, replaces the computation (the engine uses it to pack many runs into one
    forward); ``spec`` asks the kernel for statistics, which collect in ``collected[layer]``.
    """

    def __init__(self, backend: str = "auto"):
        self.backend = backend
        self.handler: Handler | None = None
        self.spec: headstats.StatSpec | None = None
        self.collected: dict[int, headstats.AttentionStats] = {}
        self.layers: dict[int, LayerRecord] = {}

    def record(self, layer: int) -> LayerRecord:
        """The record of a layer, created on first use."""
        return self.layers.setdefault(layer, LayerRecord())

    def __call__(self, call: AttentionCall, bridge: Any) -> Tensor:
        """Attention output [B, H, M, Dv] of one layer; dense if that layer's scores or pattern are hooked."""
        record = self.record(call.layer)
        record.calls += 1
        hooked = [n for n in ("hook_attn_scores", "hook_pattern") if _has_hooks(bridge, n)]
        if hooked and self.spec is None and self.handler is None:
            record.backends["dense"] += 1
            record.dense_because = " and ".join(hooked) + " hooked"
            return dense_attention(call, bridge.hook_attn_scores, bridge.hook_pattern)
        if self.handler is not None:
            return self.handler(call)
        result = attend(call, spec=self.spec, backend=self.backend)
        record.backends[result.backend] += 1
        if self.spec is not None:
            self.collected[call.layer] = result.stats
        return result.out

    @contextmanager
    def handled_by(self, handler: Handler) -> Iterator[None]:
        """Let ``handler`` compute attention inside the block."""
        if self.handler is not None:
            raise RuntimeError("an attention handler is already active; handlers do not nest")
        self.handler = handler
        try:
            yield
        finally:
            self.handler = None

    @contextmanager
    def collecting(self, spec: headstats.StatSpec) -> Iterator[dict[int, headstats.AttentionStats]]:
        """Collect per-layer statistics of forwards inside the block."""
        self.spec, self.collected = spec, {}
        try:
            yield self.collected
        finally:
            self.spec = None


def attend(
    call: AttentionCall, *, spec: headstats.StatSpec | None = None, backend: str = "auto", **more: Any
) -> headstats.Attended:
    """Run a layer's attention through headstats. ``more``: further arguments of `headstats.attend`."""
    return headstats.attend(
        call.q, call.k, call.v,
        causal=call.causal, window=call.window, softcap=call.softcap, scale=call.scale, bias=call.bias,
        sinks=call.sinks, key_padding=call.key_padding,
        spec=NO_STATISTICS if spec is None else spec, backend=backend, **more,
    )  # fmt: skip


def _has_hooks(bridge: Any, name: str) -> bool:
    hook = getattr(bridge, name, None)
    return hook is not None and hook.has_hooks()


# ---------------------------------------------------------------- masks, without the n×n


@dataclass(frozen=True)
class MaskNote:
    """What a Hugging Face mask means, attached to the 2D padding tensor that our mask function returns."""

    causal: bool
    window: int | None


def _mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0,
    mask_function: Any = None, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True,
    local_size: int | None = None, device: Any = "cpu", **kwargs: Any,
) -> Tensor:  # fmt: skip
    """A transformers mask function: 2D padding plus a note for plain masks, a dense 4D mask for all others."""
    from transformers import masking_utils as mu

    kind = _mask_kind(mask_function, local_size, mu)
    everywhere = kind is not None and not kind.causal and kind.window is None  # cross-attention: no position counts
    aligned = everywhere or q_offset + q_length == kv_offset + kv_length
    padding_fits = attention_mask is None or attention_mask.shape[1] >= kv_length
    if kind is None or not aligned or not padding_fits or kwargs.get("use_vmap"):
        return mu.eager_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, device=device, **kwargs
        )
    if attention_mask is None:
        padding = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
    else:
        padding = attention_mask[:, -kv_length:].bool()
    padding = padding.clone()  # the note must not leak onto the caller's tensor
    padding.interp_note = kind  # type: ignore[attr-defined]
    return padding


def _mask_kind(function: Any, local_size: int | None, mu: Any) -> MaskNote | None:
    """Recognise transformers' plain causal, sliding-window and bidirectional masks; None for anything else."""
    if function is mu.causal_mask_function:
        return MaskNote(causal=True, window=None)
    if function is mu.bidirectional_mask_function:
        return MaskNote(causal=False, window=None)
    parts = _closure_of(function, "and_mask").get("mask_functions", ())
    if len(parts) == 2 and parts[1] is mu.causal_mask_function:
        window = _closure_of(parts[0], "inner_mask").get("sliding_window")
        if isinstance(window, int) and parts[0].__qualname__.startswith("sliding_window_overlay"):
            return MaskNote(causal=True, window=window)
    if len(parts) == 2 and parts[1] is mu.bidirectional_mask_function:
        window = _closure_of(parts[0], "inner_mask").get("sliding_window")
        if isinstance(window, int) and parts[0].__qualname__.startswith("sliding_window_bidirectional_overlay"):
            return MaskNote(causal=False, window=window + 1)  # theirs does not count the query's own position
    return None


def _closure_of(function: Any, name: str) -> dict[str, Any]:
    if getattr(function, "__name__", "") != name or not function.__closure__:
        return {}
    return dict(zip(function.__code__.co_freevars, (c.cell_contents for c in function.__closure__), strict=True))


def _read_mask(mask: Tensor | None) -> dict[str, Any]:
    """Mask as handed to an attention module → the mask fields of an AttentionCall."""
    if mask is None:  # no mask function ran: transformers' eager attention would then show every key
        return {"causal": False}
    note: MaskNote | None = getattr(mask, "interp_note", None)
    if note is not None:
        return {"causal": note.causal, "window": note.window, "key_padding": None if bool(mask.all()) else mask}
    if mask.ndim == 4:  # a dense mask, the model's or the user's own: authoritative as it stands
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, float("-inf"))
        else:
            mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min, float("-inf"))
        return {"causal": False, "bias": mask}
    raise ModelError(
        f"this model reshapes its attention mask (got {tuple(mask.shape)}) before attention, "
        "which interp does not support; please report the architecture"
    )


# ---------------------------------------------------------------- entry points from modules


def _hf_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, softcap: float | None = None,
    s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The function that transformers' attention modules call: [B, H, M, D] in, [B, M, H, Dv] out."""
    if dropout and module.training:
        raise ModelError("attention dropout is active: call model.eval() (interp runs models in evaluation mode)")
    link = module.__dict__.get(_LINK)
    if softcap is None:
        softcap = getattr(module, "attn_logit_softcapping", None)
    masks, position_bias = _read_mask(attention_mask), kwargs.get("position_bias")
    if position_bias is not None:  # T5's relative positions
        masks["bias"] = position_bias if masks.get("bias") is None else masks["bias"] + position_bias
    call = AttentionCall(
        layer=link.layer if link else -1, q=query, k=key, v=value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap, sinks=s_aux, **masks,
    )  # fmt: skip
    out = link.run(call) if link else attend(call).out
    return out.transpose(1, 2).contiguous(), None


@dataclass
class Link:
    """A plain attribute on an attention module that leads back to its bridge (not a submodule)."""

    instrument: Instrument
    bridge: Any
    layer: int

    def run(self, call: AttentionCall) -> Tensor:
        """Fire the post-rotation hooks, then compute attention."""
        from interp.model.attention_bridges import fire_latent

        if hasattr(self.bridge, "hook_q_latent"):
            return self.instrument(fire_latent(self.bridge, call), self.bridge)
        for name, hook in (("q", "hook_rot_q"), ("k", "hook_rot_k")):
            if _has_hooks(self.bridge, hook):
                call = replace(call, **{name: getattr(self.bridge, hook)(getattr(call, name))})
        return self.instrument(call, self.bridge)


def stacks(bridge: Any) -> dict[str, dict[int, Any]]:
    """Attention bridges by stack and layer: one nameless stack, or an encoder's, a decoder's and the cross-attention's.

    In a hybrid model only some layers are there. A vision–language model also has "vision", where the inside of its
    vision tower is bridged.
    """
    if not hasattr(bridge, "encoder_blocks"):
        layers = {i: getattr(block, "attn", None) for i, block in enumerate(bridge.blocks)}
        tower = getattr(getattr(bridge, "vision_encoder", None), "encoder_layers", None)
        seeing = {} if tower is None else {"vision": {i: block.attn for i, block in enumerate(tower)}}
        return {"": {i: attn for i, attn in layers.items() if attn is not None}, **seeing}
    encoder, decoder = bridge.encoder_blocks, bridge.decoder_blocks
    return {
        "encoder": {i: block.attn for i, block in enumerate(encoder)},
        "decoder": {i: block.self_attn for i, block in enumerate(decoder)},
        "cross": {i: block.cross_attn for i, block in enumerate(decoder)},
    }


def install(bridge: Any, instruments: dict[str, Instrument]) -> None:
    """Send every layer's attention of a TransformerBridge through its stack's instrument.

    Raises ModelError, naming the class, for attention that cannot be intercepted.
    """
    from transformer_lens.model_bridge.sources.native.model import NativeAttention
    from transformers import AttentionInterface, AttentionMaskInterface

    from interp.model.attention_bridges import adapt

    AttentionInterface.register(IMPLEMENTATION, _hf_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    attentions = [(name, layer, attn) for name, layers in stacks(bridge).items() for layer, attn in layers.items()]
    if not attentions:
        raise ModelError(
            f"{type(bridge.original_model).__name__} has no softmax attention in any of its {len(bridge.blocks)} "
            "layers (a recurrent or state-space model): there are no patterns for interp to read"
        )
    for stack, layer, attn in attentions:
        link = Link(instruments[stack], attn, layer)
        attn.__dict__[_LINK] = link
        for module in attn.original_component.modules():  # e.g. BertSelfAttention calls us from inside BertAttention
            module.__dict__[_LINK] = link
        adapt(attn)
    if not isinstance(attentions[0][2].original_component, NativeAttention):
        _select(bridge.original_model)


def _select(hf: Any) -> None:
    """Make a Hugging Face model's attention and masks go to our functions.

    Models that predate the attention interface refuse the switch, but still build their masks by the
    config's word; their modules are then reached through their bridges.
    """
    with suppress(ValueError, NotImplementedError):
        hf.set_attn_implementation(IMPLEMENTATION)
    for module in hf.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "_attn_implementation", None) == "eager":
            config._attn_implementation = IMPLEMENTATION
