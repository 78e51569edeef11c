"""Edits of every forward inside `model.edited`, against dense attention inside an untouched Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_edit import CASES, PAIRS, attention_by_hand, edit_of
from torch import Tensor

import interp
from interp import AttentionEdit
from interp.doctor.families.text import tiny_hf
from interp.errors import PromptError

LAYER, HEAD = 0, 1
SPANS = ["start", -4]  # as test_edit names keys


@pytest.fixture(scope="module")
def llama(word_tokenizer: Any) -> interp.Model:
    return interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)


@pytest.fixture
def hf() -> Any:
    """The same model, untouched."""
    model = tiny_hf("llama")
    model.set_attn_implementation("eager")
    return model


@contextmanager
def z_set(hf: Any, layer: int, head: int, values: Tensor) -> Iterator[None]:
    """Set one head's output, values [batch, position, d_head]."""
    width = values.shape[-1]

    def hook(module: Any, args: Any) -> Any:
        x = args[0].clone()
        x[..., head * width : (head + 1) * width] = values
        return (x,)

    handle = hf.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(hook)
    yield
    handle.remove()


@torch.no_grad()
def patched_by_hand(hf: Any, model: interp.Model, case: Any, layer: int, head: int) -> np.ndarray:
    """Logit differences of corrupt prompts with a head's output from the clean run, all under an edit."""
    clean, corrupt = (torch.tensor([model.coder.encode(getattr(p, n)) for p in PAIRS]) for n in ("clean", "corrupt"))
    seen: list[Tensor] = []
    project = hf.model.layers[layer].self_attn.o_proj
    with attention_by_hand(hf, case, LAYER, HEAD):
        handle = project.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        hf(input_ids=clean)
        handle.remove()
        values = seen[0].unflatten(-1, (hf.config.num_attention_heads, -1))[:, :, head]
        with z_set(hf, layer, head, values):
            logits = hf(input_ids=corrupt).logits[:, -1]
    answer, foil = (model.coder.continuation(x)[0] for x in ("w95", "w96"))
    return (logits[:, answer] - logits[:, foil]).numpy()


@pytest.mark.parametrize("name", ["knockout", "uniform", "gate", "knockout after", "redistribution"])
def test_a_patch_under_an_edit_is_a_patch_of_the_edited_model(llama: interp.Model, hf: Any, name: str) -> None:
    case, sites = CASES[name], llama.sites("z", layers=[0, 1], heads=[0, 1])
    unedited = interp.patch(llama, PAIRS, sites, show_progress=False).frame()
    for engine in ("auto", "naive"):
        with llama.edited(edit_of(case, LAYER, HEAD)):
            effects = interp.patch(llama, PAIRS, sites, engine=engine, show_progress=False)
        frame = effects.frame().sort_values("example")
        assert effects.provenance["edited"] == [edit_of(case, LAYER, HEAD).text]
        assert engine == "naive" or effects.provenance["engine"] == "packed, exact"
        for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
            rows = frame[(frame["layer"] == layer) & (frame["head"] == head)]
            by_hand = patched_by_hand(hf, llama, case, layer, head)
            np.testing.assert_allclose(rows["patched"], by_hand, atol=1e-5, err_msg=f"{name} {engine} L{layer}H{head}")
    again = interp.patch(llama, PAIRS, sites, show_progress=False).frame()
    np.testing.assert_array_equal(again["patched"], unedited["patched"])  # nothing is left behind
    assert (frame["patched"].to_numpy() != unedited["patched"].to_numpy()).any()


def test_spans_are_known_to_recipes_statistics_patterns_and_circuits() -> None:
    known = interp.zoo.one_head()  # head 2 of layer 1 reads the marked word
    model, pairs = known.model, known.pairs(8, seed=0)
    cut = AttentionEdit(queries=-1, keys="marked", knockout=True)
    with model.edited(cut):
        frame = interp.patch(model, pairs, model.sites("z"), show_progress=False).frame()
        np.testing.assert_array_equal(frame["clean"], frame["corrupt"])  # the only mover does not see what differs
        stats = model.attention_stats([interp.Prompt(p.clean, p.spans) for p in pairs])
        patterns = model.attention_patterns(interp.Prompt(pairs[0].clean, pairs[0].spans))
        for provenance in (stats.provenance, patterns.provenance):
            assert provenance["edited"] == [cut.text]
        with pytest.raises(PromptError, match=r"names the span 'marked', but the prompt's spans are: none"):
            model.attention_stats(pairs[0].clean)
        with pytest.raises(PromptError, match="names a span"):
            model(torch.tensor([[3, 4, 5]]))
    assert not model.coder.name


def test_the_same_tokens_with_other_spans_are_refused(llama: interp.Model) -> None:
    first = PAIRS[0]
    other = interp.PromptPair(first.clean, first.corrupt, first.answer, first.foil, {"start": (3, 5)})
    also = interp.PromptPair(first.clean, first.corrupt, first.answer, first.foil, {**first.spans, "end": (9, 11)})
    with llama.edited(AttentionEdit(keys="start", queries=-1, knockout=True)):
        interp.patch(llama, [first, also], llama.sites("z"), show_progress=False)  # the edit reads the same tokens
        with pytest.raises(PromptError, match=r"same tokens .* spans at different places"):
            interp.patch(llama, other, llama.sites("z"), show_progress=False)
        interp.patch(llama, first, llama.sites("z"), show_progress=False)
    with llama.edited(AttentionEdit(keys="start", queries=-1, knockout=True)):
        interp.patch(llama, other, llama.sites("z"), show_progress=False)
