"""`load`, and Model: a model whose attention goes through headstats."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from interp.errors import SiteError
from interp.interventions import AttentionChange
from interp.model.batching import collate, equal_length_batches
from interp.model.buffers import buffer_state
from interp.model.edited import edited
from interp.model.generation.generating import Generating
from interp.model.head_checks import check_heads, recorded
from interp.model.input_checks import (
    mask_positions,
    needs_images,
    refuse_nan_weights,
    refuse_text,
    refuse_wrong_inputs,
    vector_width,
    vocabulary_size,
    why_one_token,
)
from interp.model.install import install, stacks
from interp.model.instrument import Instrument
from interp.model.layer_progress import by_layer
from interp.model.loading import special_tokens_of
from interp.model.measures import Measures
from interp.model.protocols import Bridge
from interp.model.residual_check import recorded_sum, sum_fault
from interp.model.session import in_session
from interp.model.verification import count_hooks, probe, reads_of, verify
from interp.prompts.coder import Coder
from interp.prompts.embeddings import Embeddings
from interp.prompts.images import ImageReader, layout_of, output_of
from interp.prompts.special_tokens import SpecialTokens
from interp.prompts.text_encoder import TextEncoder
from interp.utils.progress import progress
from interp.utils.provenance import versions

if TYPE_CHECKING:
    pass

log = logging.getLogger("interp")

DENSE_HOOKS = ("hook_attn_scores", "hook_pattern")
# Hooks that TransformerLens fires only while a switch of its config is on; it warns about requests for them otherwise.
GATED_HOOKS = {
    "hook_result": "use_attn_result",
    "hook_mlp_in": "use_hook_mlp_in",
    "hook_attn_in": "use_attn_in",
    "hook_q_input": "use_split_qkv_input",
    "hook_k_input": "use_split_qkv_input",
    "hook_v_input": "use_split_qkv_input",
}


class Model(Measures, Generating):
    """A model, its tokenizer, and the instrument that computes its attention.

    ``bridge`` is TransformerLens' TransformerBridge; all its hooks work. ``model(tokens)`` returns logits.
    ``tokenizer``: the Hugging Face tokenizer (None for a bare TransformerLens model). ``special_tokens``: those that
    stand around every text, see ``bos=`` of `load`.
    """

    def __init__(
        self, bridge: Bridge, *, name: str, backend: str = "auto", tokenizer: Any = None,
        special: SpecialTokens | None = None,
    ):  # fmt: skip
        super().__init__(bridge, name)
        self.tokenizer = bridge.tokenizer if tokenizer is None else tokenizer
        try:
            self.special_tokens = special_tokens_of(bridge, name) if special is None else special
            self._install(bridge, backend)
        except BaseException:
            for stage in self.wiring.stages():
                stage.undo()
            raise
        self._wired()

    def _install(self, bridge: Bridge, backend: str) -> None:
        """Route attention through headstats and check that outputs stay the same."""
        self.instruments = {stack: Instrument(backend, self.session.lock) for stack in stacks(bridge)}
        self.instrument = self.instruments.get("") or self.instruments["decoder"]
        refuse_nan_weights(bridge.original_model)
        bridge.eval()
        self.reads = reads_of(bridge.original_model)
        eager_output, n_positions = probe(self)
        install(bridge, self.instruments)
        with recorded(bridge, self.instruments, stacks(bridge)) as replays, recorded_sum(bridge) as sums:
            verify(self, eager_output)
        self.head_axes, self._sum_fault = check_heads(bridge, replays), sum_fault(sums)
        for (stack, component), fault in self.head_axes.faults.items():
            log.warning("%s: %s is not addressed by head: %s", self.name, f"{stack} {component}".strip(), fault)
        for instrument in self.instruments.values():
            instrument.layers.clear()
        self._has_warned_about_cache = False
        self._layers_with: dict[str, list[int]] = {}
        self._n_hooks_at_load = count_hooks(bridge)
        self._buffers_at_load = buffer_state(bridge.original_model)
        self._layout = layout_of(bridge.original_model.config, n_positions) if self.reads == "images" else None

    # ------------------------------------------------------------ text

    @property
    def coder(self) -> Coder:
        """Converts prompts into tokens.

        It adds the model's ``special_tokens``.
        """
        text = self._text_encoder()
        encode_image_pair = None if self.pictures is None else self.pictures.encode_pair
        encode = partial(refuse_text, self.name) if needs_images(self) else text.encode
        return Coder(
            encode, text.texts, text.offsets, text.continuation, encode_image_pair, text.unknown, text.following,
            None if self.instrument.edited is None else self.instrument.edited.name_tokens, why_one_token(self),
        )  # fmt: skip

    def _text_encoder(self) -> TextEncoder:
        mask = getattr(self.tokenizer, "mask_token", None) if self.masked else None
        n_tokens, width = vocabulary_size(self), vector_width(self)
        return TextEncoder(self.name, self.tokenizer, self.special_tokens, self.n_ctx, n_tokens, mask, width)

    @property
    def pictures(self) -> ImageReader | None:
        """Converts images into this model's inputs; None if it reads no images."""
        if "images" not in self.reads:
            return None
        text = None
        if self.tokenizer is not None and self._layout is None:
            encoder = self._text_encoder()
            text = Coder(
                encoder.encode, encoder.texts, encoder.offsets, encoder.continuation, following=encoder.following
            )
        return ImageReader(self.name, self.bridge.original_model, self._layout, text, self.n_ctx)

    # ------------------------------------------------------------ forwards

    @in_session
    def __call__(self, tokens: Any, **kwargs: Any) -> Any:
        """Logits of the bridge: ``model("text")`` or ``model(tokens [batch, position])``.

        Raises PromptError for images passed to a text model, for tokens on another device, and for more tokens than
        the model's context (``model.bridge(tokens)`` runs these nevertheless).
        """
        if isinstance(tokens, Embeddings) and not kwargs:
            return self.forward([self.coder.encode(tokens)], len(tokens))
        refuse_wrong_inputs(self, tokens, kwargs)
        return self.bridge(tokens, **kwargs)

    @in_session
    def run_with_cache(self, tokens: Any, **kwargs: Any) -> Any:
        """Run TransformerLens' ``run_with_cache``.

        By default scores and patterns of attention are not cached. Caching those two makes a layer dense. Request them
        with ``names_filter``; then only the layers that it names leave the kernel.
        """
        refuse_wrong_inputs(self, tokens, kwargs)
        if kwargs.get("names_filter") is None:
            off = [h for h, switch in GATED_HOOKS.items() if not getattr(self.bridge.cfg, switch, False)]
            kwargs["names_filter"] = lambda name: not name.endswith((*DENSE_HOOKS, *off))
            if not self._has_warned_about_cache:
                self._has_warned_about_cache = True
                log.warning(
                    "run_with_cache leaves hook_attn_scores and hook_pattern out, so that attention stays on the "
                    "kernel; name them in names_filter= to get them (shown once)"
                )
        return self.bridge.run_with_cache(tokens, **kwargs)

    @contextmanager
    def edited(self, *edits: AttentionChange) -> Iterator[Model]:
        """Edit every forward inside the block: plain calls, statistics, recipes, circuits.

            with model.edited(interp.AttentionEdit(keys="image", gain=0.5, layers=range(8, 20))):
                model.attention_stats(prompts)
                interp.patch(model, pairs, sites)      # a patch of the edited model

        Blocks nest: the outer edits act too. Provenance of results inside names the edits under ``edited``. Edits name
        tokens by position, or by the spans of the prompts that are run. Raises SiteError for a layer or a head that the
        model does not have, and PromptError where a prompt does not have the tokens.
        """
        with edited(self, edits):
            yield self

    @in_session
    @torch.no_grad()
    def next_token_logits(self, ids: Sequence[Sequence[int]]) -> Float[Tensor, "prompts vocab"]:
        """Logits after the last token of each prompt, float32 on the CPU.

        Lengths may differ (no padding is used).
        """
        out: list[Tensor | None] = [None] * len(ids)
        with progress("run the prompts", len(ids)) as advance:
            for batch in equal_length_batches(ids):
                with by_layer(self, advance, len(batch)):
                    logits = self.last_logits([ids[i] for i in batch])
                for i, row in zip(batch, logits, strict=True):
                    out[i] = row.float().cpu()
        return torch.stack([row for row in out if row is not None])

    @in_session
    def last_logits(self, prompts: Tensor | Sequence[Sequence[int]]) -> Float[Tensor, "batch vocab"]:
        """The logits that metrics read, for prompts of equal shape.

        ``prompts``: tokens [batch, position], or a list of `interp.prompts.model_input.ModelInput`. The logits are
        those of the last position; for a masked language model, those at the prompt's only mask token; for a vision
        encoder, its class logits, or else its embedding or pooled output.
        """
        logits = self.forward(prompts)
        if self.reads == "images":
            return logits
        if self.masked:
            tokens = prompts if isinstance(prompts, Tensor) else torch.tensor(prompts, device=self.device)
            return logits[torch.arange(len(tokens)), mask_positions(self, tokens)]
        return logits[:, -1]

    @in_session
    def logits_from(self, prompts: Sequence[Sequence[int]], row: int) -> tuple[Float[Tensor, "batch rows vocab"], int]:
        """The logits after every token from ``row`` on, for prompts of equal shape, and the row of the first of them.

        Models that take no ``logits_to_keep`` compute all: the first row is then 0.
        """
        n = len(prompts[0])
        logits = self.forward(prompts, n - row)
        return logits, n - logits.shape[1]

    @property
    def headless(self) -> bool:
        """Whether this is a language model without its head (BertModel).

        Its outputs are then hidden states, not logits.
        """
        head = getattr(self.bridge.original_model, "get_output_embeddings", lambda: None)()
        return self.reads == "text" and head is None and not hasattr(self.bridge, "unembed")

    @property
    def masked(self) -> bool:
        """Whether this is a masked language model, which fills in its mask token.

        For example BERT, RoBERTa, ModernBERT.
        """
        return type(self.bridge.original_model).__name__.endswith("ForMaskedLM")

    @in_session
    def forward(self, prompts: Tensor | Sequence[Sequence[int]], last: int = 1) -> Tensor:
        """Run prompts of equal shape, with hooks.

        Returns logits [batch, position, vocab], or one row for each prompt for a vision encoder. ``last``: how many of
        the last positions need logits; models that cannot leave the others out return all.
        """
        options = self._forward_options(last)
        if isinstance(prompts, Tensor):
            return self.bridge(prompts, **options)
        inputs = collate(prompts, self.device, self.dtype)
        if "inputs_embeds" in inputs:  # hooks of the token embedding see the vectors in its output's place
            if self.instrument.edited is not None:
                self.instrument.edited.expect([p for p in prompts if isinstance(p, Embeddings)])
            inputs["inputs_embeds"] = self.bridge.embed.hook_out(inputs["inputs_embeds"])
        if list(inputs) == ["input_ids"]:
            return self.bridge(inputs["input_ids"], **options)
        output = self.bridge.original_model(**inputs, **options)
        return output_of(output) if self.reads == "images" else output.logits

    def _forward_options(self, last: int) -> dict[str, Any]:
        """Options that avoid a KV cache and logits of earlier positions.

        Options that the model does not support are left out.
        """
        accepted = inspect.signature(self.bridge.original_model.forward).parameters
        return {k: v for k, v in {"use_cache": False, "logits_to_keep": last}.items() if k in accepted}

    def provenance(self) -> dict[str, Any]:
        """What reproducing a result requires.

        The keys are model, weights, dtype, device, backend, bos (whether a BOS token stands in front of every text;
        None for a tokenizer without one) and package versions; also ``matmul_precision``, if
        `torch.set_float32_matmul_precision` lets float32 products be rounded further.
        """
        precision = torch.get_float32_matmul_precision()
        return {
            "model": self.name,
            "weights": self.fingerprint(),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "backend": self.instrument.backend,
            "bos": self.special_tokens.stand_in_front(()),
            "versions": versions(),
            **({} if precision == "highest" else {"matmul_precision": precision}),
            **({} if self.instrument.edited is None else {"edited": self.instrument.edited.texts}),
        }

    # ------------------------------------------------------------ trust

    def check_axes(self, component: str) -> None:
        """Raise SiteError if ``component`` is not what its name says, as the check at load has found."""
        if fault := self._sum_fault if component == "resid_mid" else self.head_axes.fault(component):
            raise SiteError(f"{component!r} of {self.name} is refused: {fault}")

    def hooks_added(self) -> bool:
        """Whether modules have other forward hooks than when the model was loaded.

        What these do is unknown.
        """
        return count_hooks(self.bridge) != self._n_hooks_at_load
