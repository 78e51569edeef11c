"""Measures: what a model says of its attention and of its confidence on prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import headstats
import torch
from jaxtyping import Float
from torch import Tensor

from interp.model.collect_by_span import prompt_span_stats, span_request, tower_span_stats
from interp.model.collect_statistics import check_kind, prompt_stats, tower_stats
from interp.model.encoder_decoder import stack_stats
from interp.model.facts import ModelFacts
from interp.model.loaded_model import LoadedModel
from interp.model.session import in_session
from interp.model.stack_by_span import stack_span_stats
from interp.prompts.embeddings import Embeddings
from interp.prompts.pairs import Prompt, PromptPair
from interp.results.attention_patterns import AttentionPatterns
from interp.results.attention_stats import AttentionStats
from interp.results.span_stats import SpanStats

if TYPE_CHECKING:
    from interp.model.likelihood import Masking


class Measures(ModelFacts):
    """The part of `Model` that measures prompts."""

    @overload
    def attention_stats(
        self: LoadedModel,
        prompts: Any = (),
        spec: headstats.StatSpec | None = None,
        *,
        pixel_values: Tensor | None = None,
        target: Any = None,
        stack: str | None = None,
        by: Literal["token"] = "token",
    ) -> AttentionStats: ...

    @overload
    def attention_stats(
        self: LoadedModel,
        prompts: Any = (),
        spec: headstats.StatSpec | None = None,
        *,
        pixel_values: Tensor | None = None,
        target: Any = None,
        stack: str | None = None,
        by: Literal["span", "sentence"],
        spans: Iterable[str] | str | None = None,
        targets: Any = None,
        key_features: Mapping[str, Any] | None = None,
    ) -> SpanStats: ...

    @in_session
    @torch.no_grad()
    def attention_stats(
        self: LoadedModel,
        prompts: str | Prompt | PromptPair | Embeddings | Tensor | Mapping[str, Any] | Iterable[Any] = (),
        spec: headstats.StatSpec | None = None,
        *,
        pixel_values: Tensor | None = None,
        target: str | Prompt | Sequence[str | Prompt] | None = None,
        stack: str | None = None,
        by: str = "token",
        spans: Iterable[str] | str | None = None,
        targets: Any = None,
        key_features: Mapping[str, Any] | None = None,
    ) -> AttentionStats | SpanStats:
        """Per-head attention statistics of one prompt or several, by token or by span.

        Of a pair, the clean prompt is used.

            stats = model.attention_stats("When Mary and John went to the store, John gave a drink to")
            stats.frame()      # example, layer, head, position, one column per statistic
            model.attention_stats(prompts, spec=headstats.StatSpec(entropy=True, sink=4))
            model.attention_stats(text, by="sentence").frame()      # example, layer, head, query_span, key_span, …

        ``spec`` selects the statistics (default: `headstats.StatSpec()`). By token, those with more than one number per
        position (topk) are left out, and ``provenance["left_out"]`` names them. No n×n pattern is built, on any backend
        except ``reference``. Layers without softmax attention (in hybrid models) hold NaN, and −1 for indices.

        ``by="span"`` returns `SpanStats`: what each named span of a prompt reads of each, as means over the tokens of
        the query span. Without a ``spec`` these are the mass on the key span (``segments``) and the default statistics;
        ``segment_value_norms``, ``segment_outputs``, ``topk`` and all others can be requested. A token that overlaps a
        span's characters belongs to it; the tokens in no span are the span "(other)". Spans must not share tokens:
        ``spans`` names those that divide the prompts (default: all). ``by="sentence"`` divides a text into its
        sentences (``sentence_1``, …) instead.  ``targets``: keys whose weights are returned, as positions or ends of
        spans (``"subject:last"``), or ``{name: keys}`` with one list for each prompt that holds a key for each query
        (−1: none).  ``key_features``: ``{name: numbers}``, numbers of each key to average under the weights.

        A vision encoder takes images [channel, height, width] as its processor returns them (or ``pixel_values=``, a
        batch of them); its positions are CLS, registers and patches. A vision–language model takes what its processor
        returns for images and text; ``stack="vision"`` measures the heads of its vision tower instead, with one
        example for each image.

        An encoder–decoder takes a source (text, or a speech model's input features) and its ``target``, and measures
        one ``stack``: "encoder", "decoder" (its self-attention) or "cross" (default: what each decoder head reads of
        the source).

        Raises PromptError for bad prompts, spans and statistics, before any forward.
        """
        request = span_request(by, spans, targets, key_features)
        spec, is_tower = check_kind(spec), stack == "vision" and "vision" in self.instruments and target is None
        if not is_tower and (self.stacks or target is not None or stack is not None):
            if request is None:
                return stack_stats(self, prompts, target, stack, spec)
            return stack_span_stats(self, prompts, target, stack, spec, request)
        given = prompts if is_tower or pixel_values is None else pixel_values
        if request is None:
            return tower_stats(self, given, spec) if is_tower else prompt_stats(self, given, spec)
        collect = tower_span_stats if is_tower else prompt_span_stats
        return collect(self, given, spec, request)

    @in_session
    def attention_patterns(
        self: LoadedModel,
        prompts: str | Prompt | PromptPair | Iterable[str | Prompt | PromptPair],
        heads: Iterable[Any] | None = None,
        exact: Iterable[Any] = (),
        *,
        resolution: int = 256,
        topk: int = 8,
        rows: int = 8,
    ) -> AttentionPatterns:
        """Attention maps of one prompt or a few, for viewing: see `AttentionPatterns`.

        No n×n pattern is built. ``heads``: the heads whose maps are stored, as (layer, head), ``"L9H6"`` or sites
        (default: all). ``exact``: heads for which, on a prompt longer than ``resolution`` tokens, every query's
        ``topk`` largest weights and ``rows`` whole rows are stored as well. For a pair both prompts are run. Segments
        are the prompt's named spans, else its sentences, else stretches of equal length. Raises PromptError or
        SiteError before any forward.
        """
        from interp.model.collect_patterns import prompt_patterns

        return prompt_patterns(self, prompts, heads, exact, resolution, topk, rows)

    @in_session
    @torch.no_grad()
    def confidence(
        self: LoadedModel, prompts: str | Prompt | PromptPair | Tensor | Mapping[str, Any] | Iterable[Any]
    ) -> Any:
        """How sure the model is along each prompt: a DataFrame with one row for each token.

            table = model.confidence("The Eiffel Tower is in Paris")
            table[["token", "next", "probability", "entropy", "margin"]]
            table.groupby("example")["logprob"].sum()     # log-likelihood of each prompt

        Columns: example, position, token; ``next``, the token that follows it in the prompt; ``probability`` and
        ``logprob`` (nats) of ``next`` (NaN after the last token); ``entropy`` (nats) of the distribution over the next
        token; ``margin``, the largest probability minus the second largest; ``best``, the most probable token. Only a
        few positions' logits exist at a time. Raises PromptError for a masked language model and for bad prompts, and
        ModelError for a model without a language-model head.
        """
        from interp.model.likelihood import confidence_table

        return confidence_table(self, prompts)

    @in_session
    @torch.no_grad()
    def token_logprobs(self: LoadedModel, prompts: Any, *, masking: Masking = "word") -> list[Float[Tensor, " tokens"]]:
        """Log-probabilities of each prompt's own tokens, in nats: one tensor for each prompt, float64 on the CPU.

            sums = [x.sum() for x in model.token_logprobs(["Paris is in France", "Paris is in Italy"])]

        A causal model scores every token but the first, given those before it. A masked model scores every token but
        its special ones, given all others (pseudo-likelihood). ``masking``: "word" masks the later tokens of the
        token's word too, so that they do not give it away (Kauf & Ivanova 2023); "token" masks the token alone
        (Salazar et al. 2020). Words of token ids are unknown: each token is one. Raises as `confidence` does.
        """
        from interp.model.likelihood import statement_logprobs

        return statement_logprobs(self, prompts, masking)
