"""Patching and ablation by plain loops over forward hooks: one forward per cell, no engine."""

from __future__ import annotations

import torch


def scores(bridge, ids, pairs, hooks=()):
    """Logit differences answer − foil at the last position [pairs]; prompts of equal length."""
    token = lambda text: bridge.tokenizer(text, add_special_tokens=False)["input_ids"][0]  # noqa: E731
    with torch.no_grad():
        logits = bridge.run_with_hooks(ids, fwd_hooks=list(hooks))[:, -1].double()
    answers, foils = ([token(getattr(p, what)) for p in pairs] for what in ("answer", "foil"))
    rows = torch.arange(len(pairs))
    return logits[rows, answers] - logits[rows, foils]


def run(bridge, texts):
    """Token ids [pairs, pos] and all activations."""
    ids = bridge.to_tokens(texts)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    return ids, cache


def write(value, head=None, position=None):
    """A hook that overwrites one head, or one position per row, with the same place of ``value``."""

    def hook(activation, hook):
        activation = activation.clone()
        if head is not None:
            activation[:, :, head] = value[:, :, head]
        else:
            activation[:, position] = value[:, position]
        return activation

    return hook


def heads(bridge):
    return [(layer, head) for layer in range(bridge.cfg.n_layers) for head in range(bridge.cfg.n_heads)]


def patch(bridge, pairs, mode, component="z"):
    """{(layer, head or position): (effects, raw changes)}, each [pairs]; effects on the recovery scale."""
    pairs = list(pairs)
    (ids, cache), (other_ids, other_cache) = (run(bridge, [getattr(p, w) for p in pairs]) for w in ("clean", "corrupt"))
    clean, corrupt = scores(bridge, ids, pairs), scores(bridge, other_ids, pairs)
    if mode == "denoise":
        base_ids, source, start, end = other_ids, cache, corrupt, clean
    else:
        base_ids, source, start, end = ids, other_cache, clean, corrupt
    out = {}
    for layer in range(bridge.cfg.n_layers):
        name = f"blocks.{layer}.attn.hook_z" if component == "z" else f"blocks.{layer}.hook_{component}"
        for i in range(bridge.cfg.n_heads if component == "z" else ids.shape[1]):
            hook = write(source[name], **({"head": i} if component == "z" else {"position": i}))
            raw = scores(bridge, base_ids, pairs, [(name, hook)]) - start
            out[layer, i] = raw / (end - start), raw
    return out


def ablate(bridge, pairs, using, *, shift=1, pool="position", source="clean"):
    """{(layer, head): effects [pairs]} for prompts of equal length.

    ``mean`` is over the set, per position or over positions too (``pool``); ``resample`` borrows from the
    pair ``shift`` places further on; both from the clean or the corrupt runs (``source``).
    """
    pairs = list(pairs)
    (ids, cache), (other_ids, other_cache) = (run(bridge, [getattr(p, w) for p in pairs]) for w in ("clean", "corrupt"))
    clean, corrupt = scores(bridge, ids, pairs), scores(bridge, other_ids, pairs)
    out = {}
    for layer, head in heads(bridge):
        name = f"blocks.{layer}.attn.hook_z"
        donor = (cache if source == "clean" else other_cache)[name]
        if using == "zero":
            value = torch.zeros_like(donor)
        elif using == "mean":
            value = donor.mean((0, 1) if pool == "all" else 0, keepdim=True).expand_as(donor)
        else:
            value = donor.roll(-shift, 0)
        got = scores(bridge, ids, pairs, [(name, write(value, head=head))])
        out[layer, head] = (got - clean) / (corrupt - clean)
    return out
