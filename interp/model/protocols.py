"""What interp uses of a TransformerBridge, as types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class HookPoint(Protocol):
    """A TransformerLens hook: returns the activation, or what its hooks make of it."""

    fwd_hooks: list[Any]

    def __call__(self, x: Tensor) -> Tensor:
        """Fire the hooks."""
        ...

    def add_hook(self, hook: Callable[..., Any]) -> Any:
        """Add a hook ``fn(tensor, hook) -> tensor or None``; returns its handle."""
        ...

    def has_hooks(self) -> bool:
        """Whether any hook is set."""
        ...


class AttentionLayer(Protocol):
    """TransformerLens' bridge around one attention module.

    Which other hooks it has depends on its class.
    """

    hook_attn_scores: HookPoint
    hook_pattern: HookPoint
    original_component: Any


class Bridge(Protocol):
    """What interp uses of TransformerLens' TransformerBridge.

    ``blocks``, ``ln_final`` and ``unembed`` exist on decoders and encoders; an encoder–decoder has ``encoder_blocks``
    and ``decoder_blocks``. Models without a language-model head lack ``unembed``.
    """

    cfg: Any
    adapter: Any
    blocks: Sequence[Any]
    encoder_blocks: Sequence[Any]
    decoder_blocks: Sequence[Any]
    embed: Callable[..., Tensor]
    unembed: Callable[..., Tensor]
    ln_final: Callable[..., Tensor]
    original_model: Any
    tokenizer: Any
    training: bool

    @property
    def hook_dict(self) -> Mapping[str, Any]:
        """Every hook point by name; collected anew at each access."""
        ...

    def __call__(self, tokens: Any, **kwargs: Any) -> Any:
        """Logits [batch, position, vocab] of text or tokens."""
        ...

    def run_with_cache(self, tokens: Any, **kwargs: Any) -> Any:
        """Logits and a cache of activations."""
        ...

    def run_with_hooks(self, tokens: Any, **kwargs: Any) -> Any:
        """Logits with temporary hooks."""
        ...

    def hooks(self, **kwargs: Any) -> AbstractContextManager[Any]:
        """Hooks (``fwd_hooks=``, ``bwd_hooks=``) that act inside the block."""
        ...

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Turn per-head results (``hook_result``) on or off."""
        ...

    def to_tokens(self, text: Any, **kwargs: Any) -> Tensor:
        """Tokens [batch, position] of text."""
        ...

    def eval(self) -> Any:
        """Evaluation mode."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """All weights."""
        ...

    def buffers(self) -> Iterator[Tensor]:
        """All buffers."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """All modules."""
        ...
