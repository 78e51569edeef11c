"""What cannot be loaded or read is refused, with one message that says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from headstats import StatSpec

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import ModelError, PromptError


def test_attention_that_transformer_lens_computes_in_its_own_way_is_refused_by_name(word_tokenizer) -> None:
    import transformers as tf

    hf = tf.CodeGenForCausalLM(tf.CodeGenConfig(vocab_size=100, n_embd=32, n_layer=2, n_head=4, rotary_dim=4))
    with pytest.raises(ModelError, match="CodeGenAttention computes attention in a way of its own"):
        interp.load(hf, tokenizer=word_tokenizer)


def test_a_model_without_any_attention_is_refused(word_tokenizer) -> None:
    import transformers as tf

    hf = tf.MambaForCausalLM(tf.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=4))
    with pytest.raises(ModelError, match="no softmax attention in any of its 2 layers"):
        interp.load(hf, tokenizer=word_tokenizer)


def test_a_hybrid_has_head_sites_only_where_it_has_attention(tiny) -> None:
    model = tiny("lfm2")
    assert model.attention_layers == [1] and {s.layer for s in model.sites("z")} == {1}
    assert {s.layer for s in model.sites("resid_pre")} == {0, 1, 2}
    pair = interp.PromptPair("w1 w2 w3", "w1 w5 w3", " w7", " w8")
    effects = interp.patch(model, pair, model.sites("z", layers=None) | model.sites("resid_pre"))
    assert "layers without softmax attention" in effects.provenance["engine"]


def test_an_attention_that_bypasses_the_interface_is_refused_by_name(word_tokenizer) -> None:
    """A module that never calls the attention interface: no call arrives, and loading must say so."""
    import transformers as tf
    from transformers.models.opt.modeling_opt import OPTAttention

    class Bypassing(OPTAttention):
        def forward(self, hidden_states, *args, **kwargs):
            return self.out_proj(self.v_proj(hidden_states)), None

    hf = tiny_hf("opt", torch.float32)
    assert isinstance(hf, tf.OPTForCausalLM)
    for layer in hf.model.decoder.layers:
        layer.self_attn.__class__ = Bypassing
    with pytest.raises(ModelError, match=r"OPTForCausalLM.*no call arrived from 3 of 3 layers"):
        interp.load(hf, tokenizer=word_tokenizer)


def test_nan_weights_are_refused_by_name(word_tokenizer) -> None:
    hf = tiny_hf("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(ModelError, match=r"up_proj.*holds 1 NaN"):
        interp.load(hf, tokenizer=word_tokenizer)


def test_wrong_attention_is_refused(word_tokenizer, monkeypatch) -> None:
    """Negative control: a kernel with a wrong scale must not pass the check at loading."""
    import headstats

    import interp.model.instrument as instrument

    real = headstats.attend
    monkeypatch.setattr(instrument.headstats, "attend", lambda *a, **k: real(*a, **{**k, "scale": k["scale"] * 1.05}))
    with pytest.raises(ModelError, match="logits through headstats differ"):
        interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("/no/such/folder", "does not exist"),
        ("some-org/some-model-that-is-not-here", "hub cannot be reached"),
        (3, "cannot load a int"),
        (torch.nn.Linear(2, 2), "cannot load a bare Linear"),
    ],
)
def test_what_cannot_be_loaded_is_explained(source, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        interp.load(source)


def test_folders_that_are_not_models(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        interp.load(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"holds model\.gguf: pass that file"):
        interp.load(str(tmp_path))
    with pytest.raises(ModelError, match="cannot load model"):
        interp.load(str(tmp_path / "model.gguf"))


def test_pickled_checkpoints_are_not_opened(tmp_path, word_tokenizer) -> None:
    hf = tiny_hf("llama", torch.float32)
    hf.config.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    torch.save(hf.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="offers no safetensors"):
        interp.load(str(tmp_path))


def test_local_folders_bridges_and_models_load(tmp_path, word_tokenizer) -> None:
    hf = tiny_hf("llama", torch.float32)
    hf.save_pretrained(tmp_path)
    word_tokenizer.save_pretrained(tmp_path)
    model = interp.load(str(tmp_path), dtype=torch.float64)
    assert model.dtype == torch.float64 and interp.load(model) is model
    assert model.name == tmp_path.name and "2 KV" in repr(model)


def test_nothing_is_installed_behind_the_users_back(word_tokenizer, monkeypatch) -> None:
    """TransformerLens would pip-install torchvision when some models boot; loading must prevent that.

    Its own function is never called here: outside a boot it is TransformerLens' again, and would install.
    """
    import importlib.util
    import subprocess

    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.model_bridge.sources.transformers import helpers

    def install(*args: object, **_: object) -> None:
        raise AssertionError(f"loading a model ran {args}")

    monkeypatch.setattr(subprocess, "check_call", install)
    boot, boots = TransformerBridge.boot_transformers, []

    def boot_transformers(*args: object, **options: object) -> object:
        assert "pip" not in helpers._ensure_torchvision.__code__.co_consts
        assert helpers._ensure_torchvision() is (importlib.util.find_spec("torchvision") is not None)
        boots.append(args)
        return boot(*args, **options)

    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(boot_transformers))
    interp.load(tiny_hf("llama"), tokenizer=word_tokenizer)
    assert len(boots) == 1


def test_prompts_beyond_the_context_and_empty_sets_are_refused(tiny) -> None:
    model = tiny("llama")
    with pytest.raises(PromptError, match="longer than"):
        model.attention_stats(" ".join(["w1"] * 80))
    with pytest.raises(PromptError, match="no prompts"):
        model.attention_stats([])
    with pytest.raises(PromptError, match="item 0 is float"):
        model.attention_stats([3.5])
    with pytest.raises(PromptError, match="spec='all': a headstats"):
        model.attention_stats("w1 w2", "all")  # pyright: ignore[reportArgumentType]
    assert model.attention_stats("w1 w2", StatSpec(topk=2)).provenance["left_out"] == ["topk"]
    with pytest.raises(PromptError, match="spec asks for topk: attention_stats keeps"):
        model.attention_stats("w1 w2", StatSpec(**dict.fromkeys(StatSpec().requested(), False), topk=2))


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2 would also lose its causal mask
def test_another_attention_implementation_chosen_after_loading_is_refused(family: str, word_tokenizer) -> None:
    ids, untouched = torch.arange(8)[None] + 5, tiny_hf(family)
    model = interp.load(tiny_hf(family), tokenizer=word_tokenizer)
    hf: Any = model.bridge.original_model
    ours = hf.config._attn_implementation
    hf.set_attn_implementation("sdpa")
    runs = (lambda: model(ids), lambda: hf(ids), lambda: model.attention_stats("w1 w2"))
    for run in runs:
        with pytest.raises(ModelError, match=r"was changed to 'sdpa' after it was loaded.*release\(\)"):
            run()
    hf.set_attn_implementation(ours)
    torch.testing.assert_close(hf(ids).logits, untouched(ids).logits, atol=1e-5, rtol=0)
    hf.set_attn_implementation("sdpa")
    model.release()  # the user's choice stays
    torch.testing.assert_close(hf(ids).logits, untouched(ids).logits, atol=1e-5, rtol=0)
