"""Causal tracing's own parts; recipes on known circuits are in tests/zoo."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.prompts import encode_facts
from interp.tracing import _noise, subject_std, window_layers

FACTS = [interp.Fact("w1 w2 w3 w4", "w2 w3", "w95"), interp.Fact("w7 w8 w9 w1", "w8", "w90")]


@pytest.mark.parametrize(
    ("layer", "window", "n", "expected"),
    [
        (5, 1, 12, [5]),
        (5, 10, 12, [*range(10)]),
        (11, 10, 12, [*range(6, 12)]),
        (0, 10, 12, [*range(5)]),
        (3, 3, 12, [2, 3, 4]),
    ],
)
def test_windows_are_centred_and_clipped_as_published(layer: int, window: int, n: int, expected: list[int]) -> None:
    assert list(window_layers(layer, window, n)) == expected


def test_noise_falls_on_the_subject_with_the_asked_spread_and_follows_the_seed(tiny) -> None:
    model = tiny("llama")
    (prompt, _) = encode_facts(FACTS, model.coder)
    start, stop = prompt.spans["subject"]
    draws = torch.stack([_noise(model, prompt, 0.7, seed=0, example=0, sample=s) for s in range(400)])
    assert draws[:, :start].abs().sum() == 0 and draws[:, stop:].abs().sum() == 0
    assert draws[:, start:stop].std().item() == pytest.approx(0.7, rel=0.02)
    assert torch.equal(draws[3], _noise(model, prompt, 0.7, 0, 0, 3))
    assert not torch.equal(draws[3], _noise(model, prompt, 0.7, 1, 0, 3))
    assert not torch.equal(draws[3], _noise(model, prompt, 0.7, 0, 1, 3))


def test_sigma_is_the_spread_of_subject_embeddings(tiny) -> None:
    model = tiny("llama")
    prompts = encode_facts(FACTS, model.coder)
    ids = sorted({i for p in prompts for i in p.clean[slice(*p.spans["subject"])]})
    table = model.bridge.original_model.get_input_embeddings().original_component.weight
    assert subject_std(model, prompts) == pytest.approx(table[ids].float().std().item())


def test_restoring_the_embedding_output_everywhere_restores_everything(tiny) -> None:
    """resid_post of layer 0 at all positions is the whole state: effect 1; before the subject nothing changes: 0."""
    model = tiny("llama")
    whole = interp.trace(model, FACTS, layers=0, positions="all", samples=3, metric="logprob").frame()
    assert (whole["effect"] - 1).abs().max() < 1e-5
    before = interp.trace(model, FACTS, layers=[0, 1], positions=[0], samples=3, metric="logprob").frame()
    assert (before["raw"] == 0).all()


def test_rows_are_means_over_noise_samples(tiny) -> None:
    model = tiny("gpt2")
    many = interp.trace(model, FACTS[0], layers=1, positions=[2], samples=4, metric="logprob").frame()
    singles = []
    for s in range(4):
        prompt = encode_facts(FACTS[0], model.coder)[0]
        from interp.engine import Engine

        noise = _noise(model, prompt, 3.0 * subject_std(model, [prompt]), 0, 0, s)
        (run,) = Engine(model).record([prompt.clean], (), [noise])
        singles.append(run.logits.float().log_softmax(-1)[prompt.answer].item())
    assert many.loc[0, "corrupt"] == pytest.approx(np.mean(singles), abs=1e-6)


@pytest.mark.model
def test_facts_are_recalled_at_the_subject_early_and_at_the_end_late(smollm2) -> None:
    """The published shape (Meng et al. 2022): an early site at the subject's last token, a late one at the end."""
    facts = interp.tasks.facts(smollm2, n=4, seed=0)
    e = interp.trace(smollm2, facts, layers=[0, 2, 28], samples=2)
    frame = e.frame()
    last = frame.groupby("example")["position"].transform("max")
    by = frame.assign(end=frame["position"] == last).groupby(["layer", "end", "role"])["effect"].mean()
    assert by[0, False, "subject"] > 0.3 > abs(by[28, False, "subject"])
    assert by[28, True, ""] > 0.8 > 0.2 > abs(by[0, True, ""])
