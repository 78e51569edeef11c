"""A memory budget: what is held stays within it, and what cannot fit is refused before the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import interp
from interp.doctor.memory import PeakMemory
from interp.engine.budget import as_bytes
from interp.engine.core import Engine
from interp.errors import InterpError

PAIRS = [interp.PromptPair(f"w{i} w2 w3 w4 w5 w6", f"w9 w{i} w3 w4 w5 w7", "w95", "w96") for i in range(10, 34)]


def test_sizes() -> None:
    for text, n in (
        (1000, 1000),
        ("4GiB", 4 * 2**30),
        ("500 MB", 500_000_000),
        ("1.5kib", 1536),
        ("7", 7),
        (None, None),
    ):
        assert as_bytes(text) == n
    for wrong in ("lots", "4 gigs", 0, -1, "", True, [1]):
        with pytest.raises(InterpError, match="a size like '4GiB'"):
            as_bytes(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peak_memory_stays_within_the_budget_and_results_the_same(tiny, kind: str) -> None:
    model = tiny(kind)
    sites = model.sites("resid_pre") | model.sites("z")
    held = [*model.bridge.parameters(), *model.bridge.buffers()]
    free = interp.patch(model, PAIRS, sites, metric="logprob")
    peaks = []
    for budget in ("16MiB", "1MiB", "600KiB"):
        with PeakMemory(held) as meter:
            e = interp.patch(model, PAIRS, sites, metric="logprob", memory=budget)
        np.testing.assert_allclose(e.frame()["patched"], free.frame()["patched"], atol=1e-9)
        assert e.provenance["engine"] == free.provenance["engine"]
        assert meter.peak <= (as_bytes(budget) or 0)
        peaks.append(meter.peak)
    assert peaks[0] > 2 * peaks[-1]  # it was used where it was there


def test_other_recipes_keep_to_it(tiny) -> None:
    model = tiny("llama")
    held = [*model.bridge.parameters(), *model.bridge.buffers()]
    facts = [interp.Fact("w1 w2 w3 w4", "w2 w3", "w95")] * 6
    recipes = {
        "ablate": lambda m: interp.ablate(model, PAIRS, model.sites("z"), memory=m),
        "trace": lambda m: interp.trace(model, facts, memory=m),
        "path": lambda m: interp.path_patch(model, PAIRS[:2], model.sites("z"), model.sites("k"), memory=m),
        "knock_out": lambda m: interp.knock_out(model, PAIRS, 2, memory=m),
        "steer": lambda m: interp.steer(model, PAIRS, model.sites("resid_pre"), torch.ones(model.d_model), memory=m),
        "leave_out": lambda m: interp.leave_out(model, [p.span("s", "w3 w4") for p in PAIRS], memory=m),
        "mediate": lambda m: interp.mediate(model, PAIRS, model.sites("z"), memory=m),
    }
    for name, recipe in recipes.items():
        want = recipe(None).frame()["patched"]
        with PeakMemory(held) as meter:
            got = recipe("1MiB").frame()["patched"]
        assert meter.peak <= 2**20, name
        np.testing.assert_allclose(got, want, atol=1e-9, err_msg=name)


def test_a_budget_too_small_for_one_cell_is_refused_before_the_run(tiny, monkeypatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(type(model), "last_logits", lambda self, t: pytest.fail("a forward was run"))
    with pytest.raises(InterpError, match=r"memory=20KiB is too small for one cell on a prompt of 7 tokens.*at least"):
        interp.patch(model, PAIRS, model.sites("z"), memory="20KiB")


def test_what_the_message_asks_for_is_enough(tiny) -> None:
    model = tiny("llama")
    with pytest.raises(InterpError) as caught:
        interp.patch(model, PAIRS[0], model.sites("z"), memory=1000)
    need = str(caught.value).split("at least memory='")[1].split("'")[0]
    interp.patch(model, PAIRS[0], model.sites("z"), memory=need)


def test_batches_grow_with_the_budget(tiny) -> None:
    model = tiny("llama")
    sizes = []
    for budget in ("300KiB", "3MiB", None):
        runner = Engine(model, "fast", budget)
        runner.fit_batches_to_memory(7, 100_000)
        sizes.append((runner.rows_per_batch, runner.cells_per_batch))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
