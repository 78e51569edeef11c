"""Vision encoders: outputs, statistics, patches and cuts, against Hugging Face's eager attention changed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import of_kind
from headstats import StatSpec
from pictured import blocks_of, cut, entering, replaced_input
from torch import Tensor

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import ModelError, PromptError
from interp.model import dummy_inputs as made_up
from interp.prompts.images import output_of

ENCODERS = of_kind("vision")


def pixel(logits: Tensor, _readout: Any) -> Tensor:
    return logits[:, 1] - logits[:, 2]


@pytest.fixture(scope="module")
def encoder():
    built: dict[str, tuple[Any, interp.Model]] = {}

    def get(family: str) -> tuple[Any, interp.Model]:
        if family not in built:
            built[family] = tiny_hf(family), interp.load(tiny_hf(family))
        return built[family]

    return get


@pytest.fixture(scope="module")
def images():
    return made_up.images(tiny_hf("vit"), 2)


@pytest.mark.parametrize("family", ENCODERS)
def test_outputs_and_statistics_equal_eager(encoder, images, family: str) -> None:
    eager, model = encoder(family)
    model.instrument.layers.clear()
    stats = model.attention_stats(images, StatSpec(received=True))
    assert (model.backend_report()["calls"] == 1).all() and "dense" not in set(model.backend_report()["backend"])
    with torch.no_grad():
        done = eager(pixel_values=images, output_attentions=True)
        ours = output_of(model.bridge.original_model(pixel_values=images))
    assert (ours - output_of(done)).abs().max() < 1e-5 * output_of(done).abs().max()
    p = torch.stack(done.attentions, dim=1).double().numpy()  # [image, layer, head, query, key]
    assert np.triu(p[0], 1).sum() > 1 and p[0].max() > 0.3  # it reads to the right, and not uniformly
    for image in range(2):
        logs = np.log(np.where(p[image] > 0, p[image], 1))
        np.testing.assert_allclose(stats.values["entropy"][image], -(p[image] * logs).sum(-1), atol=1e-5)
        np.testing.assert_array_equal(stats.values["argmax"][image], p[image].argmax(-1))
        np.testing.assert_allclose(stats.values["received"][image], p[image].mean(-2), atol=1e-5)
    last = stats.frame().iloc[-1]
    assert last["token"] == "patch 2,2" and last["position"] == p.shape[-1] - 1


@pytest.mark.parametrize("family", ENCODERS)
def test_patches_equal_those_made_by_hand(encoder, images, family: str) -> None:
    eager, model = encoder(family)
    pair = interp.ImagePair(images[0], images[1], answer=1, foil=2)
    sites = model.sites("resid_pre", layers=1, positions=["patches", 3]) | model.sites("resid_pre", positions="all")
    effects = interp.patch(model, pair, sites, show_progress=False).frame()
    blocks, kept = blocks_of(eager, model), []
    with torch.no_grad():
        with entering(blocks[1], kept):
            clean = output_of(eager(pixel_values=images[:1]))
        for row, rows in ((0, slice(*model.pictures.read(images[0]).spans["patches"])), (1, slice(3, 4))):
            with replaced_input(blocks[1], rows, kept[0]):
                patched = output_of(eager(pixel_values=images[1:]))
            expected = (patched[0, 1] - patched[0, 2]).item()
            assert effects["patched"][row] == pytest.approx(expected, abs=1e-5)
    assert effects["clean"][0] == pytest.approx((clean[0, 1] - clean[0, 2]).item(), abs=1e-5)
    assert effects["effect"][2:].to_numpy() == pytest.approx(np.ones(model.n_layers), abs=1e-6)
    own = interp.patch(model, pair, sites[:2], metric=pixel, show_progress=False).frame()
    np.testing.assert_allclose(own["patched"], effects["patched"][:2])


@pytest.mark.parametrize("family", ENCODERS)
def test_heads_and_outputs_of_blocks_are_sites(encoder, images, family: str) -> None:
    _, model = encoder(family)
    pair = interp.ImagePair({"pixel_values": images[:1]}, images[1:], answer=1, foil=2)
    sites = model.sites("z", layers=0) | model.sites("attn_out", positions="all") | model.sites("mlp_out", positions=4)
    frame = interp.patch(model, pair, sites, show_progress=False).frame()
    seen = frame[(frame["component"] != "mlp_out") | (frame["layer"] < model.n_layers - 1)]
    assert (seen["effect"].abs() > 1e-9).all()
    if family in ("vit", "clip_vision"):  # whose last block's patches nothing reads
        assert frame["effect"].iloc[-1] == pytest.approx(0, abs=1e-9)
    # the residual stream is the sum of what the blocks add: all of it patched in block 1 is block 1's output patched
    (mid,) = interp.patch(model, pair, model.sites("resid_mid", layers=1, positions="all")).frame()["effect"]
    assert mid == pytest.approx(1, abs=1e-6)
    zero = interp.ablate(model, pair, model.sites("z", layers=1), using="zero", show_progress=False).frame()
    assert (zero["raw"].abs() > 1e-9).all()


@pytest.mark.parametrize("family", ENCODERS)
def test_attention_cut_in_the_engine_is_attention_cut_by_hand(encoder, images, family: str) -> None:
    eager, model = encoder(family)
    pair = interp.ImagePair(images[0], images[1], answer=1, foil=2)
    found = interp.knock_out(
        model, pair, 5, 3, layers=[0, 1], window=1, metric=interp.logit_diff, show_progress=False
    ).frame()["patched"]
    for layer, value in enumerate(found):
        with torch.no_grad(), cut(blocks_of(eager, model)[layer], slice(3, 4), slice(5, 6)):
            done = output_of(eager(pixel_values=images[:1]))[0]
        assert value == pytest.approx((done[1] - done[2]).item(), abs=1e-4)


def test_the_whole_of_clip_and_siglip_opens_as_their_vision_tower(images) -> None:
    import transformers as tf

    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
              "image_size": 12, "patch_size": 4}  # fmt: skip
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    for make, settings in ((tf.CLIPModel, tf.CLIPConfig), (tf.SiglipModel, tf.SiglipConfig)):
        hf = make(settings(vision_config=vision, text_config=text)).eval()
        with torch.no_grad():
            expected = hf.get_image_features(images.float()).pooler_output
            model = interp.load(hf)
            assert model.n_layers == 2 and model.n_heads == 4 and model.d_model == 32
            got = output_of(model.bridge.original_model(pixel_values=images.float()))
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_folder_opens_without_a_tokenizer_and_asks_nobody(tmp_path, images, monkeypatch) -> None:
    """TransformerLens would look for a processor on the hub, and install torchvision to open it."""
    import subprocess

    import transformers as tf

    asked: list[Any] = []
    for loader in (tf.AutoProcessor, tf.AutoTokenizer):
        monkeypatch.setattr(loader, "from_pretrained", lambda *a, **k: asked.append(a))
    for run in ("check_call", "Popen"):
        monkeypatch.setattr(subprocess, run, lambda *a, **k: asked.append(a))
    tiny_hf("vit", torch.float32).save_pretrained(tmp_path)
    model = interp.load(str(tmp_path))
    assert type(model.bridge.original_model).__name__ == "ViTForImageClassification" and asked == []
    assert model(images.float()).shape == (2, 5)
    pair = interp.ImagePair(images[0], images[1], answer="LABEL_1", foil="LABEL_2")
    assert len(interp.patch(model, pair, model.sites("z", layers=0), show_progress=False)) == 4
    with pytest.raises(PromptError, match="no class 'cat'"):
        interp.patch(model, interp.ImagePair(images[0], images[1], answer="cat", foil=2), model.sites("z"))


def test_what_is_no_image_for_the_model_is_refused(encoder, images, monkeypatch) -> None:
    _, model = encoder("vit")
    for wrong, why in (
        (images[0].to(torch.uint8), "float tensors"),
        (images[0, :1], r"\[3, height, width\]"),
        (images[0, :, :8], "8 × 12"),
        ("a cat", "float tensors"),
    ):
        with pytest.raises(PromptError, match=why):
            model.attention_stats([wrong])
    with pytest.raises(PromptError, match="an image with every prompt"):
        interp.patch(model, interp.PromptPair("a cat", "a dog", "x"), model.sites("z"), metric="prob")
    with pytest.raises(PromptError, match="positions do not correspond"):
        small = encoder("dinov2")[1]
        interp.patch(small, interp.ImagePair(images[0], images[0, :, :8], 1, 2), small.sites("z"))
    real = interp.model.model.verify.__globals__["stacks"]
    monkeypatch.setitem(
        interp.model.model.verify.__globals__, "stacks", lambda bridge: {"": {**real(bridge)[""], 7: None}}
    )
    with pytest.raises(ModelError, match="no call arrived from 1 of 4 layers"):
        interp.load(tiny_hf("vit"))
