"""`interp doctor`: what it says of a model, and that it notices when something is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import interp
from interp import zoo
from interp.cli.main import app
from interp.doctor import examination as doctor
from interp.doctor.families.text import tiny_hf
from interp.doctor.matrix import WORDS
from interp.doctor.memory import PeakMemory, forward_peak
from interp.errors import InterpError
from interp.model.instrument import Instrument
from interp.zoo.tokenizer import word_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def llama(tokenizer):
    return doctor.examine(tiny_hf("llama", torch.float32), tokenizer=tokenizer, context=50)


def values(found: doctor.Examination, section: str) -> dict[str, str]:
    return {f.item: f.value for f in found.findings if f.section.startswith(section)}


def test_a_sound_model_passes_every_check(llama) -> None:
    assert llama.passed and "all checks passed" in str(llama)
    checks = llama.frame().dropna(subset="passed")
    assert list(checks["item"]) == [
        "one prompt", "padded on the left", "padded on the right", "key/value cache", "call count",
        "q, k, v, z, result",
    ]  # fmt: skip
    assert values(llama, "backend")["layers 0–2"] in ("LlamaAttention: blocked", "LlamaAttention: compiled")


def test_sites_are_tried_and_their_absence_is_explained(llama, tokenizer) -> None:
    assert all(v.startswith("available") for v in values(llama, "sites").values())
    parallel = values(doctor.examine(tiny_hf("gptj", torch.float32), tokenizer=tokenizer), "sites")
    assert parallel["resid_mid"].startswith("not available: ") and "no 'resid_mid'" in parallel["resid_mid"]
    assert parallel["z"].startswith("available at 3 layer(s)")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_half_precision_is_measured_and_the_weights_come_back(family: str, tokenizer) -> None:
    model = interp.load(tiny_hf(family, torch.float32), tokenizer=tokenizer)
    before, tokens = model.fingerprint(), torch.tensor([[5, 6, 7]])
    logits = model(tokens)
    found = values(doctor.examine(model), "numbers")
    for dtype in ("bfloat16", "float16"):
        assert "logits by up to" in found[f"{dtype} on cpu"], found
    assert model.fingerprint() == before and torch.equal(model(tokens), logits)


def test_overflow_in_float16_is_named(tokenizer) -> None:
    hf = tiny_hf("llama", torch.float32)
    with torch.no_grad():
        hf.model.layers[0].mlp.down_proj.weight.mul_(1e5)
    found = values(doctor.examine(hf, tokenizer=tokenizer), "numbers")
    assert "NaN or infinite" in found["float16 on cpu"] and "NaN" not in found["bfloat16 on cpu"]


def test_memory_is_counted_exactly_where_it_can_be(llama, tokenizer) -> None:
    hf = tiny_hf("llama", torch.float32)
    found = values(llama, "memory for one prompt of 50 tokens")
    assert found["key/value cache"].startswith("   19 KiB")  # 3 layers × 2 heads × (8 + 8) × 50 × 4 bytes
    assert found["dense attention, all layers"].startswith("  117 KiB")  # 3 layers × 4 heads × 50² × 4 bytes
    weights = sum(p.numel() * 4 for p in hf.parameters()) // 1024
    assert abs(float(found["weights"].split()[0]) - weights) <= 1


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    held = torch.ones(1000)
    with PeakMemory([held]) as meter:
        a = held + 1
        b = a.view(10, 100)  # no memory of its own
        del a
        c = b + 1
        del b
        c = c * 2 + held.view(10, 100)
    assert meter.peak == 3 * 4000 and meter.now == 4000 == c.numel() * 4


def test_activations_grow_linearly_so_that_the_estimate_holds(tokenizer) -> None:
    import transformers

    from interp.doctor.families.text import config

    long = config("llama")
    long.max_position_embeddings = 2048
    model = interp.load(transformers.LlamaForCausalLM(long).eval(), tokenizer=tokenizer)
    estimate = values(doctor.examine(model, context=1024), "memory")["activations"]
    size, unit = estimate.split()[:2]
    measured = forward_peak(model, 1024) / {"KiB": 2**10, "MiB": 2**20}[unit]
    assert 0.7 < float(size) / measured < 1.4, (estimate, measured)


def test_wrong_attention_fails_the_examination(tokenizer, monkeypatch) -> None:
    """Broken where loading does not look: only batches with padding go wrong."""
    real = Instrument.__call__
    monkeypatch.setattr(
        Instrument, "__call__", lambda self, call, bridge: real(self, replace(call, key_padding=None), bridge)
    )
    found = doctor.examine(tiny_hf("llama", torch.float32), tokenizer=tokenizer)
    assert not found.passed and "SOME CHECKS FAILED" in str(found)
    failed = [f.item for f in found.findings if f.passed is False]
    assert failed == ["padded on the left"]


def test_contexts_the_model_lacks_are_refused(tokenizer) -> None:
    with pytest.raises(InterpError, match=r"--context 65: .* has a context of 64"):
        doctor.examine(tiny_hf("llama", torch.float32), tokenizer=tokenizer, context=65)


def test_the_command_line_says_by_its_exit_code_whether_all_is_well(tmp_path, tokenizer, monkeypatch) -> None:
    tiny_hf("llama", torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    call = CliRunner().invoke
    sound = call(app, ["doctor", str(tmp_path), "--context", "32"])
    assert sound.exit_code == 0 and "memory for one prompt of 32 tokens" in sound.stdout
    monkeypatch.setattr(doctor, "TOLERANCE", {torch.float32: 0.0})
    assert call(app, ["doctor", str(tmp_path)]).exit_code == 1


@pytest.mark.parametrize(("options", "marks"), [([], "✓"), (["--markdown"], "| llama | LlamaForCausalLM |")])
def test_the_command_line_prints_the_matrix(options: list[str], marks: str, monkeypatch) -> None:
    from interp.doctor.matrix import table

    monkeypatch.setattr(table, "FAMILIES", {"llama": table.FAMILIES["llama"]})
    done = CliRunner().invoke(app, ["doctor", "--architectures", *options])
    assert done.exit_code == 0 and marks in done.stdout
    monkeypatch.setattr(table, "ALLOWED", 0.0)
    assert CliRunner().invoke(app, ["doctor", "--architectures", *options]).exit_code == 1


@pytest.mark.model
@pytest.mark.slow
def test_the_embedded_model_is_well() -> None:
    found = doctor.examine("smollm2")
    assert found.passed and "layers 0–29" in str(found)
    assert all(v.startswith("available") for v in values(found, "sites").values())


@pytest.mark.parametrize("family", ["bert", "t5", "whisper", "vit", "llava", "blip2"])
def test_the_doctor_sees_every_kind_of_model(family: str) -> None:
    tokenizer = word_tokenizer(WORDS)
    tokenizer.add_special_tokens({"mask_token": "w50"})
    found = doctor.examine(tiny_hf(family, torch.float32), tokenizer=tokenizer)
    assert found.passed, str(found)
    checks = found.frame().dropna(subset="passed")
    sites = values(found, "sites")
    if family in ("t5", "whisper"):
        assert "a source and a target" in set(checks["item"]) and "encoder–decoder" in sites["all"]
        assert [k.split()[0] for k in values(found, "backend") if "layers" in k] == ["encoder", "decoder", "cross"]
        return
    assert all(sites[c].startswith("available at 3 layer(s)") for c in ("resid_pre", "attn_out", "mlp_out", "z"))
    first = {"bert": "one prompt", "vit": "two images"}.get(family, "a prompt with an image")
    assert checks["item"].iloc[0] == first


def test_the_doctor_notices_a_model_of_images_that_changed(monkeypatch) -> None:
    real = Instrument.__call__
    hf = tiny_hf("vit", torch.float32)
    from interp.model import verification

    monkeypatch.setattr(verification, "verify", lambda model, before: None)
    monkeypatch.setattr("interp.model.model.verify", lambda model, before: None)
    monkeypatch.setattr(
        Instrument, "__call__", lambda self, call, bridge: real(self, replace(call, scale=call.scale * 1.1), bridge)
    )
    found = doctor.examine(hf)
    assert not found.passed and not found.findings[0].passed


def test_a_native_model_is_examined_on_tokens_that_its_tokenizer_knows() -> None:
    known = zoo.induction()
    found = doctor.examine(known.model)  # a native model of TransformerLens: no Hugging Face config
    assert found.passed
    assert values(found, "sites")["resid_pre"].startswith("available at 2 layer(s)")  # not on a prompt of unknown words
    assert "_pairs" not in repr(known) and " at 0x" not in repr(known)
