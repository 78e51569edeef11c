"""The benchmark measures what it says: peers that compute the same, paths that exist, targets judged by the rule."""

import json
import os
import subprocess
import sys

import headstats
import pytest
import torch
from headstats.bench import cases as bench_cases
from headstats.bench import peers
from headstats.bench import run as bench
from headstats.bench.cases import KernelCase, SpeedTarget
from headstats_cases import inputs, oracle
from torch.nn.functional import scaled_dot_product_attention


@pytest.mark.parametrize("eager", [peers.eager, peers.eager_lean])
@pytest.mark.parametrize("n", [1, 15, 70])
def test_eager_computes_the_same_statistics(n, eager):
    qkv, _ = inputs(b=2, h=6, hk=2, m=n, n=n)
    want, found = oracle(qkv), eager(*qkv)
    assert set(found) == {"out", *want.stats.as_dict()}
    for name, x in found.items():
        one = want.out if name == "out" else getattr(want.stats, name)
        torch.testing.assert_close(x.double(), one.double(), atol=1e-4, rtol=1e-5, msg=name)
    torch.testing.assert_close(peers.sdpa(*qkv).double(), want.out, atol=1e-5, rtol=0)


def test_paths_of_the_prefix_case_compute_the_same():
    case = bench_cases.prefix_case(3, 5, 70)
    made = case.inputs()
    ours = bench_cases.ready(case, "auto:default", made)()
    written = bench_cases.ready(case, "sdpa, keys written out", made)()
    torch.testing.assert_close(ours.out, written, atol=1e-5, rtol=0)
    q, k, v, k0, v0 = made
    k, v = (torch.cat([x.expand(3, -1, -1, -1), own], 2) for x, own in ((k0, k), (v0, v)))
    mask = torch.ones(5, 75, dtype=torch.bool).tril(70)
    torch.testing.assert_close(written, scaled_dot_product_attention(q, k, v, mask, enable_gqa=True))
    assert bench_cases.ready(case, "sdpa, whole", made)().shape == (3, 9, 75, 64)


def test_every_path_of_every_case_is_known():
    cases = [*bench.cases(("causal", "prefix", "costs")), *bench_cases.gpu_cases((4096, 8192))]
    assert len({c.name for c in cases}) == len(cases)
    for case in cases:
        for path in case.paths:
            backend, _, what = path.partition(":")
            if what:
                assert isinstance(bench_cases.spec_of(what), headstats.StatSpec)
            else:
                assert backend in ("sdpa", "eager", "eager, lean", "flex", "sdpa, whole", "sdpa, keys written out")
        for target in case.targets:
            assert {target.path, target.per or target.path, target.minus or target.path} <= set(case.paths)


def test_the_cost_of_every_statistic_is_measured():
    case = bench_cases.costs_case("blocked", 20)
    made = case.inputs()
    for s in headstats.STATISTICS:
        found = bench_cases.ready(case, f"blocked:only {s.name}", made)()
        assert list(found.stats.as_dict()) == [s.name]


def test_a_case_is_measured_and_judged():
    targets = (
        SpeedTarget("blocked:default", "sdpa", most=1e9),
        SpeedTarget("blocked:default", "sdpa", least=1e9),
        SpeedTarget("eager", "sdpa", most=1e9, of="mib"),
        SpeedTarget("blocked:default", "sdpa", most=-1.0, minus="blocked:default"),
        SpeedTarget("triton:off", "sdpa", most=1.0),
    )
    paths = ("sdpa", "blocked:default", "eager", "triton:off", "blocked:only topk")
    found = bench.measure(KernelCase("tiny", paths, 200, targets=targets), quick=True, threads=1)
    assert [t["met"] for t in found["targets"]] == [True, False, None, False, None]
    assert len(found["paths"]["sdpa"]["seconds"]) == bench.ROUNDS[0] and found["paths"]["sdpa"]["median_s"] > 0
    assert "NotImplementedError: backend='triton' cannot" in found["paths"]["triton:off"]["not_run"]
    text = bench.table(found)
    assert "not run: NotImplementedError" in text and "1e+09: " in text and "NOT MET" in text and "not measured" in text


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_peak_memory_sees_the_pattern():
    """Eager holds at least logits and weights of 9 x 600 x 600; blocked far less."""
    case = KernelCase("tiny", ("eager", "blocked:default"), 600, memory=True)
    found = {path: bench._memory_elsewhere(case, path, 1)["mib"] for path in case.paths}
    pattern = 9 * 600 * 600 * 4 / 2**20
    assert found["eager"] > 1.9 * pattern and found["blocked:default"] < pattern


def test_memory_that_cannot_be_measured_says_why():
    found = bench._memory_elsewhere(KernelCase("tiny", ("triton:off",), 20), "triton:off", 1)
    assert found["mib"] is None and "NotImplementedError" in found["mib_not_measured"]


def test_eager_without_room_is_not_tried():
    with pytest.raises(MemoryError, match="GiB"):
        bench_cases._check_memory_for_eager(torch.empty(1, 1, 1, 1).expand(1, 64, 2**20, 1))


def test_unknown_cases():
    with pytest.raises(ValueError, match="no such cases: dense; there are causal, prefix, costs, gpu"):
        bench.cases(["dense"])


def test_runs_as_a_program(tmp_path):
    path = tmp_path / "r.json"
    command = ["-m", "headstats.bench", "--quick", "--threads", "1", "--cases", "prefix", "gpu", "--json", str(path)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert {"command", "cpu", "threads", "torch", "triton", "cases"} <= set(result) and result["threads"] == 1
    assert "--cases prefix gpu" in result["command"] and "shared prefix" in done.stdout
    if not torch.cuda.is_available():
        assert "cases for a GPU are not run" in done.stdout and len(result["cases"]) == 1
