"""Build Hugging Face configs, models, tokenizers and caches.

The first call imports transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast


def hf_config(class_name: str, **fields: Any) -> Any:
    """Build a transformers config: ``hf_config("LlamaConfig", hidden_size=32)``."""
    import transformers

    return getattr(transformers, class_name)(**fields)


def hf_model(class_name: str, config: Any, **options: Any) -> PreTrainedModel:
    """Build a model with random weights, of a model class or an Auto class.

    ``options`` are those of ``from_config``.
    """
    import transformers

    model_class: Any = getattr(transformers, class_name)
    # only Auto classes have a public from_config
    from_config = getattr(model_class, "from_config", None) or model_class._from_config
    return from_config(config, **options)


def fast_tokenizer(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    """Wrap a tokenizer of the tokenizers library as transformers' fast tokenizer.

    ``options`` are those of its constructor.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def key_value_cache(config: Any) -> DynamicCache:
    """An empty key/value cache for a model of this config."""
    from transformers import DynamicCache

    return DynamicCache(config=config)
