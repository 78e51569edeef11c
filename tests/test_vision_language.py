"""Vision–language models: an image among the tokens, against Hugging Face's eager attention changed by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from architectures import of_kind
from pictured import blocks_of, cut

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError, ModelError, PromptError
from interp.model import dummy_inputs as made_up
from interp.zoo.tokenizer import SPECIALS, word_tokenizer

FAMILIES = of_kind("vision-language")


@pytest.fixture(scope="module")
def words():
    return word_tokenizer(tuple(f"w{i}" for i in range(100 - len(SPECIALS))))


@pytest.fixture(scope="module")
def built(words):
    made: dict[str, tuple[Any, interp.Model, list[dict[str, Any]]]] = {}

    def get(family: str) -> tuple[Any, interp.Model, list[dict[str, Any]]]:
        if family not in made:
            eager = tiny_hf(family)
            dtype = next(eager.parameters()).dtype
            prompts = [made_up.placed(made_up.image_prompt(eager, s), torch.device("cpu"), dtype) for s in (0, 5)]
            made[family] = eager, interp.load(tiny_hf(family), tokenizer=words), prompts
        return made[family]

    return get


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_statistics_equal_eager(built, family: str) -> None:
    eager, model, (prompt, other) = built(family)
    with torch.no_grad():
        done = eager(**prompt, output_attentions=True)
        ours = model.bridge.original_model(**prompt).logits
        elsewhere = model.bridge.original_model(**other).logits
    assert (ours - done.logits).abs().max() < 1e-5 * done.logits.abs().max()
    assert (elsewhere - ours).abs().max() > 1e-2 * ours.abs().max()  # the image is read
    attentions = getattr(done, "attentions", None) or done.language_model_outputs.attentions
    p = torch.stack(attentions, dim=1)[0].double().numpy()
    for instrument in model.instruments.values():
        instrument.layers.clear()
    stats = model.attention_stats(prompt)
    assert (model.backend_report()["calls"] == 1).all()
    logs = np.log(np.where(p > 0, p, 1))
    np.testing.assert_allclose(stats.values["entropy"][0], -(p * logs).sum(-1), atol=1e-5)
    np.testing.assert_allclose(stats.values["max_prob"][0], p.max(-1), atol=1e-5)
    assert (np.triu(p, 1).sum() > 1) == (family == "paligemma")  # whose whole prompt is read in both directions
    spans = model.pictures.read(prompt).spans
    start, stop = spans["image"]
    ids = prompt["input_ids"][0].tolist()
    assert start == 3 and set(ids[start:stop]) == {99} and 99 not in ids[stop:] and spans["text"] == (stop, len(ids))


@pytest.mark.parametrize("family", FAMILIES)
def test_patches_go_into_the_span_of_the_image(built, family: str) -> None:
    _, model, (clean, corrupt) = built(family)
    pair = interp.ImagePair(clean, corrupt, answer=" w20", foil=" w30")
    sites = model.sites("resid_pre", positions="image") | model.sites("z", layers=1) | model.sites("mlp_out", layers=0)
    effects = interp.patch(model, pair, sites, show_progress=False)
    naive = interp.patch(model, pair, sites, engine="naive", show_progress=False)
    assert ("packed" in effects.provenance["engine"]) == (family != "paligemma")
    ours, theirs = effects.frame(), naive.frame()
    scale = theirs["patched"].abs().max()
    assert (ours["patched"] - theirs["patched"]).abs().max() < 1e-5 * scale
    assert ours["role"][0] == "image" and ours["effect"][0] == pytest.approx(1, abs=1e-5)  # all that differs
    assert ours["effect"][1] != pytest.approx(1, abs=1e-3)  # in block 1 the text has read some of it
    later = ours[(ours["component"] == "mlp_out") & (ours["position"] < 3)]
    assert (
        len(later) == 3 and (later["effect"] == 0).all()
    ) or family == "paligemma"  # before the image nothing differs


@pytest.mark.parametrize("family", FAMILIES)
def test_what_text_reads_of_the_image_can_be_cut(built, family: str) -> None:
    eager, model, (clean, corrupt) = built(family)
    pair = interp.ImagePair(clean, corrupt, answer=20, foil=30)
    found = interp.knock_out(
        model, pair, "image", "text", window=1, metric=interp.logit_diff, show_progress=False
    ).frame()["patched"]
    (a, b), (c, d) = (model.pictures.read(clean).spans[name] for name in ("image", "text"))
    blocks = blocks_of(eager, model)
    for layer, value in enumerate(found):
        with torch.no_grad(), cut(blocks[layer], slice(c, d), slice(a, b)):
            logits = eager(**clean).logits[0, -1]
        assert value == pytest.approx((logits[20] - logits[30]).item(), abs=1e-4)
    with torch.no_grad():
        logits = eager(**clean).logits[0, -1]
    assert max(abs(v - (logits[20] - logits[30]).item()) for v in found) > 1e-3  # it matters


@pytest.mark.parametrize("change", [
    interp.AttentionEdit(queries="text", keys="image", layers=0, knockout=True),
    interp.AttentionMask(close=[("text", "image")], layers=0),
])  # fmt: skip
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_and_masks_between_text_and_image(built, family: str, change: Any) -> None:
    eager, model, (clean, corrupt) = built(family)
    pair = interp.ImagePair(clean, corrupt, answer=20, foil=30)
    (a, b), (c, d) = (model.pictures.read(clean).spans[name] for name in ("image", "text"))
    with torch.no_grad(), cut(blocks_of(eager, model)[0], slice(c, d), slice(a, b)):
        done = eager(**clean, output_attentions=True)
    attentions = getattr(done, "attentions", None) or done.language_model_outputs.attentions
    p = torch.stack(attentions, dim=1)[0].double().numpy()
    by_hand = (done.logits[0, -1, 20] - done.logits[0, -1, 30]).item()
    for engine in ("auto", "naive"):
        frame = interp.edit(model, pair, {"blind": change}, engine=engine, show_progress=False).frame()
        assert frame["patched"][0] == pytest.approx(by_hand, abs=1e-5)
        assert abs(frame["raw"][0]) > 1e-3  # it matters
    with model.edited(change):
        entropy = model.attention_stats(clean).values["entropy"][0]
        np.testing.assert_allclose(entropy, -(p * np.log(np.where(p > 0, p, 1))).sum(-1), atol=1e-5)
        with torch.no_grad():  # the block knows the spans now
            logits = model.bridge.original_model(**clean).logits
        torch.testing.assert_close(logits, done.logits, atol=1e-5, rtol=1e-5)
        sites = model.sites("resid_pre", layers=1, positions="image")
        frame = interp.patch(model, pair, sites, show_progress=False).frame()
        assert frame["clean"][0] == pytest.approx(by_hand, abs=1e-5)
        options: Any = {**clean, "max_new_tokens": 3, "do_sample": False}
        if family == "blip2":  # it generates by its language model alone
            with pytest.raises(InterpError, match="called alone"):
                model.bridge.original_model.generate(**options)
            return
        generated = [model.bridge.original_model.generate(**options, use_cache=x) for x in (True, False)]
    assert torch.equal(*generated)


def test_text_alone_and_pictures_of_other_shapes(built, words) -> None:
    _, model, (clean, _) = built("qwen2_vl")
    text = interp.PromptPair("w1 w2 w3", "w1 w9 w3", " w4", " w5")
    assert interp.patch(model, text, model.sites("z"), show_progress=False).frame()["effect"].abs().max() > 0
    stats = model.attention_stats([clean, "w1 w2 w3"])
    assert [len(t) for t in stats.tokens] == [clean["input_ids"].shape[1], 4]  # <bos> in front of the text
    # the same tokens around an image of another shape have other rotary positions: not packed, and still right
    grid = torch.tensor([[1, 2, 8]])
    wide = {**clean, "image_grid_thw": grid}
    pairs = [interp.ImagePair(x, {**x, "pixel_values": x["pixel_values"].flip(0)}, 20, 30) for x in (clean, wide)]
    sites = model.sites("z", layers=1)
    ours, naive = (interp.patch(model, pairs, sites, engine=e, show_progress=False) for e in ("auto", "naive"))
    assert "rotary positions differ" in ours.provenance["engine"]
    np.testing.assert_allclose(ours.frame()["patched"], naive.frame()["patched"])


def test_what_cannot_be_read_is_refused(built, words, monkeypatch) -> None:
    _, model, (clean, _) = built("llava")
    image = clean["pixel_values"]
    padded = {**clean, "attention_mask": torch.zeros_like(clean["input_ids"])}
    for wrong, why in (
        ([image[0]], "an image among tokens"),
        (padded, "padded"),
        ({**clean, "input_features": image}, "does not read input_features"),
        ({**clean, "input_ids": clean["input_ids"].repeat(1, 9)}, "longer than"),
    ):
        with pytest.raises(PromptError, match=why):
            model.attention_stats(wrong)
    odd = tiny_hf("llava")
    monkeypatch.setattr(type(odd.config), "model_type", "llava_of_another_kind")
    with pytest.raises(ModelError, match="has not been tried on"):
        interp.load(odd, tokenizer=words)


def test_the_vision_tower_is_a_stack_of_its_own(built) -> None:
    _, model, (clean, _) = built("llava")
    model.bridge.original_model(**clean)
    report = model.backend_report()
    assert list(report["stack"]) == ["text"] * 3 + ["vision"] * 3 and set(report["attention"][3:]) == {"CLIPAttention"}
    seen: list[torch.Tensor] = []
    hook = [("vision_encoder.encoder_layers.1.attn.hook_pattern", lambda x, hook: seen.append(x))]
    with model.bridge.hooks(fwd_hooks=hook):
        model.bridge.original_model(**clean)
    assert seen[0].shape == (1, 4, 10, 10) and torch.allclose(seen[0].sum(-1), torch.ones(1, 4, 10).double())


@pytest.mark.parametrize("family", ["llava", "llava_next", "paligemma", "idefics3"])
def test_the_heads_of_the_vision_tower_are_counted(built, tmp_path, family: str) -> None:
    _, model, (clean, _) = built(family)
    stats = model.attention_stats([clean], stack="vision")
    seen: list[torch.Tensor] = []
    hook = [("vision_encoder.encoder_layers.1.attn.hook_pattern", lambda x, hook: seen.append(x))]
    with model.bridge.hooks(fwd_hooks=hook):
        model.bridge.original_model(**clean)
    p = seen[0].detach().double().numpy()
    assert len(stats) == len(p) == (3 if family == "llava_next" else 1)  # its tiles
    for image, pattern in enumerate(p):
        logs = np.log(np.where(pattern > 0, pattern, 1))
        np.testing.assert_allclose(stats.values["entropy"][image][1], -(pattern * logs).sum(-1), atol=1e-6)
    frame = stats.frame()
    assert set(frame["stack"]) == {"vision"} and frame["token"].iloc[-1].startswith("patch")
    assert type(stats).read(stats.write(tmp_path / "tower.parquet")).stack == "vision"
    with pytest.raises(PromptError, match="no prompt holds one"):
        model.attention_stats("w1 w2", stack="vision")


def test_no_processor_is_asked_for(words, monkeypatch) -> None:
    import transformers as tf

    asked: list[Any] = []
    monkeypatch.setattr(tf.AutoProcessor, "from_pretrained", lambda *a, **k: asked.append(a))
    interp.load(tiny_hf("llava"), tokenizer=words)
    assert asked == []
