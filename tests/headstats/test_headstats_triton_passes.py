"""Triton's passes beside the forward one (columns, largest weights, backward): in the interpreter, and compiled."""

import importlib.util
import json

import pytest
from headstats_cases import COUNTERFACTUALS
from test_headstats_triton import SHARED

REFUSED = {"shuffled"}
# Registers of the forward pass with an edit, on sm_90, in bfloat16 at head size 64.
CEILINGS = {
    "gain": 184, "logits": 248, "redistribution": 184, "pattern": 184, "rows": 184, "uniform": 248, "identity": 248,
    "reversed": 248, "random": 248,
}  # fmt: skip
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("job", ["interpreted_columns", "interpreted_largest", "interpreted_backward"])
def test_in_the_interpreter(jobs, job):
    done = jobs[job]
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("job", ["aot_passes"])
def test_compiles_without_spills(jobs, job):
    done = jobs[job]
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {k["pass"] for k in compiled} == {"columns", "largest", "dk, dv", "dq"}
    assert {k["target"] for k in compiled} == {"sm80", "sm90", "gfx942"}
    # What one multiprocessor has: more could not be launched.
    limits = {"sm80": 163, "sm90": 227, "gfx942": 64}
    assert all(k["shared"] <= limits[k["target"]] * 1024 for k in compiled)
    assert [k for k in compiled if not k["full"] and k["target"] != "gfx942" and k["spilled"]] == []


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("job", ["aot_edits"])
def test_every_edit_compiles_without_spills(jobs, job):
    """On every target, with the passes that an edit takes before the main one."""
    done = jobs[job]
    assert done.returncode == 0, done.stderr[-4000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    forward = [k for k in compiled if k["pass"] == "forward"]
    for target in SHARED:
        assert {k["edit"] for k in forward if k["target"] == target} == set(CEILINGS)
    assert set(COUNTERFACTUALS) - set(CEILINGS) == REFUSED
    assert {k["pass"] for k in compiled} == {"forward", "cells", "columns", "largest"}
    assert [k for k in compiled if k["spilled"]] == []
    assert [k for k in compiled if k["shared"] > SHARED[k["target"]]] == []
    at_90 = [(k["edit"], k["registers"]) for k in forward if k["target"] == "sm_90"]
    assert [x for x in at_90 if x[1] > CEILINGS[x[0]]] == []
