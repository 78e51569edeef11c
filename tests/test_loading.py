"""What cannot be loaded or run, or only wrongly, is refused with one message that says what to do."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import ModelError, PromptError


@pytest.fixture()
def folder(tmp_path: Path, word_tokenizer) -> Path:
    """A small model as it lies on disk."""
    tiny_hf("llama", torch.float32).save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    return tmp_path


def change_weights(folder: Path, **changed: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, value in changed.items():
        weights.pop(name, None)
        if value is not None:
            weights[name] = value
    save_file(weights, path, metadata={"format": "pt"})


def change_config(folder: Path, **changed: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({UP: None}, rf"checkpoint lacks {UP}, which would be random"),
        ({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}, "also holds model.layers.9.* would be ignored"),
        ({UP: torch.zeros(3, 3)}, "some tensors have other shapes"),
    ],
)
def test_weights_that_do_not_match_the_config_are_refused(folder: Path, changed, words: str) -> None:
    change_weights(folder, **changed)
    with pytest.raises(ModelError, match=words):
        interp.load(folder)


def test_more_layers_in_the_config_than_in_the_weights_are_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=4)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.3\..* and \d+ more"):
        interp.load(folder)


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    change_config(folder, model_type="perceptron9000", architectures=["Perceptron9000"])
    with pytest.raises(ModelError, match=r"'perceptron9000'.*upgrade transformers"):
        interp.load(folder)


def test_weights_without_a_tokenizer_say_so(folder: Path, word_tokenizer) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"no tokenizer that can be read.*pass tokenizer="):
        interp.load(folder)
    assert interp.load(folder, tokenizer=word_tokenizer).n_layers == 3


def test_weights_on_several_devices_or_none_are_refused(word_tokenizer) -> None:
    hf = tiny_hf("llama", torch.float32)
    hf.model.layers[1].to("meta")
    with pytest.raises(ModelError, match="not in memory"):
        interp.load(hf, tokenizer=word_tokenizer)


@pytest.mark.gpu
def test_weights_on_several_devices_without_a_device_map_are_refused(word_tokenizer) -> None:
    hf = tiny_hf("llama", torch.float32)
    hf.model.layers[1].to("cuda")
    with pytest.raises(ModelError, match="weights lie on cpu, cuda:0"):
        interp.load(hf, tokenizer=word_tokenizer)


def test_device_map_places_the_weights_and_changes_no_logit(folder: Path) -> None:
    tokens = torch.tensor([[5, 9, 5, 77, 12]])
    spread = interp.load(folder, device_map={"": "cpu"})
    assert torch.equal(spread(tokens), interp.load(folder)(tokens))
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    offloaded = {part: "disk" if part == "model.layers" else "cpu" for part in parts}
    (folder / "offload").mkdir()
    with pytest.raises(ModelError, match=r"not in memory|offload"):
        interp.load(folder, device_map=offloaded)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "cpu", "device_map": "auto"}, "device= .* or device_map= .*not both"),
        ({"quantize": "2bit"}, "quantize='2bit': one of '8bit', '4bit' is expected"),
        ({"dtype": "float33"}, "dtype must be a floating torch dtype.*got 'float33'"),
        ({"dtype": torch.int8}, "dtype must be a floating torch dtype.*got torch.int8"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder: Path, options, words: str) -> None:
    for function in (interp.load, interp.doctor.examine):
        if function is interp.load or "dtype" in options:
            with pytest.raises(ModelError, match=words):
                function(folder, **options)


@pytest.mark.parametrize(
    ("package", "options"), [("accelerate", {"device_map": "auto"}), ("bitsandbytes", {"quantize": "4bit"})]
)
def test_a_missing_package_is_named_with_its_remedy(folder: Path, monkeypatch, package: str, options) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a))
    with pytest.raises(ModelError, match=f"needs the package {package}.*pip install {package}"):
        interp.load(folder, **options)


def test_options_of_reading_are_refused_for_model_objects(word_tokenizer) -> None:
    with pytest.raises(ModelError, match="give a name, not a model object"):
        interp.load(tiny_hf("llama", torch.float32), tokenizer=word_tokenizer, device_map={"": "cpu"})


# ------------------------------------------------------------------ inputs


def test_more_tokens_than_the_context_are_refused(tiny) -> None:
    model = tiny("llama")
    tokens = torch.zeros(1, 65, dtype=torch.long)
    for run in (model, model.run_with_cache):
        with pytest.raises(PromptError, match=r"65 tokens are more than .* context of 64"):
            run(tokens)
    assert model.bridge(tokens).shape[1] == 65


def test_tokens_on_another_device_are_refused(tiny) -> None:
    with pytest.raises(PromptError, match=r"the tokens are on meta and .* is on cpu"):
        tiny("llama")(torch.zeros(1, 4, dtype=torch.long, device="meta"))


def test_images_given_to_a_text_model_are_refused(tiny) -> None:
    class Picture:  # what tells PIL's images from text; PIL itself need not be installed
        def convert(self, mode: str) -> Picture:
            return self

    model = tiny("llama")
    with pytest.raises(PromptError, match=r"pixel_values was given to .*reads no images"):
        model(torch.zeros(1, 4, dtype=torch.long), pixel_values=torch.zeros(1, 3, 8, 8))
    for image in (Picture(), torch.zeros(3, 8, 8)):
        with pytest.raises(PromptError, match="this is an image"):
            model.attention_stats([image])


# ---------------------------------------------------------------- TransformerLens as it was found


def lens_functions() -> tuple[object, ...]:
    """The functions of TransformerLens that are replaced while a bridge is built."""
    from transformer_lens.model_bridge.sources.transformers import helpers, source

    return helpers._ensure_torchvision, helpers.load_modality_processor, source.load_modality_processor


@pytest.fixture()
def booting(monkeypatch):
    """What `lens_functions` were during each boot; a pip install in between fails the test."""
    from transformer_lens.model_bridge import TransformerBridge

    def install(*args: object, **_: object) -> None:
        raise AssertionError(f"loading a model ran {args}")

    for name in ("check_call", "run", "Popen"):
        monkeypatch.setattr(subprocess, name, install)
    during: list[tuple[object, ...]] = []
    boot = TransformerBridge.boot_transformers

    def boot_transformers(*args: object, **options: object) -> object:
        ensure, *_ = functions = lens_functions()
        during.append(functions)
        assert ensure() is (importlib.util.find_spec("torchvision") is not None)
        return boot(*args, **options)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(boot_transformers))
    return during


def test_loading_leaves_transformer_lens_as_it_found_it(folder: Path, booting, word_tokenizer) -> None:
    before = lens_functions()
    interp.load(folder)
    interp.load(tiny_hf("llava"), tokenizer=word_tokenizer)
    assert lens_functions() == before
    assert len(booting) == 2 and all(a is not b for d in booting for a, b in zip(d[::2], before[::2], strict=True))


def test_a_load_that_fails_leaves_transformer_lens_as_it_found_it(folder: Path, booting, monkeypatch) -> None:
    from transformer_lens.model_bridge.sources.transformers import source

    before = lens_functions()
    monkeypatch.setattr(source, "TransformerBridge", None)  # fails after the functions were replaced
    with pytest.raises(ModelError, match="TransformerLens cannot wrap"):
        interp.load(folder)
    assert booting and lens_functions() == before


def test_wrapped_models_leave_transformer_lens_as_it_is(folder: Path) -> None:
    before = lens_functions()
    bridge = interp.load(folder).bridge
    assert interp.load(bridge).bridge is bridge
    assert lens_functions() == before
