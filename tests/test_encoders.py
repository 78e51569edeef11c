"""Bidirectional text encoders: routed, masked as transformers masks them, and read at their mask token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import of_kind
from headstats import StatSpec
from pictured import blocks_of, cut

import interp
from interp.doctor.families.text import FAMILIES, tiny_hf
from interp.errors import PromptError

ENCODERS = of_kind("encoder")


@pytest.fixture(scope="module")
def masking_tokenizer(word_tokenizer):
    import copy

    tokenizer = copy.deepcopy(word_tokenizer)
    tokenizer.add_special_tokens({"mask_token": "w50"})  # a word of its vocabulary, so that the model has a row for it
    return tokenizer


@pytest.fixture(scope="module")
def encoder(masking_tokenizer):
    built: dict[str, interp.Model] = {}

    def get(kind: str) -> interp.Model:
        if kind not in built:
            built[kind] = interp.load(tiny_hf(kind), tokenizer=masking_tokenizer)
        return built[kind]

    return get


def output(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_outputs_equal_eager(masking_tokenizer, kind: str, side: str) -> None:
    """In float32: transformers' eager float64 mask overflows its float32 softmax on rows that see no key."""
    ids = torch.randint(2, 100, (3, 13), generator=torch.Generator().manual_seed(1))
    real = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 7) if side != "none" else (0, 0, 0)):
        real[row, slice(0, pad) if side == "left" else slice(13 - pad, 13)] = 0
    theirs = output(tiny_hf(kind, torch.float32), input_ids=ids, attention_mask=real)[real.bool()]
    model = interp.load(tiny_hf(kind, torch.float32), tokenizer=masking_tokenizer).bridge.original_model
    ours = output(model, input_ids=ids, attention_mask=real)[real.bool()]
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    if side != "none":  # negative control: without its mask, padding is attended to
        unmasked = output(model, input_ids=ids, attention_mask=torch.ones_like(real))[real.bool()]
        assert (unmasked - theirs).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize("kind", ENCODERS)
def test_statistics_equal_those_of_the_dense_pattern(encoder, kind: str) -> None:
    model = encoder(kind)
    text = " ".join(f"w{i}" for i in (5, 9, 5, 77, 12, 9, 5, 31, 2, 8, 8, 40))
    model.instrument.layers.clear()
    stats = model.attention_stats(text, StatSpec(received=True))
    assert (model.backend_report()["calls"] == 1).all()  # no layer is bypassed
    ids = torch.tensor([model.coder.encode(text)])
    _, cache = model.bridge.run_with_cache(ids, names_filter=lambda n: n.endswith("hook_pattern"))
    p = torch.stack([cache[f"blocks.{i}.attn.hook_pattern"][0] for i in range(model.n_layers)]).double().numpy()
    assert np.triu(p, 1).sum() > 1  # it reads to the right
    n = p.shape[-1]
    behind = np.arange(n)[:, None] - np.arange(n)
    near = FAMILIES[kind].arguments.get("local_attention")
    if near:  # layers 1 of 0, 1, 2 are local: transformers counts half the window to either side, inclusive
        assert (p[1][:, np.abs(behind) > near // 2] == 0).all() and (p[0][:, np.abs(behind) > near // 2] > 0).all()
    logs = np.log(np.where(p > 0, p, 1))
    expected = {"entropy": -(p * logs).sum(-1), "argmax": p.argmax(-1), "distance": (p * behind).sum(-1)}
    for name, value in expected.items():
        np.testing.assert_allclose(stats.values[name][0], value, atol=1e-9, err_msg=name)
    seen = (p > 0).sum(-2)
    np.testing.assert_allclose(stats.values["received"][0], p.sum(-2) / seen, atol=1e-9)


@pytest.mark.parametrize("kind", [k for k in ENCODERS if "headless" not in str(k)])
def test_metrics_are_read_at_the_mask_token(encoder, kind: str) -> None:
    model = encoder(kind)
    pair = interp.PromptPair("w1 w2 w50 w4", "w1 w9 w50 w4", "w7", "w8")
    effects = interp.patch(model, pair, model.sites("z", layers=1) | model.sites("resid_pre", layers=[1, 2]))
    assert "not causal" in effects.provenance["engine"]
    frame = effects.frame()
    answer, foil = (model.coder.continuation(w)[0] for w in ("w7", "w8"))
    ids = torch.tensor([model.coder.encode(t) for t in (pair.clean, pair.corrupt)])
    with torch.no_grad():
        logits = model(ids)[ids == model.tokenizer.mask_token_id]
    expected = (logits[:, answer] - logits[:, foil]).tolist()
    assert frame["clean"].iloc[0] == pytest.approx(expected[0]) and frame["corrupt"].iloc[0] == pytest.approx(
        expected[1]
    )
    whole = frame[(frame["component"] == "resid_pre") & (frame["layer"] == 1)]
    assert whole["effect"].abs().max() > 1e-3
    with pytest.raises(PromptError, match="exactly once, but one holds it 0 times"):
        model.last_logits(torch.tensor([[4, 5]]))


def test_a_model_without_a_head_has_no_words(encoder) -> None:
    model = encoder("bert_headless")
    pair = interp.PromptPair("w1 w2 w50 w4", "w1 w9 w50 w4", "w7", "w8")
    with pytest.raises(interp.errors.InterpError, match="ends in hidden states"):
        interp.patch(model, pair, model.sites("z"))
    own = interp.patch(model, pair, model.sites("z", layers=0), metric=lambda out, read: out[:, 0])
    assert own.frame()["patched"].notna().all()


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_a_cut_hides_nothing_else(encoder, kind: str) -> None:
    """What a query reads to its right stays, in a layer where attention to its left is cut."""
    model, eager = encoder(kind), tiny_hf(kind)
    pair = interp.PromptPair("w1 w2 w50 w4", "w1 w9 w50 w4", "w7", "w8")
    found = interp.knock_out(model, pair, 0, 1, layers=[0, 1], window=1, metric="logit_diff", show_progress=False)
    ids = torch.tensor([model.coder.encode(pair.clean)])
    answer, foil = (model.coder.continuation(w)[0] for w in ("w7", "w8"))
    for layer, value in enumerate(found.frame()["patched"]):
        with torch.no_grad(), cut(blocks_of(eager, model)[layer], slice(1, 2), slice(0, 1)):
            logits = eager(input_ids=ids).logits[ids == model.tokenizer.mask_token_id][0]
        assert value == pytest.approx((logits[answer] - logits[foil]).item(), abs=1e-6)


def test_folders_open_by_what_their_config_says(tmp_path, masking_tokenizer) -> None:
    for kind, name in (("bert", "BertForMaskedLM"), ("bert_headless", "BertModel")):
        tiny_hf(kind, torch.float32).save_pretrained(tmp_path / kind)
        masking_tokenizer.save_pretrained(tmp_path / kind)
        assert type(interp.load(str(tmp_path / kind)).bridge.original_model).__name__ == name
