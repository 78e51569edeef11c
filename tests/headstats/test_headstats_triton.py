"""The Triton backend: in the interpreter, compiled for GPUs that are not here, and on a GPU where there is one."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from dataclasses import replace

import headstats
import pytest
import torch
from headstats import StatSpec
from headstats_cases import OPTIONS, assert_same, inputs, oracle

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
MOST = replace(
    StatSpec.none(), entropy=True, max_prob=True, argmax=True, distance=True, participation=True, sink=4, diagonal=True,
    previous=True, targets=None,
)  # fmt: skip
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def process(arguments, **environment):
    """Runs Python in a fresh process that finds headstats and the helpers beside this file."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(HERE), env.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], env=env | environment, cwd=ROOT, capture_output=True, text=True)


@needs_triton
@pytest.mark.slow
def test_in_the_interpreter():
    done = process(
        ["-m", "pytest", "-p", "no:cacheprovider", str(HERE / "headstats_interpreted.py")], TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    done = process([str(HERE / "headstats_aot.py"), "80,90"], TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@needs_triton
@pytest.mark.slow
def test_compiles_for_sm80_and_sm90_without_spills(compiled):
    assert {k["sm"] for k in compiled} == {80, 90} and len(compiled) > 15
    assert [k for k in compiled if k["spilled"]] == []
    # What one multiprocessor has: more could not be launched.
    assert all(k["registers"] <= 255 and k["shared"] <= (163 if k["sm"] == 80 else 227) * 1024 for k in compiled)


@needs_triton
@pytest.mark.slow
def test_statistics_that_are_off_leave_no_code(compiled):
    """Attention alone stores out and lse, and reduces each tile twice (maximum, sum) in each of two loops."""
    at_90 = {k["stats"]: k for k in compiled if k["sm"] == 90 and k["d"] == 64 and k["dtype"] == "bf16"}
    off = at_90["off"]
    assert off["tt.store"] == 2 and off['tt.reduce"'] == 4 and off["math.exp2"] == 4
    # 65536 registers hold two blocks of 256 threads at 128; a new statistic must not change this number at all.
    assert off["registers"] <= 128
    for name in ("entropy", "max_prob", "argmax", "distance", "participation"):
        assert at_90[name]["tt.store"] == 3, name
    assert at_90["entropy"]["registers"] <= 128


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_on_the_gpu(name):
    for m, n, d in [(257, 257, 64), (63, 300, 64), (1, 111, 128), (9, 4, 80), (111, 111, 80), (63, 63, 256)]:
        qkv, options = inputs(b=2, h=4, hk=2, m=m, n=n, d=d, dv=d, **OPTIONS[name])
        want = oracle(qkv, **options, spec=MOST)
        assert_same(on_gpu(qkv, options, backend="triton"), want)
        assert on_gpu(qkv, options).backend == "triton"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_the_gpu(dtype):
    """The error is at most twice that of PyTorch's own attention in the same dtype."""
    for d in (64, 80, 128, 256):
        qkv, options = inputs(b=2, h=4, hk=2, m=257, n=257, d=d, dv=d)
        qkv = tuple(x.to(dtype) for x in qkv)
        want = oracle(qkv, **options, spec=MOST)
        got = on_gpu(qkv, options, backend="triton")
        sdpa = torch.nn.functional.scaled_dot_product_attention
        plain = sdpa(*(x.cuda() for x in qkv), is_causal=True, enable_gqa=True)
        assert (got.out.double() - want.out).norm() <= 2 * (plain.cpu().double() - want.out).norm()
        got.out, got.stats.argmax = want.out, want.stats.argmax
        assert_same(got, want, tolerance=1e-4, distance=1e-2)


def on_gpu(qkv, options, **more):
    """The call on CUDA, with its result brought back."""
    options = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    if edit := options.get("edit"):
        options["edit"] = headstats.Edit(gate=edit.gate.cuda())
    r = headstats.attend(*(x.cuda() for x in qkv), **options, spec=MOST, **more)
    stats = headstats.AttentionStats(**{name: x.cpu() for name, x in r.stats.as_dict().items()})
    return headstats.Attended(r.out.cpu(), r.lse.cpu(), stats, r.backend)
