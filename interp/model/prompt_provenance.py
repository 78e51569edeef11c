"""What a result stores of its prompts: a hash of texts and token ids, their number, and whether BOS stood in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from interp.model.loaded_model import LoadedModel
from interp.prompts.coder import Encoded
from interp.prompts.model_input import as_listed
from interp.utils.provenance import now, prompt_hash


def prompt_provenance(model: LoadedModel, items: Sequence[Any], encoded: Sequence[Any]) -> dict[str, Any]:
    """Return the provenance of a result of ``model`` on prompts: that of the model, of the prompts, and the time.

    ``encoded``: for each item its `Encoded` pair, or its token ids.
    """
    prompts = [ids for e in encoded for ids in ((e.clean, e.corrupt) if isinstance(e, Encoded) else (e,))]
    has_token_ids = all(getattr(ids, "has_token_ids", True) for ids in prompts)
    return {
        **model.provenance(), "bos": model.special_tokens.stand_in_front(prompts) if has_token_ids else None,
        "prompts": hash_of_prompts(items, encoded), "n_prompts": len(encoded), "created": now(),
    }  # fmt: skip


def hash_of_prompts(items: Sequence[Any], encoded: Sequence[Any]) -> str:
    """Return a short hash of prompts and of the token ids that one tokenizer makes of them."""
    return prompt_hash(items, [e.ids if isinstance(e, Encoded) else as_listed(e) for e in encoded])
