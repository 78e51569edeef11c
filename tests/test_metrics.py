from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch

import interp
from interp.doctor.families.text import tiny_hf
from interp.errors import InterpError
from interp.metrics import METRICS, Readout, as_metric, recovery, rounding

LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
READ = Readout(torch.tensor([0, 1]), torch.tensor([1, 2]), LOGITS.flip(0))


def test_values_against_numpy() -> None:
    x = LOGITS.numpy()
    p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    q = p[::-1]
    expected = {
        "logit_diff": [1.5, -3.0],
        "prob": [p[0, 0], p[1, 1]],
        "logprob": [np.log(p[0, 0]), np.log(p[1, 1])],
        "rank": [0, 1],
        "kl": (q * np.log(q / p)).sum(-1),
        "token_kl": (q * np.log(q / p)).sum(-1),
    }
    assert {*expected, "seq_logprob"} == set(METRICS)
    read = dataclasses.replace(READ, run_logits=LOGITS.flip(0), tokens=torch.tensor([[0, 2], [1, 0]]))
    both = np.stack([np.log(p), np.log(p)[::-1]], 1)
    sums = [both[0, 0, 0] + both[0, 1, 2], both[1, 0, 1] + both[1, 1, 0]]
    np.testing.assert_allclose(interp.seq_logprob(torch.stack([LOGITS, LOGITS.flip(0)], 1), read), sums, atol=1e-6)
    for name, value in expected.items():
        np.testing.assert_allclose(METRICS[name](LOGITS, read), value, atol=1e-6, err_msg=name)


def test_recovery_ends_and_undefined() -> None:
    clean, corrupt = torch.tensor([4.0, 4.0, 1.0]), torch.tensor([0.0, 2.0, 1.0])
    patched = torch.tensor([1.0, 5.0, 9.0])
    torch.testing.assert_close(recovery(patched, clean, corrupt, "denoise")[:2], torch.tensor([0.25, 1.5]))
    torch.testing.assert_close(recovery(patched, clean, corrupt, "noise")[:2], torch.tensor([0.75, -0.5]))
    assert recovery(patched, clean, corrupt, "denoise")[2].isnan()
    for mode, end in (("denoise", clean), ("noise", corrupt)):
        assert (recovery(end, clean, corrupt, mode)[:2] == 1).all()


def test_errors_teach() -> None:
    no_foil = Readout(torch.tensor([0, 1]))
    with pytest.raises(InterpError, match="needs a foil"):
        interp.logit_diff(LOGITS, no_foil)
    with pytest.raises(InterpError, match="clean run's logits"):
        interp.kl(LOGITS, no_foil)
    with pytest.raises(InterpError, match="known metrics: logit_diff"):
        as_metric("accuracy")
    for wrong, words in (
        (lambda x, r: x.mean(), r"shape \[\]"),
        (lambda x, r: 1.0, "float"),
        (lambda x, r: x, "one number"),
    ):
        with pytest.raises(InterpError, match=words):
            as_metric(wrong)(LOGITS, READ)


def test_rows_of_a_readout_follow_the_index() -> None:
    r = READ.rows(torch.tensor([1, 1, 0]))
    assert r.answer.tolist() == [1, 1, 0] and r.foil is not None and r.foil.tolist() == [2, 2, 1]
    assert r.clean_logits is not None and torch.equal(r.clean_logits[2], LOGITS[1])


@pytest.mark.parametrize("name", ["logit_diff", "prob", "logprob", "kl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_of_a_score_covers_roundings_of_the_logits_and_little_more(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 100, generator=generator, dtype=torch.float64) * 5
    read = Readout(torch.arange(64), torch.arange(64) + 1, exact.to(dtype))
    bound = rounding(METRICS[name], exact.to(dtype), read, dtype)
    eps = torch.finfo(dtype).eps
    noise = torch.randn(64, 100, generator=generator, dtype=torch.float64).sign() * exact.abs().amax(-1, keepdim=True)
    for scale, covered in ((0.5 * eps, True), (40 * eps, False)):
        before = METRICS[name](exact, read).double()
        moved = (METRICS[name](exact + scale * noise, read).double() - before).abs()
        if covered:  # half a unit in the last place of the largest logit, in random directions
            assert (moved <= bound + 1e-12).float().mean() > 0.9
        elif name in ("logit_diff", "logprob"):  # a real change of forty units is seen
            assert (moved > 2 * bound).float().mean() > 0.4 and bound.min() > 0


def test_pairs_within_rounding_have_no_recovery(tiny_float32, caplog, monkeypatch) -> None:
    """As on a processor whose products round otherwise in another batch: the same prompt, other last bits."""
    from interp.engine import Engine

    record = Engine.record

    def other_last_bits(self, *args, **options):
        runs = record(self, *args, **options)
        logits = runs[0].logits  # of the first pair's clean run: its corrupt run comes to the same, rounded otherwise
        return [runs[0], replace(runs[1], logits=logits * (1 + torch.finfo(logits.dtype).eps)), *runs[2:]]

    monkeypatch.setattr(Engine, "record", other_last_bits)
    pairs = [interp.PromptPair("w1 w2 w3", "w4 w2 w3", "w95", "w96"), interp.PromptPair("w1 w2", "w9 w2", "w95", "w96")]
    effects = interp.ablate(tiny_float32, pairs, "attn_out.L0", using="zero", engine="naive").frame()
    assert effects["clean"][0] != effects["corrupt"][0]
    assert "the same on the clean and the corrupt prompt of 1 of 2 pairs" in caplog.text
    same = effects[effects["example"] == 0]
    assert same["effect"].isna().all() and same["raw"].notna().all()
    assert effects[effects["example"] == 1]["effect"].notna().all()


@pytest.fixture(scope="module")
def tiny_float32(word_tokenizer):
    return interp.load(tiny_hf("llama"), tokenizer=word_tokenizer, dtype=torch.float32)
