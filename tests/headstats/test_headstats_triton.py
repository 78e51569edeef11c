"""The Triton backend: in the interpreter, compiled for GPUs that are not here, and on a GPU where there is one."""

import importlib.util
import json
from dataclasses import replace

import pytest
import torch
from headstats import StatSpec
from headstats.probes import PROBED
from headstats.stats import BY_NAME
from headstats.triton.backend import IN_KERNEL, PER_KEY
from headstats_cases import CELLS, EDITED, OPTIONS, PREFIX, SEGMENTED, WITH_BIAS, assert_same, extras, inputs, oracle
from headstats_device import attend

NAMES = (*IN_KERNEL, *PER_KEY, *PROBED)
MOST = replace(StatSpec.none(), **{name: BY_NAME[name].full for name in NAMES})
CALLS = {**OPTIONS, **WITH_BIAS, **SEGMENTED, **EDITED, **CELLS, **PREFIX}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
compiling = pytest.mark.parametrize("job", ["aot"])
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("job", ["interpreted"])
def test_in_the_interpreter(jobs, job):
    done = jobs[job]
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.fixture(scope="module")
def compiled(jobs):
    done = jobs["aot"]
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


# Bytes of shared memory that one block may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
# Registers of a thread on sm_90 at head size 64, where 128 lets two blocks of 256 threads share a multiprocessor.
CEILINGS = {
    "off": 128, "max_prob": 128, "entropy": 128, "entropy_normalised": 128, "participation": 128, "effective_keys": 128,
    "value_norm": 128, "argmax": 168, "distance": 168, "waad": 168, "local": 168, "distance_var": 192, "default": 184,
    "full": 248,
}  # fmt: skip
CROWDED = ("edits", "edits, not renormalised")  # a prefix, bias, ALiBi and tables at once: some registers spill


@needs_triton
@pytest.mark.slow
@compiling
def test_compiles_for_each_target_without_spills(compiled, job):
    """gfx942 is compiled and linked too: Triton's wheel brings all that takes."""
    assert {k["target"] for k in compiled} == set(SHARED) and len(compiled) > 35
    assert [k for k in compiled if k["spilled"] and k["stats"] not in CROWDED] == []
    assert [k for k in compiled if k["shared"] > SHARED[k["target"]]] == []


@needs_triton
@pytest.mark.slow
@compiling
def test_attention_alone_is_a_plain_kernel(compiled, job):
    """Nothing asked, nothing left: the registers and instructions of headstats_plain.py, to the last one."""
    cost = ("registers", "instructions", "spilled", "shared")
    found = {label: [[k[x] for x in cost] for k in compiled if k["stats"] == label and k["target"] != "gfx942"]
             for label in ("off", "plain")}  # fmt: skip
    assert len(found["off"]) == 4 and found["off"] == found["plain"]


@needs_triton
@pytest.mark.slow
@compiling
def test_registers_stay_below_their_ceilings(compiled, job):
    at_90 = {k["stats"]: k for k in compiled if (k["target"], k["d"], k["dtype"]) == ("sm_90", 64, "bf16")}
    assert {name: at_90[name]["registers"] for name, most in CEILINGS.items() if at_90[name]["registers"] > most} == {}
    for name in IN_KERNEL:
        assert at_90[name]["stores"] == 4, name  # out, the two parts of norm, and the statistic


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", CALLS)
def test_head_sizes_on_the_gpu(name):
    """Beside test_headstats_gpu.py, which takes one head size through everything."""
    edits = set(CALLS[name].get("edits", ()))
    refused = "pattern_from" in edits and edits & {"rows", "phase"}  # of heads of more than 128
    for m, n, d in [(257, 257, 64), (63, 300, 64), (1, 111, 128), (9, 4, 80), (111, 111, 80), (63, 1100, 256)]:
        if d > 128 and refused:
            continue
        qkv, options = inputs(b=2, h=4, hk=2, m=m, n=n, d=d, dv=d, **CALLS[name])
        options = extras(m, n + CALLS[name].get("prefix", 0), shared="prefix" in options) | options
        got = attend(*qkv, **options, spec=MOST, backend="auto")
        assert got.backend == "triton"
        assert_same(got, oracle(qkv, **options, spec=MOST), tolerance=5e-5, distance=5e-3)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_the_gpu(dtype):
    """The error is at most twice that of PyTorch's own attention in the same dtype."""
    for d in (64, 80, 128, 256):
        qkv, options = inputs(b=2, h=4, hk=2, m=257, n=257, d=d, dv=d)
        qkv = tuple(x.to(dtype) for x in qkv)
        spec = replace(MOST, **dict.fromkeys(("targets", *PER_KEY), False))
        want = oracle(qkv, **options, spec=spec)
        got = attend(*qkv, **options, spec=spec)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        plain = sdpa(*(x.cuda() for x in qkv), is_causal=True, enable_gqa=True)
        assert (got.out.double() - want.out).norm() <= 2 * (plain.cpu().double() - want.out).norm()
        got.out, got.stats.argmax = want.out, want.stats.argmax
        assert_same(got, want, tolerance=1e-4, distance=1e-2)
