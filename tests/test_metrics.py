from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.errors import InterpError
from interp.metrics import METRICS, Readout, as_metric, recovery

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
    }
    assert set(expected) == set(METRICS)
    for name, value in expected.items():
        np.testing.assert_allclose(METRICS[name](LOGITS, READ), value, atol=1e-6, err_msg=name)


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
