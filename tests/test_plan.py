"""Plans: what a sweep will cost, before it runs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import interp
from interp.engine import Engine, core
from interp.engine import matmul as products
from interp.engine import packed_attention as joint
from interp.engine import packed_forward as packed
from interp.engine.verified import VERIFIED, Verified
from interp.errors import InterpError

EARLY = interp.PromptPair("w1 w2 w3 w4 w5 w6", "w9 w2 w3 w4 w5 w6", "w95", "w96")
LATE = interp.PromptPair("w1 w2 w3 w4 w5 w6", "w1 w2 w3 w4 w9 w6", "w95", "w96")


def test_a_plan_counts_cells_and_what_they_need(tiny) -> None:
    model = tiny("llama")
    n = len(model.coder.encode(LATE.clean))
    plan = interp.explain(interp.patch, model, LATE, model.sites("resid_pre"))
    assert plan.n_cells == model.n_layers * n
    # all positions before the difference, what the same token after it is embedded as, and what the others are, since
    # the only token that differs carries all that there is
    assert plan.n_answered == model.n_layers * (n - 2) + 2
    steps = list(plan.steps.values())
    assert steps == sorted(steps, reverse=True) and steps[-1] < steps[0] / 5
    early = interp.explain(interp.patch, model, EARLY, model.sites("resid_pre"))
    assert early.flops > 2 * plan.flops
    text = str(early)
    assert f"{early.n_cells} cells" in text and "FLOP" in text and "memory" in text and "without blocks" in text


def test_a_blind_cell_is_answered_without_a_forward(tiny, monkeypatch) -> None:
    """In the last layer, what is written after the keys elsewhere than in the last row is read by nothing."""
    model = tiny("llama")
    site = interp.Site("mlp_out", model.n_layers - 1, position=3)
    want = interp.patch(model, EARLY, site, engine="naive").frame()
    assert interp.explain(interp.patch, model, EARLY, site).n_answered == 1
    monkeypatch.setattr(packed.PackedForward, "logits", lambda self: pytest.fail("a forward was run"))
    e = interp.patch(model, EARLY, site, engine="fast").frame()
    assert e["raw"][0] == 0 and want["raw"][0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("recipe", ["ablate", "trace", "steer", "knock_out", "mediate", "path_patch"])
def test_every_recipe_can_be_explained(tiny, recipe: str) -> None:
    model = tiny("llama")
    fact = interp.Fact("w1 w2 w3 w4", "w2 w3", "w95")
    arguments = {
        "ablate": (EARLY, model.sites("z")), "trace": (fact,), "knock_out": (EARLY, 1), "mediate": (EARLY, "z.L1H1"),
        "steer": (EARLY, "resid_pre.L1", torch.ones(model.d_model)), "path_patch": (EARLY, "z.L0H1", "q.L2H0"),
    }  # fmt: skip
    plan = interp.explain(getattr(interp, recipe), model, *arguments[recipe])
    assert plan.n_cells > 0 and plan.flops > 0 and plan.seconds > 0 and plan.runs_bytes > 0


def test_a_naive_plan_promises_no_savings(tiny) -> None:
    model = tiny("llama")
    plan = interp.explain(interp.patch, model, EARLY, model.sites("z"), engine="naive")
    assert list(plan.steps) == ["one full forward per cell"] and "full forward per cell" in str(plan)
    assert len(plan.batches) == plan.n_cells
    with pytest.raises(InterpError, match="there is no sweep"):
        interp.explain(lambda show_progress: None)


@pytest.mark.parametrize("lean", [True, False])
def test_the_flops_of_a_plan_are_those_that_run(tiny, monkeypatch, lean: bool) -> None:
    """Counted by torch's own counter: matrix products of the packed forwards, within the rotary and norm rest."""
    from torch.utils.flop_counter import FlopCounterMode

    monkeypatch.setattr(products, "is_onednn_faster", lambda threads: False)  # the counter does not know its operators
    model = tiny("llama")
    monkeypatch.setitem(VERIFIED, model, Verified())  # as it was loaded
    if not lean:
        monkeypatch.setattr(core, "read_plain_blocks", lambda model: None)
    sites = model.sites("resid_pre", layers=[0, 1])
    interp.patch(model, EARLY, sites)  # its self-check is done
    plan = interp.explain(interp.patch, model, EARLY, sites)
    # With means in place of attention: the counter does not see into every backend.

    def means(call, **_):
        mean = call.v.mean(2, keepdim=True).repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)
        return SimpleNamespace(out=mean.expand(call.q.shape).clone())

    monkeypatch.setattr(joint, "attend", means)
    vars(plan)["cost"] = replace(plan.cost, pattern=0.0)
    runs = Engine(model).record([model.coder.encode(EARLY.clean)] * 2)
    with FlopCounterMode(display=False) as base:
        Engine(model).record([model.coder.encode(t) for t in (EARLY.clean, EARLY.corrupt)], ("resid_pre",))
    with FlopCounterMode(display=False) as all_of_it:
        interp.patch(model, EARLY, sites)
    assert len(runs) == 2
    measured = all_of_it.get_total_flops() - base.get_total_flops()
    assert measured == pytest.approx(plan.flops, rel=0.001)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.90 GB, max allowed: 18.13 GB)"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes"),
        MemoryError(),
    ],
    ids=["cuda", "mps", "cpu", "python"],
)
def test_out_of_memory_halves_the_batch_and_goes_on(tiny, monkeypatch, caplog, error: BaseException) -> None:
    model = tiny("llama")
    sites = model.sites("resid_pre")
    want = interp.patch(model, EARLY, sites).frame()["patched"]
    real = packed.PackedForward.logits

    def small_machine(self, *where):
        if len(self.cells) > 5:
            raise error
        return real(self, *where)

    monkeypatch.setattr(packed.PackedForward, "logits", small_machine)
    got = interp.patch(model, EARLY, sites).frame()["patched"]
    assert (got - want).abs().max() < 1e-9 and "half as many" in caplog.text
    monkeypatch.setattr(packed.PackedForward, "logits", lambda self, *where: _raise(error))
    with pytest.raises(InterpError, match="one cell on a prompt of"):
        interp.patch(model, EARLY, sites)


def test_another_runtime_error_is_not_taken_for_lack_of_memory(tiny, monkeypatch) -> None:
    model = tiny("llama")
    interp.patch(model, EARLY, model.sites("resid_pre"))  # its self-check is done
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(packed.PackedForward, "logits", lambda self, *where: _raise(error))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        interp.patch(model, EARLY, model.sites("resid_pre"))


def _raise(error: BaseException):
    raise error


def test_prompts_that_are_cells_of_their_own_are_planned(tiny, monkeypatch) -> None:
    model = tiny("llama")
    pairs = [EARLY.span("a", "w2 w3").span("b", "w4"), LATE.span("a", "w2 w3")]
    seen = []
    real = type(model).last_logits
    monkeypatch.setattr(type(model), "last_logits", lambda self, t: seen.append(list(map(len, t))) or real(self, t))
    plan = interp.explain(interp.leave_out, model, pairs)
    assert sorted(map(tuple, seen)) == [(7,), (7, 7)]  # base runs alone: one clean prompt, two corrupt ones
    assert plan.n_cells == 3 and plan.n_answered == 0 and plan.whole == [5, 6, 5]
    text = str(plan)
    assert "3 cells" in text and "3 in 2 forward(s)" in text and "tokens move" in text and plan.flops > 0
    seen.clear()
    interp.leave_out(model, pairs)
    assert sorted(map(tuple, seen)) == [(5, 5), (6,), (7,), (7, 7)]


def test_time_counts_forwards_as_well_as_products(tiny) -> None:
    """A tiny model's forwards take far longer than their FLOPs: Ctrl-C must not lose hundreds of examples."""
    model = tiny("llama")
    pairs = [interp.PromptPair(f"w1 w{i} w3", f"w1 w{i + 1} w3", "w95", "w96") for i in range(8)]
    plan = interp.explain(interp.patch, model, pairs, model.sites("z", positions="each"), engine="naive")
    assert plan.n_forwards == plan.n_cells - plan.n_answered
    assert plan.seconds > plan.n_forwards * model.n_layers * 1e-4
