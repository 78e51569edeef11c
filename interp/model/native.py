"""Build TransformerLens' native models from a config.

They need no download and no Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge


def native_bridge(config: Mapping[str, Any], *, name: str, tokenizer: Any, dtype: torch.dtype) -> TransformerBridge:
    """A TransformerBridge around TransformerLens' native model, in evaluation mode.

    ``config``: fields of TransformerBridgeConfig. The global random generator is left as it was.
    """
    import torch
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources import native  # noqa: F401  (attaches boot_native)

    boot_native: Any = TransformerBridge.boot_native  # type: ignore[attr-defined]
    # Construction draws default weights from the global generator; a caller's seed must survive it.
    with torch.random.fork_rng(devices=[]):
        bridge = boot_native(dict(config), tokenizer=tokenizer, dtype=dtype, model_name=name)
    return bridge.eval()


def plain_module(component: Any) -> Any:
    """The plain torch module behind a bridge component, or the module itself."""
    original = component._modules.get("_original_component")
    return component if original is None else original
