"""Encoder–decoder models: three stacks routed and counted, each against the dense pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import of_kind
from headstats import StatSpec

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import PromptError, SiteError
from interp.results.attention_stats import AttentionStats

KINDS = of_kind("seq2seq")
STACKS = {"encoder": "encoder_blocks.{}.attn", "decoder": "decoder_blocks.{}.self_attn",
          "cross": "decoder_blocks.{}.cross_attn"}  # fmt: skip
SOURCE, TARGET = "w5 w9 w5 w77 w12 w9 w5 w31 w2", "w4 w8 w15 w16"


@pytest.fixture(scope="module")
def paired(word_tokenizer):
    built: dict[str, interp.Model] = {}

    def get(kind: str) -> interp.Model:
        if kind not in built:
            built[kind] = interp.load(tiny_hf(kind), tokenizer=word_tokenizer)
        return built[kind]

    return get


def source_of(kind: str) -> str | torch.Tensor:
    if kind == "whisper":
        return torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    return SOURCE


def inputs(kind: str, batch: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    decoder = {"decoder_input_ids": torch.randint(2, 100, (batch, 6), generator=g)}
    if kind == "whisper":
        return {"input_features": torch.randn(batch, 8, 24, generator=g, dtype=torch.float64), **decoder}
    return {"input_ids": torch.randint(2, 100, (batch, 11), generator=g), **decoder}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_eager_with_padding(word_tokenizer, kind: str) -> None:
    given = {k: v.float() if v.is_floating_point() else v for k, v in inputs(kind).items()}
    if kind != "whisper":  # whose encoder sees every frame
        real = torch.ones_like(given["input_ids"])
        real[1, 8:] = real[2, :5] = 0
        given["attention_mask"] = real
    model = interp.load(tiny_hf(kind, torch.float32), tokenizer=word_tokenizer)
    with torch.no_grad():
        theirs = tiny_hf(kind, torch.float32)(**given).logits
        ours = model.bridge.original_model(**given).logits
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
        if "attention_mask" in given:  # negative control
            del given["attention_mask"]
            assert (model.bridge.original_model(**given).logits - theirs).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stack", STACKS)
def test_statistics_equal_those_of_the_dense_pattern(paired, kind: str, stack: str) -> None:
    model = paired(kind)
    assert model.stacks == list(STACKS)
    for instrument in model.instruments.values():
        instrument.layers.clear()
    stats = model.attention_stats(source_of(kind), StatSpec(received=True), target=TARGET, stack=stack)
    report = model.backend_report()
    assert (report["calls"] == 1).all() and set(report["stack"]) == set(STACKS)
    seen: list[torch.Tensor] = []
    names = [f"{STACKS[stack].format(i)}.hook_pattern" for i in range(stats.n_layers)]
    with model.bridge.hooks(fwd_hooks=[(name, lambda x, hook: seen.append(x)) for name in names]):
        model.attention_stats(source_of(kind), target=TARGET, stack="decoder" if stack != "decoder" else "encoder")
    p = torch.stack([x[0] for x in seen]).double().numpy()
    tokens, keys = (len(x[0]) for x in (stats.tokens, stats.keys))
    assert p.shape == (stats.n_layers, 4, tokens, keys)
    assert (np.triu(p, 1).sum() == 0) == (stack == "decoder")  # only the decoder's own attention is causal
    logs = np.log(np.where(p > 0, p, 1))
    np.testing.assert_allclose(stats.values["entropy"][0], -(p * logs).sum(-1), atol=1e-6)
    np.testing.assert_array_equal(stats.values["argmax"][0], p.argmax(-1))
    assert ("received" in stats.values) == (stack != "cross")
    assert stats.provenance["left_out"] == (["received"] if stack == "cross" else [])


def test_the_frame_says_what_each_decoder_head_reads(paired, tmp_path) -> None:
    model = paired("t5")
    stats = model.attention_stats([SOURCE, "w1 w2"], target=[TARGET, "w3"])
    frame = stats.frame()
    assert set(frame["stack"]) == {"cross"} and frame["token"].iloc[:5].tolist() == ["<bos>", "w4", "w8", "w15", "w16"]
    words = ["<bos>", *SOURCE.split()]
    first = frame[frame["example"] == 0]
    assert [words[i] for i in first["argmax"]] == first["argmax_token"].tolist()
    again = AttentionStats.read(stats.write(tmp_path / "cross.parquet"))
    assert again.stack == "cross" and again.keys == stats.keys and again.frame().equals(frame)


def test_what_does_not_fit_is_explained(paired, tiny) -> None:
    model = paired("t5")
    with pytest.raises(PromptError, match=r"1 source.*0 target"):
        model.attention_stats(SOURCE)
    with pytest.raises(PromptError, match="stack='middle'"):
        model.attention_stats(SOURCE, target=TARGET, stack="middle")
    with pytest.raises(PromptError, match="not an encoder–decoder"):
        tiny("llama").attention_stats(SOURCE, target=TARGET)
    with pytest.raises(PromptError, match="takes as its source a non-empty text, or token ids"):
        model.attention_stats(torch.zeros(8, 24), target=TARGET)
    with pytest.raises(SiteError, match=r"is an encoder–decoder.*decoder_blocks\.1\.cross_attn\.hook_z"):
        interp.patch(model, interp.PromptPair("w1 w2", "w1 w3", "w4", "w5"), model.sites("z", layers=0))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_patch_what_sites_cannot_name(paired, kind: str) -> None:
    """A head of the cross-attention carried from one source's run into another's, and all of them: the clean logits."""
    model = paired(kind)
    hf, given = model.bridge.original_model, inputs(kind, 2)
    target = given.pop("decoder_input_ids")[:1]
    (name,) = given
    clean, corrupt = ({name: given[name][i : i + 1], "decoder_input_ids": target} for i in (0, 1))
    kept: dict[str, torch.Tensor] = {}
    names = [f"decoder_blocks.{i}.cross_attn.hook_z" for i in range(len(model.bridge.decoder_blocks))]

    def keep(z: torch.Tensor, hook) -> None:
        kept[hook.name.replace("o.hook_in", "hook_z")] = z

    with torch.no_grad():
        with model.bridge.hooks(fwd_hooks=[(n, keep) for n in names]):
            expected = hf(**clean).logits
        base = hf(**corrupt).logits
        with model.bridge.hooks(fwd_hooks=[(n, lambda z, hook, n=n: kept[n]) for n in names]):
            whole = hf(**corrupt).logits  # the decoder knows the source by its cross-attention alone
        one = (names[1], lambda z, hook: torch.cat([kept[names[1]][:, :, :1], z[:, :, 1:]], 2))
        with model.bridge.hooks(fwd_hooks=[one]):
            part = hf(**corrupt).logits
    scale = expected.abs().max()
    assert (base - expected).abs().max() > 1e-4 * scale and (whole - expected).abs().max() < 1e-9 * scale
    assert (part - base).abs().max() > 1e-7 * scale
