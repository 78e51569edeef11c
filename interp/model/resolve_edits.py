"""Resolve attention edits: layers and heads for one model, tokens for one prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from torch import Tensor

from interp.errors import InterpError, PromptError, SiteError
from interp.interventions import AttentionChange, AttentionEdit, AttentionMask
from interp.model.layer_edits import LayerEdit, hidden_weight
from interp.model.loaded_model import LoadedModel
from interp.prompts.positions import NamedTokens, token_rows
from interp.results.attention_patterns import as_head

HeadsByLayer = Mapping[int, tuple[int, ...] | None]


def heads_by_layer(model: LoadedModel, edit: AttentionChange) -> HeadsByLayer:
    """Return the heads that an edit changes in each layer that it changes; None: all heads of the layer.

    Raises SiteError for a layer or a head that the model does not have, and for a layer without softmax attention.
    """
    if isinstance(edit, AttentionEdit) and isinstance(edit.gate, Tensor) and len(edit.gate) != model.n_heads:
        raise SiteError(
            f"AttentionEdit(gate=…) has shape {list(edit.gate.shape)}, one for each head of a layer first, and "
            f"{model.name} has {model.n_heads} heads"
        )
    attention_layers = model.attention_layers
    layers = attention_layers if edit.layers is None else _layers(model, edit.layers)
    if isinstance(edit, AttentionMask) or edit.heads is None:
        return dict.fromkeys(layers)
    heads: dict[int, set[int]] = {}
    for item in [edit.heads] if isinstance(edit.heads, str | int) else edit.heads:
        layer, head = _head(item)
        if not -model.n_heads <= head < model.n_heads:
            raise SiteError(f"head {item!r} of an attention edit: the model has heads 0 to {model.n_heads - 1}")
        if layer is not None and layer not in attention_layers:
            raise SiteError(f"head {item!r} of an attention edit: the model has no attention in layer {layer}")
        if layer is not None and layer not in layers:
            raise SiteError(
                f"head {item!r} of an attention edit is in none of its layers ({', '.join(map(str, layers))})"
            )
        for at in layers if layer is None else [layer]:
            heads.setdefault(at, set()).add(head % model.n_heads)
    if not heads:
        raise SiteError("an attention edit names no heads: leave heads=None for all")
    return {layer: tuple(sorted(heads[layer])) for layer in sorted(heads)}


def _layers(model: LoadedModel, layers: Any) -> list[int]:
    numbers = [layers] if isinstance(layers, int) else list(layers) if isinstance(layers, Iterable) else [layers]
    out = []
    for layer in numbers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -model.n_layers <= layer < model.n_layers:
            raise SiteError(f"layer {layer!r} of an attention edit: the model has layers 0 to {model.n_layers - 1}")
        if layer % model.n_layers not in model.attention_layers:
            raise SiteError(f"layer {layer} of {model.name} has no softmax attention that could be edited")
        out.append(layer % model.n_layers)
    if not out:
        raise SiteError("an attention edit names no layers: leave layers=None for all")
    return sorted(set(out))


def _head(item: Any) -> tuple[int | None, int]:
    """Read a head's number, or a head of one layer: ``"L9H6"``, (9, 6) or a site."""
    if isinstance(item, int) and not isinstance(item, bool):
        return None, item
    with suppress(InterpError):
        return as_head(item)
    raise SiteError(f"{item!r} is no head: write its number, 'L9H6', (9, 6) or a site of z")


def edited_rows(edit: AttentionEdit, prompt: NamedTokens) -> dict[str, Sequence[Any]] | None:
    """Return the token rows of one prompt that an edit names, by the field of `LayerEdit`.

    None if the edit only acts while decoding. Raises PromptError for tokens that the prompt does not have.
    """
    if edit.phase == "decoding":
        return None
    queries = token_rows(edit.queries, prompt, f"AttentionEdit(queries={edit.queries!r})")
    gate = edit.gate
    if isinstance(gate, Tensor) and gate.ndim == 2 and gate.shape[1] != len(queries):
        raise PromptError(
            f"AttentionEdit(gate=…) has shape {list(gate.shape)}, [heads of the layer, queries], and the edit has "
            f"{len(queries)} queries in this prompt of {len(prompt.tokens)} tokens"
        )
    return {"queries": queries, **key_rows(edit, prompt)}


def key_rows(edit: AttentionEdit, prompt: NamedTokens) -> dict[str, Sequence[Any]]:
    """Return the rows of keys that an edit names, by the field of `LayerEdit`, and its weights there.

    Raises PromptError for tokens that the prompt does not have.
    """
    named = {name: getattr(edit, name) for name in ("keys", "take", "give")}
    rows: dict[str, Sequence[Any]] = {
        name: token_rows(tokens, prompt, f"AttentionEdit({name}={tokens!r})")
        for name, tokens in named.items()
        if tokens is not None or name == "keys"
    }
    if edit.weights is None:
        return rows
    shares = _shares(edit.weights, prompt)
    total = sum(shares)
    targets = tuple(row for row, share in enumerate(shares) if share > 0)
    return {**rows, "targets": targets, "shares": tuple(shares[row] / total for row in targets)}


def _shares(weights: Mapping[int | str, float] | Sequence[float] | Tensor, prompt: NamedTokens) -> Sequence[float]:
    """Return the weight of every token of a prompt; that of a span is spread evenly over its tokens."""
    n = len(prompt.tokens)
    if not isinstance(weights, Mapping):
        if len(weights) != n:
            raise PromptError(
                f"AttentionEdit(weights=…) has {len(weights)} numbers, one for each token, and the prompt has {n} "
                f"tokens {list(prompt.tokens)}"
            )
        return [float(share) for share in weights]
    shares = [0.0] * n
    for name, share in weights.items():
        rows = token_rows(name, prompt, f"AttentionEdit(weights={dict(weights)!r})")
        for row in rows:
            shares[row] += share / len(rows)
    return shares


def layer_edits(edit: AttentionEdit, by_layer: HeadsByLayer, rows: Mapping[str, Sequence[Any]]) -> list[LayerEdit]:
    """Return an edit's changes of several layers, on the token rows of one prompt."""
    return [LayerEdit(layer, edit, heads=heads, **rows) for layer, heads in by_layer.items()]


def check_order(model: LoadedModel, edits: Sequence[LayerEdit]) -> None:
    """Raise InterpError, before any forward, for weights on keys after a query, in models that read left to right."""
    if model.reads != "text" or model.masked or model.stacks or model.headless:
        return
    for e in edits:
        if e.targets and max(e.targets) > e.start:
            raise hidden_weight(e, e.start, max(e.targets))
