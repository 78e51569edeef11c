"""Ablation by the mean of the layer's other heads, against hooks on an untouched Hugging Face model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from architectures import EVERY

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, SiteError

PAIRS = [
    interp.PromptPair(f"w{a} w5 w{b} w6", "w8 w5 w9 w6", "w95", "w96", {"start": (0, 5)}) for a, b in ((1, 3), (2, 4))
]
OUTPUT_PROJECTION = (
    r"\.(\d+)\.(self_attn|attn|attention|self_attention|attn\.attention)\.(o_proj|c_proj|dense|out_proj)$"
)

Ablated = dict[int, dict[int, slice]]  # the tokens at which a head is replaced, by layer and head


def output_projections(hf: Any) -> dict[int, torch.nn.Module]:
    """The modules whose input holds the heads' outputs side by side, by layer."""
    matches = ((re.search(OUTPUT_PROJECTION, name), module) for name, module in hf.named_modules())
    return {int(match[1]): module for match, module in matches if match}


@contextmanager
def heads_replaced(hf: Any, n_heads: int, ablated: Ablated) -> Iterator[None]:
    """Replace heads' slices of the output projection's input by the mean of the other heads' slices."""

    def of_layer(heads: dict[int, slice]) -> Any:
        def replace(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            z = args[0].unflatten(-1, (n_heads, -1)).clone()
            others = [h for h in range(n_heads) if h not in heads]
            for head, tokens in heads.items():
                z[:, tokens, head] = z[:, tokens][:, :, others].mean(2)
            return (z.flatten(-2), *args[1:])

        return replace

    modules = output_projections(hf)
    handles = [modules[layer].register_forward_pre_hook(of_layer(heads)) for layer, heads in ablated.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logit_diffs(model: Any, hf: Any, ablated: Ablated, pairs: Sequence[interp.PromptPair] = PAIRS) -> np.ndarray:
    answer, foil = (model.coder.continuation(x)[0] for x in ("w95", "w96"))
    ids = torch.tensor([model.coder.encode(p.clean) for p in pairs])
    with torch.no_grad(), heads_replaced(hf, model.n_heads, ablated):
        logits = hf(input_ids=ids).logits[:, -1]
    return (logits[:, answer] - logits[:, foil]).numpy()


def patched(effects: interp.Effects) -> np.ndarray:
    return effects.frame().sort_values("example")["patched"].to_numpy()


@pytest.mark.parametrize("family", EVERY)
def test_a_head_becomes_the_mean_of_the_others_in_the_input_of_the_output_projection(word_tokenizer, family) -> None:
    model, hf = interp.load(tiny_hf(family), tokenizer=word_tokenizer), tiny_hf(family)
    layers = [i for i in model.attention_layers if i in output_projections(hf)]
    if not layers or model.n_heads < 3:
        pytest.skip(f"{family}: no output projection under the usual names, or too few heads")
    low, high = layers[0], layers[-1]
    everywhere, last = slice(None), slice(-1, None)
    cases: dict[str, tuple[list[str], Ablated]] = {
        "one": ([f"z.L{low}H1"], {low: {1: everywhere}}),
        "last token": ([f"z.L{high}H0@-1"], {high: {0: last}}),
        "together": ([f"z.L{low}H0", f"z.L{low}H2"], {low: {0: everywhere, 2: everywhere}}),
    }
    if low != high:
        cases["two layers"] = ([f"z.L{low}H0", f"z.L{high}H1"], {low: {0: everywhere}, high: {1: everywhere}})
    for name, (sites, ablated) in cases.items():
        expected = logit_diffs(model, hf, ablated)
        assert np.abs(expected - logit_diffs(model, hf, {})).max() > 1e-7, name
        for engine in ("auto", "naive"):
            effects = interp.ablate(
                model, PAIRS, groups={name: sites}, using="other_heads", engine=engine, show_progress=False
            )
            np.testing.assert_allclose(patched(effects), expected, atol=1e-5, err_msg=f"{family} {name} {engine}")


def test_a_head_is_ablated_only_at_its_own_tokens(tiny) -> None:
    """Two heads at tokens that overlap: a head is in the mean of the other where it is not ablated itself."""
    model, hf = tiny("llama"), tiny_hf("llama")
    sites = ["z.L1H0@start", "z.L1H1"]
    start, rest, answer = slice(1, 3), [0, 3, 4], model.coder.continuation("w95")[0]
    foil = model.coder.continuation("w96")[0]

    def replace(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        z = args[0].unflatten(-1, (model.n_heads, -1)).clone()
        new = z.clone()
        new[:, start, 0] = z[:, start, 2:].mean(2)
        new[:, start, 1] = z[:, start, 2:].mean(2)
        new[:, rest, 1] = (z[:, rest].sum(2) - z[:, rest, 1]) / (model.n_heads - 1)
        return (new.flatten(-2),)

    handle = output_projections(hf)[1].register_forward_pre_hook(replace)
    with torch.no_grad():
        logits = hf(input_ids=torch.tensor([model.coder.encode(p.clean) for p in PAIRS])).logits[:, -1]
    handle.remove()
    for engine in ("auto", "naive"):
        effects = interp.ablate(model, PAIRS, groups=[sites], using="other_heads", engine=engine, show_progress=False)
        np.testing.assert_allclose(patched(effects), (logits[:, answer] - logits[:, foil]).numpy(), atol=1e-6)


def test_schedules_and_single_heads(tiny) -> None:
    """Each head alone, in one call, and each with those before it."""
    model, hf = tiny("gpt2"), tiny_hf("gpt2")
    heads = [f"z.L0H{h}" for h in range(model.n_heads - 1)]
    each = interp.ablate(model, PAIRS, heads, using="other_heads", show_progress=False).frame()
    cumulative = interp.ablate(
        model, PAIRS, heads, using="other_heads", schedule="cumulative", show_progress=False
    ).frame()
    for head in range(model.n_heads - 1):
        for frame, ablated in ((each, [head]), (cumulative, range(head + 1))):
            rows: Any = frame[frame["head"] == head]
            rows = rows.sort_values("example")
            expected = logit_diffs(model, hf, {0: dict.fromkeys(ablated, slice(None))})
            np.testing.assert_allclose(rows["patched"], expected, atol=1e-5)


def test_what_has_no_other_heads_is_refused(tiny) -> None:
    model = tiny("llama")
    with pytest.raises(SiteError, match="sites of z only"):
        interp.ablate(model, PAIRS, "mlp_out.L1", using="other_heads")
    with pytest.raises(SiteError, match="sites of z only"):
        interp.ablate(model, PAIRS, "v.L1H0", using="other_heads")
    with pytest.raises(InterpError, match=r"all .* heads of layer 1 are ablated together"):
        interp.ablate(model, PAIRS, groups={"layer": [f"z.L1H{h}" for h in range(model.n_heads)]}, using="other_heads")


def test_a_model_with_one_head_is_refused(word_tokenizer) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=1, n_positions=16, bos_token_id=0, eos_token_id=1)
    model = interp.load(GPT2LMHeadModel(config).eval(), tokenizer=word_tokenizer)
    with pytest.raises(InterpError, match="1 head, so there is no other"):
        interp.ablate(model, PAIRS, "z.L1H0", using="other_heads")
