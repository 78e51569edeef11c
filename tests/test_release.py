"""The model object that a user passes: released, saved, copied, loaded twice."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf
from interp.doctor.matrix.case import FamilyCase
from interp.errors import ModelError
from tests.architectures import of_kind

TOKENS = torch.arange(12).reshape(2, 6) + 5
RECORDERS = ("_output_capturing_hooks_installed",)  # transformers sets this by itself, at the first forward


def run(family: str, hf: Any) -> torch.Tensor:
    """The family's own output, through the object's own forward."""
    case = FamilyCase(family)
    case.__dict__["eager"] = hf  # inputs are made for it
    return case.run(hf).detach()


def fingerprint(hf: Any) -> dict[str, Any]:
    """Class, mode and attributes of every module, by name; tables by their keys in order."""
    return {
        name: (type(m), m.training, {k: tuple(v) if isinstance(v, dict) else v for k, v in attributes(m).items()})
        for name, m in hf.named_modules()
    }


def attributes(module: Any) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in (*RECORDERS, "_forward_hooks")}


@pytest.mark.parametrize("family", of_kind("decoder", "hybrid", "encoder", "seq2seq", "vision", "vision-language"))
def test_release_puts_everything_back(family: str, word_tokenizer, tmp_path: Path) -> None:
    hf: Any = tiny_hf(family)
    hf.config.dtype = hf.dtype  # transformers writes it there when it saves
    expected, before, config = run(family, hf), fingerprint(hf), hf.config.to_dict()
    weights = {name: x.clone() for name, x in hf.state_dict().items()}
    tokenizer = copy.deepcopy(word_tokenizer)
    named = {k: repr(v) for k, v in vars(tokenizer).items()}

    model = interp.load(hf, tokenizer=tokenizer)
    model.save_pretrained(tmp_path / "between")
    assert torch.allclose(run(family, hf), expected, atol=1e-3)  # with gradients: their graph must not stay in it
    model.release()

    assert fingerprint(hf) == before
    assert list(hf.state_dict()) == list(weights)
    assert all(torch.equal(x, weights[name]) for name, x in hf.state_dict().items())
    assert hf.config.to_dict() == config
    assert {k: repr(v) for k, v in vars(tokenizer).items()} == named
    pickle.dumps(hf)
    assert torch.equal(run(family, hf), expected)
    assert torch.equal(run(family, copy.deepcopy(hf)), expected)
    saved = type(hf).from_pretrained(tmp_path / "between", dtype=hf.dtype, attn_implementation="eager")
    assert all(torch.equal(x, weights[name]) for name, x in saved.state_dict().items())
    assert model.is_released and repr(model).endswith("released)")
    with pytest.raises(ModelError, match=r"can no longer be used: it was released.*interp\.load"):
        model.forward(TOKENS)
    model.release()  # nothing is left to do


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_attentions_and_hidden_states_are_recorded_again(family: str, word_tokenizer) -> None:
    hf: Any = tiny_hf(family)
    hf.set_attn_implementation("eager")
    expected = hf(TOKENS, output_attentions=True, output_hidden_states=True)
    for is_asked_while_loaded in (False, True):
        hf = tiny_hf(family)
        hf.set_attn_implementation("eager")
        with interp.load(hf, tokenizer=word_tokenizer):
            if is_asked_while_loaded:
                hf(TOKENS, output_attentions=True, output_hidden_states=True)
        for _ in range(2):  # once recorded, each layer appears once
            again = hf(TOKENS, output_attentions=True, output_hidden_states=True)
            for name in ("attentions", "hidden_states"):
                pairs = zip(again[name], expected[name], strict=True)
                assert all(torch.equal(a, b) for a, b in pairs), name


def test_what_the_user_changed_since_loading_stays(word_tokenizer) -> None:
    hf: Any = tiny_hf("llama")
    hf.train()
    model = interp.load(hf, tokenizer=word_tokenizer)
    assert not hf.training
    calls: list[int] = []
    hf.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        hf.lm_head.weight.mul_(2.0)  # the weight of the object itself, by whatever name
    hf.config.name_of_mine = "kept"
    model.release()
    assert hf.training and hf.config.name_of_mine == "kept"
    assert torch.equal(hf.lm_head.weight, 2 * tiny_hf("llama").lm_head.weight)  # type: ignore[union-attr, operator]
    hf(TOKENS)
    assert calls


def test_a_copy_leaves_the_object_alone(word_tokenizer) -> None:
    hf: Any = tiny_hf("llama")
    before = fingerprint(hf)
    model = interp.load(hf, tokenizer=word_tokenizer, copy=True)
    assert fingerprint(hf) == before and model.bridge.original_model is not hf
    with torch.no_grad():
        next(hf.parameters()).zero_()
        assert not torch.equal(model(TOKENS), hf(TOKENS).logits)
    other = interp.load(hf, tokenizer=word_tokenizer)
    third = interp.load(hf, tokenizer=word_tokenizer, copy=True)  # of an object that is loaded
    assert torch.equal(other(TOKENS), third(TOKENS))
    other.release()
    assert torch.equal(third(TOKENS), interp.load(hf, tokenizer=word_tokenizer)(TOKENS))


def test_an_object_loaded_twice_belongs_to_the_newer_model(word_tokenizer) -> None:
    hf: Any = tiny_hf("llama")
    before = fingerprint(hf)
    first = interp.load(hf, tokenizer=word_tokenizer)
    expected = first.attention_stats("w1 w2 w3")
    second = interp.load(hf, tokenizer=word_tokenizer, backend="blocked")
    with pytest.raises(ModelError, match="loaded again, and belongs to the newer Model"):
        first.attention_stats("w1 w2 w3")
    third = interp.load(second.bridge)  # the bridge alone, installed anew
    with pytest.raises(ModelError, match="bridge was loaded again"):
        second(TOKENS)
    assert third.attention_stats("w1 w2 w3").frame().equals(expected.frame())
    assert set(third.backend_report()["calls"]) == {1}
    first.release()  # no longer its own: does nothing
    third.release()
    assert fingerprint(hf) == before


def test_an_object_loaded_by_four_threads_belongs_to_one_model(word_tokenizer) -> None:
    hf: Any = tiny_hf("llama")
    before, expected = fingerprint(hf), hf(TOKENS).logits
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda _: interp.load(hf, tokenizer=word_tokenizer), range(4)))
    (model,) = [m for m in models if not m.is_released]
    assert torch.allclose(model(TOKENS), expected, atol=1e-5)
    with ThreadPoolExecutor(1) as pool:
        statistics = [pool.submit(model.attention_stats, "w1 w2 w3") for _ in range(3)]
        model.release()  # waits for the one that runs
        for future in statistics:
            assert future.exception() is None or isinstance(future.exception(), ModelError)
    assert fingerprint(hf) == before


def test_an_object_whose_model_is_gone_can_be_loaded_and_released(word_tokenizer) -> None:
    hf: Any = tiny_hf("gpt2")
    before = fingerprint(hf)
    interp.load(hf, tokenizer=word_tokenizer)
    gc.collect()
    interp.load(hf, tokenizer=word_tokenizer).release()
    assert fingerprint(hf) == before


def test_a_module_of_a_loaded_model_is_refused(word_tokenizer) -> None:
    hf: Any = tiny_hf("llama")
    model = interp.load(hf, tokenizer=word_tokenizer)
    with pytest.raises(ModelError, match=r"wrapped already|loaded already"):
        interp.load(hf.model, tokenizer=word_tokenizer)
    model.release()


def test_a_model_that_cannot_be_loaded_is_left_as_it_was(word_tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    hf: Any = tiny_hf("llama")
    before = fingerprint(hf)
    with torch.no_grad():
        hf.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        interp.load(hf, tokenizer=word_tokenizer)
    assert fingerprint(hf) == before
    from transformer_lens.model_bridge.sources.transformers import source

    monkeypatch.setattr(source, "TransformerBridge", None)
    with pytest.raises(ModelError, match="TransformerLens cannot wrap"):
        interp.load(hf, tokenizer=word_tokenizer)
    assert fingerprint(hf) == before


def test_copy_is_for_model_objects(tiny, tmp_path: Path) -> None:
    model = tiny("llama")
    for source in (model, model.bridge, str(tmp_path)):
        with pytest.raises(ModelError, match="copy=True"):
            interp.load(source, copy=True)
