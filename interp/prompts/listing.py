"""What counts as a prompt: one function turns an argument into a list of prompts, or says why it is none.

Every entry point that takes prompts calls `listed`, through `interp.prompts.pairs.listed_prompts` or `listed_texts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from interp.errors import PromptError
from interp.prompts.embeddings import Embeddings

# What a tokenizer may return besides input_ids and attention_mask, and a model of text alone does not read.
BOOKKEEPING = {"length", "offset_mapping", "special_tokens_mask", "overflow_to_sample_mapping", "num_truncated_tokens"}


class TokenIds(tuple[int, ...]):
    """A prompt as token ids, special tokens included: the model reads exactly these."""


def listed(prompts: Any, kinds: tuple[type, ...], expected: str, *, takes_ids: bool = False) -> list[Any]:
    """Return one prompt, or several, as a list of objects of ``kinds``, or of `TokenIds` if ``takes_ids``.

    Several are any iterable: a list, tuple, generator, NumPy array or pandas Series. Token ids are integers: a list, a
    tensor or an array of them (with two axes: a batch), or what a tokenizer returns (``input_ids``, whose padding
    ``attention_mask`` names is removed). ``expected``: the kinds in words, for messages. Raises PromptError for
    anything else.
    """
    if isinstance(prompts, kinds):
        return [prompts]
    ids = _as_ids(prompts, expected)
    if ids is None:
        _refuse_whole(prompts, expected)
        ids = [one for i, item in enumerate(prompts) for one in _items(i, item, kinds, expected)]
    if not takes_ids and any(isinstance(one, TokenIds | Embeddings) for one in ids):
        got = "token ids" if any(isinstance(one, TokenIds) for one in ids) else "vectors"
        raise PromptError(f"{expected} expected, got {got}: this needs the prompt's words")
    return ids


def _items(index: int, item: Any, kinds: tuple[type, ...], expected: str) -> list[Any]:
    if isinstance(item, kinds):
        return [item]
    ids = _as_ids(item, expected)
    if ids is None or len(ids) != 1:
        _refuse_image(item)
        raise PromptError(f"{expected} expected; item {index} is {_described(item)}")
    return ids


def _refuse_whole(prompts: Any, expected: str) -> None:
    """Raise PromptError for what would be iterated over in a way that nobody means."""
    if hasattr(prompts, "columns") and hasattr(prompts, "iloc"):
        raise PromptError(
            f"{expected} expected, got a DataFrame with the columns {list(map(str, prompts.columns))}: "
            "interp.PairSet.from_frame(frame) makes pairs of it, and frame['column'] gives its texts"
        )
    _refuse_image(prompts)
    kind = str(getattr(prompts, "dtype", "object"))
    if kind.removeprefix("torch.").startswith(("float", "bfloat", "complex", "bool")):
        raise PromptError(f"{expected} expected, got {kind} numbers: token ids are whole numbers")
    if isinstance(prompts, set | frozenset):
        raise PromptError(f"{expected} expected in an order, and a set has none: pass sorted(prompts)")
    is_scalar = getattr(prompts, "ndim", 1) == 0  # an array without axes says that it can be iterated over
    if is_scalar or isinstance(prompts, str | bytes | PurePath) or not isinstance(prompts, Iterable):
        raise PromptError(f"{expected} expected, got {_described(prompts)}")


def _refuse_image(item: Any) -> None:
    """Raise PromptError for an image: an array with several axes of numbers, or an image object."""
    if hasattr(item, "convert") or (len(getattr(item, "shape", ())) >= 2 and not hasattr(item, "columns")):
        raise PromptError(
            f"a prompt is text, but this is an image ({type(item).__name__}): a vision-language model gets it "
            "through its processor, as model(input_ids, pixel_values=…)"
        )


def _described(item: Any) -> str:
    hint = ": decode them first, text.decode()" if isinstance(item, bytes) else ""
    return f"{type(item).__name__} {item!r:.60}{hint}"


def check_text(text: Any) -> None:
    """Raise PromptError unless a text is a string that a tokenizer can read."""
    if not isinstance(text, str) or not text:
        raise PromptError(f"a prompt must be a non-empty string, got {text!r:.80}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PromptError(
            f"{text!r:.80} holds half of a character (a lone surrogate), which no tokenizer reads"
        ) from None


# ---------------------------------------------------------------- token ids


def _as_ids(item: Any, expected: str) -> list[Any] | None:
    """Return the token ids that an object stands for, one for each prompt; None if it holds none."""
    if isinstance(item, TokenIds | Embeddings):
        return [item]
    if isinstance(item, Mapping):
        return _of_encoding(item, expected)
    rows = _rows(item)
    return None if rows is None else [_checked(row) for row in rows]


def _rows(item: Any) -> list[list[int]] | None:
    """Return integers, or one or two axes of them, as rows; None for anything else."""
    if hasattr(item, "tolist") and hasattr(item, "dtype"):  # a tensor, an array or a Series
        kind = str(item.dtype)
        if not kind.removeprefix("torch.").startswith(("int", "uint", "long")) or item.ndim not in (1, 2):
            return None
        item = item.tolist()
    if not isinstance(item, list | tuple) or not item:
        return None
    if all(_is_id(i) for i in item):
        return [list(item)]
    is_batch = all(isinstance(row, list) and row and all(_is_id(i) for i in row) for row in item)
    return [list(row) for row in item] if is_batch else None


def _is_id(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _checked(row: Sequence[int]) -> TokenIds:
    if not row or min(row) < 0:
        raise PromptError(f"token ids are whole numbers from 0 on, at least one of them, got {list(row)!r:.60}")
    return TokenIds(row)


def _of_encoding(encoding: Any, expected: str) -> list[TokenIds]:
    """Return the rows of what a tokenizer returned, without their padding."""
    names = [str(name) for name in encoding]
    rows = _rows(encoding["input_ids"]) if "input_ids" in names else None
    if rows is None:
        raise PromptError(
            f"{expected} expected, got a {type(encoding).__name__} with the keys {names!r:.80}: a mapping is a prompt "
            "only if it holds input_ids, as a tokenizer returns them"
        )
    others = [n for n in names if n not in {"input_ids", "attention_mask", "token_type_ids", *BOOKKEEPING}]
    types = _rows(encoding["token_type_ids"]) if "token_type_ids" in names else None
    if others or (types is not None and any(map(any, types))):
        raise PromptError(
            f"the encoding also holds {', '.join(others) or 'token_type_ids of a second text'}, which a prompt of text "
            "does not have: leave it out"
        )
    masks = _rows(encoding["attention_mask"]) if "attention_mask" in names else [[1] * len(row) for row in rows]
    if masks is None or [len(m) for m in masks] != [len(row) for row in rows]:
        raise PromptError("attention_mask does not have the shape of input_ids")
    return [_without_padding(row, mask) for row, mask in zip(rows, masks, strict=True)]


def _without_padding(row: Sequence[int], mask: Sequence[int]) -> TokenIds:
    """Return the tokens that a mask keeps; PromptError for a mask with gaps, which no prompt of its own has."""
    places = [i for i, one in enumerate(mask) if one]
    if not places or places != list(range(places[0], places[-1] + 1)):
        raise PromptError(
            "attention_mask masks everything, or tokens between others: only padding on the left or on the right can "
            "be removed"
        )
    return _checked([row[i] for i in places])
