"""Subclasses of TransformerLens' attention bridges that call the instrument.

They keep all hooks. `adapt` replaces the class of one bridge object. Bridges that only wrap a Hugging Face module need
no change: the module itself calls our registered function.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from interp.errors import ModelError
from interp.model.attention_call import AttentionCall
from interp.model.instrument import LINK
from interp.model.masks import read_mask

_LENGTH = "_interp_length"  # attribute: positions in the current forward of the original module; None outside one


def adapt(attn: Any) -> None:
    """Make one attention bridge compute attention through its link.

    Changes the native module instead, if there is one. Raises ModelError for a bridge that computes attention in its
    own way (e.g. DeepSeek's sparse attention).
    """
    from transformer_lens.model_bridge.generalized_components import alibi_joint_qkv_attention as alibi
    from transformer_lens.model_bridge.generalized_components import bloom_attention as bloom
    from transformer_lens.model_bridge.generalized_components import joint_qkv_attention as joint
    from transformer_lens.model_bridge.generalized_components import (
        joint_qkv_position_embeddings_attention as joint_rope,
    )
    from transformer_lens.model_bridge.generalized_components import mla_attention as mla
    from transformer_lens.model_bridge.generalized_components import mpt_alibi_attention as mpt
    from transformer_lens.model_bridge.generalized_components import position_embeddings_attention as rope
    from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
    from transformer_lens.model_bridge.sources.native.model import NativeAttention

    module = attn.original_component
    if isinstance(module, NativeAttention):
        module.__class__ = _subclass(type(module), "forward", _native_forward)
        return
    kind = type(attn)
    if issubclass(kind, rope.PositionEmbeddingsAttentionBridge):
        # Subclasses adapt TransformerLens' implementation (NoPE layers, norms); the original module handles these too.
        attn.__class__ = _subclass(kind, "forward", _rope_forward)
        _hook_norms(attn)
        if hasattr(attn, "hook_q_gate"):
            attn.q.register_forward_hook(_gate_hook(attn))
        return
    if kind.forward is mla.MLAAttentionBridge.forward:
        attn.__class__ = _subclass(kind, "forward", _latent_forward)
        _hook_latents(attn)
        return
    plain = (joint.JointQKVAttentionBridge, joint_rope.JointQKVPositionEmbeddingsAttentionBridge)
    linear_bias = (alibi.ALiBiJointQKVAttentionBridge, bloom.BloomAttentionBridge, mpt.MPTALiBiAttentionBridge)
    reconstruct = getattr(kind, "_reconstruct_attention", None)
    if any(reconstruct is base._reconstruct_attention for base in (*plain, *linear_bias)):
        attn.__class__ = _subclass(kind, "_reconstruct_attention", _joint_reconstruct)
    elif kind.forward is not AttentionBridge.forward:
        raise ModelError(
            f"{type(module).__name__} computes attention in a way of its own (TransformerLens: {kind.__name__}), "
            "which interp cannot route through its kernel; its statistics and edits would be wrong, so it is refused"
        )
    elif callable(getattr(module, "_attn", None)):
        module.__class__ = _subclass(type(module), "_attn", _inner_attention)


@cache
def _subclass(base: type, method: str, function: Any) -> type:
    """Generate one subclass per (class, method).

    Instances still pass isinstance checks, and their state can be pickled.
    """
    return type(f"Instrumented{base.__name__}", (base,), {method: function, "__module__": __name__})


def _hook_norms(attn: Any) -> None:
    """Fire ``hook_q_normed`` and ``hook_k_normed`` in the original module.

    They see its query and key norms. TransformerLens shows per-head norms as [batch, heads, position, d_head]. Some
    models (Qwen 3) apply the norm before they transpose. There the norm's input is transposed to TransformerLens'
    layout, and its output back.
    """
    for name in ("q", "k"):
        norm, hook = getattr(attn, f"{name}_norm", None), getattr(attn, f"hook_{name}_normed", None)
        if norm is None or hook is None:
            continue
        transposed: list[bool] = []

        def before(module: Any, args: Any, transposed: list[bool] = transposed) -> Any:
            length = attn.__dict__.get(_LENGTH)
            x = args[0]
            positions_first = length is not None and x.ndim == 4 and x.shape[1] == length
            # With as many heads as positions the shape is ambiguous; a transposed view is not contiguous.
            positions_first = positions_first and (x.shape[2] != length or x.is_contiguous())
            transposed.append(bool(positions_first and not attn._qk_norm_per_head))
            return (x.transpose(1, 2), *args[1:]) if transposed[-1] else None

        def after(module: Any, args: Any, out: Any, transposed: list[bool] = transposed, hook: Any = hook) -> Any:
            was_transposed = transposed.pop()
            if attn.__dict__.get(_LENGTH) is None:  # TransformerLens' own forward fires the hook itself
                return None
            out = hook(out)
            return out.transpose(1, 2) if was_transposed else out

        norm.register_forward_pre_hook(before)
        norm.register_forward_hook(after)


def _gate_hook(attn: Any) -> Any:
    """Make a hook that fires ``hook_q_gate``.

    The query projection gives each head's query, then its output gate.
    """

    def after(module: Any, args: Any, out: Tensor) -> Tensor | None:
        if attn.__dict__.get(_LENGTH) is None:  # TransformerLens' own forward fires the hook itself
            return None
        query, gate = out.unflatten(-1, (int(attn.config.n_heads), -1)).chunk(2, dim=-1)
        gate = attn.hook_q_gate(gate.flatten(-2)).view_as(gate)
        return torch.cat([query, gate], dim=-1).flatten(-2)

    return after


def _delegate(self: Any, hidden: Tensor, args: Any, kwargs: Any) -> Any:
    """Run the original module.

    The norm hooks can see that it runs, and on how many positions.
    """
    self.__dict__[_LENGTH] = hidden.shape[1]
    try:
        return self.original_component(hidden, *args, **kwargs)
    finally:
        self.__dict__[_LENGTH] = None


def _fire_inputs(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    """Fire the hooks of attention's inputs.

    Return its hidden states and the remaining arguments.
    """
    if "hidden_states" in kwargs:
        hidden = kwargs.pop("hidden_states")
    else:
        hidden, args = args[0], args[1:]
    hidden = self.hook_in(hidden)
    if kwargs.get("position_embeddings") is not None:
        kwargs["position_embeddings"] = self._apply_position_embedding_hooks(kwargs["position_embeddings"])
    return hidden, args


def _rope_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Delegate to the Hugging Face forward.

    Its projections are TransformerLens' hooked linears. While per-head input hooks are on (``use_split_qkv_input``,
    ``use_attn_in``), projections differ between heads. Then TransformerLens' own dense forward runs, and the layer is
    reported as dense.
    """
    config = self.config
    if getattr(config, "use_split_qkv_input", False) or getattr(config, "use_attn_in", False):
        return _tl_forward(self, args, kwargs)
    hidden, args = _fire_inputs(self, args, kwargs)
    if getattr(config, "use_attn_result", False):
        return self.hook_out(_with_result(self, hidden, args, kwargs)), None
    out = _delegate(self, hidden, args, kwargs)
    return (self.hook_out(out[0]), *out[1:]) if isinstance(out, tuple) else self.hook_out(out)


def _hook_latents(attn: Any) -> None:
    """Fire ``hook_q_latent`` and ``hook_kv_latent`` in the original module.

    They see the outputs of its compressing projections.
    """
    for norm, hook in (("q_a_layernorm", attn.hook_q_latent), ("kv_a_layernorm", attn.hook_kv_latent)):
        module = getattr(attn.original_component, norm, None)  # queries are not always compressed
        if module is not None:
            module.register_forward_hook(lambda _module, _args, out, hook=hook: hook(out))
    # transformers adds a head axis to the latent for its cache; the projection's hooks show it without that axis
    attn.original_component.kv_b_proj.register_forward_pre_hook(lambda _module, args: (args[0].squeeze(1),))


def _latent_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Delegate multi-head latent attention (DeepSeek) to the Hugging Face forward.

    That forward decompresses keys.
    """
    hidden, args = _fire_inputs(self, args, kwargs)
    kwargs["past_key_values"] = _HookedCache(self, kwargs.get("past_key_values"))
    if getattr(self.config, "use_attn_result", False):
        return self.hook_out(_with_result(self, hidden, args, kwargs)), None
    out = _delegate(self, hidden, args, kwargs)
    return (self.hook_out(out[0]), *out[1:])


class _HookedCache:
    """Wraps a latent attention's KV cache (or none).

    It fires the hook of the rotated key before the key is stored. The cache holds the latent and one rotated key for
    all heads; per-head keys and values are computed from them again at every step.
    """

    def __init__(self, attn: Any, cache: Any):
        self.attn, self.cache = attn, cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, latent: Tensor, rotated: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store this step's latent and rotated key; return those of all positions so far."""
        rotated = self.attn.hook_rot_k(rotated)
        return (latent, rotated) if self.cache is None else self.cache.update(latent, rotated, *args, **kwargs)


def _with_result(self: Any, hidden: Tensor, args: Any, kwargs: Any) -> Tensor:
    """Compute the attention output as the sum of hooked per-head results.

    These are computed from the output projection's input, z.
    """
    z_inputs: list[Tensor] = []

    def keep(_module: Any, inputs: Any) -> None:
        z_inputs.append(inputs[0])

    handle = self.o.original_component.register_forward_pre_hook(keep)
    try:
        _delegate(self, hidden, args, kwargs)
    finally:
        handle.remove()
    n_heads = int(self.config.n_heads)
    z = z_inputs[0].unflatten(-1, (n_heads, -1))
    return self._compute_per_head_result(z, n_heads, z.shape[-1])


def _tl_forward(self: Any, args: Any, kwargs: Any) -> Any:
    """Run TransformerLens' dense forward, with the mask in the form that it expects."""
    link = self.__dict__[LINK]
    record = link.instrument.record(link.layer)
    record.calls += 1
    record.count("transformer_lens", "use_split_qkv_input or use_attn_in is on")
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    mask = kwargs.get("attention_mask")
    m = hidden.shape[1]
    empty = hidden.new_empty(hidden.shape[0], 1, m, 1)
    call = AttentionCall(link.layer, empty, empty, empty, 1.0)
    if any(link.instrument.with_edits(call).edits):
        raise ModelError(
            f"layer {link.layer}: attention edits and masks do not reach attention whose heads have inputs of their "
            "own (use_split_qkv_input or use_attn_in is on): turn that off"
        )
    if mask is not None and mask.ndim == 2:
        n = mask.shape[1]
        call = replace(call, k=hidden.new_empty(hidden.shape[0], 1, n, 1), **read_mask(mask))
        visible = call.visible()
        zeros = hidden.new_zeros(hidden.shape[0], 1, m, n)
        kwargs["attention_mask"] = (
            zeros if visible is None else zeros.masked_fill(~visible, torch.finfo(hidden.dtype).min)
        )
    return type(self).__mro__[1].forward(self, *args, **kwargs)  # type: ignore[attr-defined]


def _joint_reconstruct(self: Any, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
    """Compute attention of fused-QKV models from hooked q, k and v.

    TransformerLens has split and hooked these. For GPT-2, GPT-NeoX and Phi-3; and for Bloom, MPT and Falcon with their
    linear biases (ALiBi).
    """
    config = self.config
    n_heads = int(config.n_heads)
    n_kv = int(getattr(config, "n_key_value_heads", None) or n_heads)
    clip = getattr(self, "_clip_qkv", None)
    if clip:
        q, k, v = (x.clamp(min=-clip, max=clip) for x in (q, k, v))
    q, k, v, batch, length, d_head = self._reshape_qkv_to_heads(q, k, v, n_heads, n_kv)
    embeddings = kwargs.get("position_embeddings")
    if embeddings is not None and hasattr(self, "_apply_rotary_pos_emb"):
        cos, sin = self._apply_position_embedding_hooks(embeddings)
        q, k = self._apply_rotary_pos_emb(q, k, cos, sin)
    k, v = self._update_kv_cache(k, v, **kwargs)
    scale = getattr(self, "_softmax_scale", None) or d_head**-0.5
    if getattr(config, "scale_attn_by_inverse_layer_idx", False) and self._layer_idx is not None:
        scale /= self._layer_idx + 1
    masks = read_mask(kwargs.get("attention_mask"))
    bias = _linear_bias(self, kwargs, n_heads, k.shape[2], scale)
    if bias is not None:
        masks["bias"] = bias if masks.get("bias") is None else masks["bias"] + bias
    link = self.__dict__[LINK]
    out = link.run(AttentionCall(link.layer, q, k, v, scale, **masks))
    out = self._reshape_attn_output(out, batch, length, n_heads, out.shape[-1])
    if getattr(config, "use_attn_result", False):
        z = self.o.hook_in(out).unflatten(-1, (n_heads, -1))
        # the projection itself does not run; BLOOM's attn_out is the hook of its output
        return self.o.hook_out(self._compute_per_head_result(z, n_heads, z.shape[-1])), None
    return self._apply_output_projection(out), None


def _linear_bias(self: Any, kwargs: Any, n_heads: int, n_keys: int, scale: float) -> Tensor | None:
    """ALiBi as an additive bias [batch or 1, heads, 1, keys].

    Softmax ignores a constant per row. Bloom and Falcon pass [batch · heads, 1, keys] in ``alibi`` (Falcon scales it
    with the scores). MPT passes [heads, 1, max_keys] in ``position_bias``, counted backwards from the last key.
    """
    from transformer_lens.model_bridge.generalized_components.alibi_joint_qkv_attention import (
        ALiBiJointQKVAttentionBridge,
    )

    if kwargs.get("position_bias") is not None:
        return kwargs["position_bias"][None, :, :, -n_keys:]
    alibi = kwargs.get("alibi")
    if alibi is None:
        return None
    bias = alibi.reshape(-1, n_heads, 1, alibi.shape[-1])
    if bias.shape[-1] < n_keys:  # decoding with a cache: the same slopes, more keys
        slope = bias[..., 1:2] - bias[..., 0:1]
        bias = slope * torch.arange(n_keys, device=bias.device, dtype=bias.dtype)
    bias = bias[..., :n_keys]
    return bias * scale if isinstance(self, ALiBiJointQKVAttentionBridge) else bias


def _inner_attention(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Replace the ``_attn`` method of GPT-J, CodeGen and GPT-Neo modules.

    Tensors are [B, H, M, D], in and out. GPT-Neo does not scale its scores, and alternates between global and local
    layers.
    """
    link = self.__dict__[LINK]
    masks = read_mask(attention_mask)
    scale = 1 / float(self.scale_attn) if hasattr(self, "scale_attn") else 1.0
    if getattr(self, "attention_type", None) == "local":
        masks["window"] = int(self.config.window_size)
    call = AttentionCall(link.layer, query.to(value.dtype), key.to(value.dtype), value, scale, **masks)
    return link.run(call), None


def _native_forward(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    pattern_fn: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute TransformerLens' native attention.

    The dense path itself fires the pattern hook, ``pattern_fn``.
    """
    from interp.model.instrument import LINK

    heads = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
    q, k, v = (
        getattr(self, name)(hidden_states).unflatten(-1, (n, self.d_head)).transpose(1, 2) for name, n in heads.items()
    )
    if self.rotary is not None:
        q, k = self.rotary.apply_rope(q, k, position_ids=position_ids)
    masks: dict[str, Any] = {"causal": self.causal}
    if attention_mask is not None and attention_mask.ndim == 2:
        masks["key_padding"] = attention_mask.bool()
    elif attention_mask is not None:
        # Native convention: a 4D bool mask is True where HIDDEN; an additive mask hides values below −1.
        hidden = attention_mask if attention_mask.dtype == torch.bool else attention_mask < -1.0
        masks["bias"] = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, float("-inf"))
    link = self.__dict__[LINK]
    softcap = self.attn_scores_soft_cap if self.attn_scores_soft_cap > 0 else None
    call = AttentionCall(link.layer, q, k, v, 1 / self.scale, softcap=softcap, **masks)
    out = link.run(call).transpose(1, 2).flatten(2)
    return self.o(out), None
