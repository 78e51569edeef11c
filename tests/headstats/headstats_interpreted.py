"""Runs the Triton kernel on the CPU, in Triton's interpreter. test_headstats_triton.py starts it as a process of
its own, because TRITON_INTERPRET=1 changes what @triton.jit means for the whole process. Where there is a GPU,
test_headstats_gpu.py runs the same there."""

from dataclasses import replace

import pytest
import torch
from headstats import Edit, StatSpec, probes
from headstats.stats import BY_NAME
from headstats.triton import backend as launch
from headstats_cases import CELLS, EDITED, OPTIONS, PREFIX, SEGMENTED, WITH_BIAS, assert_same, extras, inputs, oracle
from headstats_device import attend, shapes

NAMES = (*launch.IN_KERNEL, *launch.PER_KEY, *probes.PROBED)
MOST = replace(StatSpec.none(), **{name: BY_NAME[name].full for name in NAMES})
CALLS = {**OPTIONS, **WITH_BIAS, **SEGMENTED, **EDITED, **CELLS, **PREFIX}
SHAPES = shapes((35, 35), (5, 21), (9, 4), (18, 40))


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    """Every option and edit with every statistic; shapes take turns."""
    m, n = SHAPES[list(CALLS).index(name) % len(SHAPES)]
    qkv, options = inputs(b=2, h=2, hk=1, m=m, n=n, d=20, dv=12, **CALLS[name])
    total = n + CALLS[name].get("prefix", 0)
    options = extras(m, total, shared="prefix" in options) | options
    got = attend(*qkv, **options, spec=MOST)
    assert got.backend == "triton"
    assert_same(got, oracle(qkv, **options, spec=MOST))


@pytest.mark.parametrize("n", [1, 15, 63, 111])
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_sizes(n, causal):
    qkv, options = inputs(b=1, h=2, hk=2, m=n, n=n, d=16, dv=16, causal=causal)
    got = attend(*qkv, **options)
    assert_same(got, oracle(qkv, **options))


@pytest.mark.parametrize("name", launch.IN_KERNEL)
def test_each_statistic_alone(name):
    spec = replace(StatSpec.none(), **{name: BY_NAME[name].full})
    qkv, options = inputs(b=1, h=1, hk=1, m=17, n=33, d=16, dv=16)
    got = attend(*qkv, **options, spec=spec)
    assert list(got.stats.as_dict()) == [name]
    assert_same(got, oracle(qkv, **options, spec=spec))


@pytest.mark.parametrize("runs", [1, 2, 4])
def test_what_keys_of_a_shared_prefix_carry_may_differ_between_batch_rows(runs):
    qkv, options = inputs(b=4, h=2, hk=1, m=5, n=19, d=16, dv=16, prefix=6, runs=runs)
    options = extras(5, 25, b=4) | options
    assert_same(attend(*qkv, **options, spec=MOST), oracle(qkv, **options, spec=MOST))


def test_more_features_than_ride_along():
    qkv, options = inputs(b=2, h=2, hk=1, m=5, n=19, d=16, dv=16, prefix=4)
    options |= {"key_features": torch.randn(23, 290), "k_segments": torch.arange(23) % 3}
    spec = replace(StatSpec.none(), key_features=True, segments=True)
    got = attend(*qkv, **options, spec=spec)
    assert_same(got, oracle(qkv, **options, spec=spec))


def test_ties_go_left_within_and_across_tiles():
    """Small integers: equal keys give equal logits to the last bit."""
    k = torch.randint(-2, 3, (1, 1, 40, 4)).float()
    k[:, :, 20:] = k[:, :, :20]
    q = torch.randint(-2, 3, (1, 1, 20, 4)).float()
    got = attend(q, k, k, causal=False).stats.argmax
    want = oracle((q, k, k), causal=False).stats.argmax
    assert (want < 20).all() and (got == want).all()


def test_bfloat16_and_strides():
    qkv, options = inputs(b=1, h=2, hk=1, m=20, n=20)
    qkv = tuple(x.transpose(1, 2).contiguous().transpose(1, 2).to(torch.bfloat16) for x in qkv)
    got = attend(*qkv, **options)
    want = oracle(qkv, **options)
    error = (got.out.double() - want.out).norm() / want.out.norm()
    assert error <= torch.finfo(torch.bfloat16).eps  # tensor cores take weights in bfloat16 too
    got.out = want.out
    assert_same(got, want)


def test_gradients_by_recomputation():
    qkv, _ = inputs(b=1, h=2, hk=1, m=7, n=9)
    leaves = {name: [x.clone().requires_grad_() for x in qkv] for name in ("triton", "reference")}
    for x in leaves.values():
        x.append(torch.ones(2, requires_grad=True))
    for backend, (q, k, v, sinks) in leaves.items():
        attend(q, k, v, sinks=sinks, backend=backend).out.square().sum().backward()
    for a, b in zip(*leaves.values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"edit": Edit(counterfactual="shuffled")},
            "counterfactual='shuffled' needs whole rows, which backends 'blocked' and 'reference' hold",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_do(change, message):
    qkv, _ = inputs(b=2, h=2, hk=1, m=7, n=9)
    with pytest.raises(NotImplementedError, match=f"backend='triton' cannot do this call: .*{message}"):
        attend(*qkv, **change)
    with pytest.raises(NotImplementedError, match="inputs are float64"):
        attend(*(x.double() for x in qkv))
    assert attend(*qkv, **change, backend="auto").backend in ("compiled", "blocked", "reference")


@pytest.mark.parametrize("edits", [("pattern_from",), ("pattern_from", "pattern_heads")], ids=["all", "some"])
def test_patterns_of_heads_too_large_for_twice_their_channels(edits):
    qkv, options = inputs(b=2, h=4, hk=2, m=3, n=5, d=144, prefix=4, edits=edits)
    assert_same(attend(*qkv, **options, spec=StatSpec.all()), oracle(qkv, **options, spec=StatSpec.all()))


def test_patterns_of_some_rows_need_twice_the_channels():
    qkv, options = inputs(b=1, h=2, hk=1, m=3, n=5, d=144, edits=("pattern_from", "rows"))
    with pytest.raises(NotImplementedError, match=r"pattern_from in some rows, head sizes up to 128 fit, given D=144"):
        attend(*qkv, **options)
    assert attend(*qkv, **options, backend="auto").backend in ("compiled", "blocked")


@pytest.mark.parametrize("keep", [0.0, 0.5, 1.0])
def test_redistribution_to_keys_of_hardly_any_weight(keep):
    """Log-sum-exps tell apart what is small beside the row: here about e^-120 of it."""
    qkv, _ = inputs(b=1, h=1, hk=1, m=20, n=35)
    ids = torch.arange(35) % 3
    bias = torch.where(ids == 2, -120.0, 0.0).expand(1, 1, 20, 35)
    take, give = (torch.arange(3).expand(3, 3) == s for s in (0, 2))
    options = {"bias": bias, "k_segments": ids, "q_segments": torch.zeros(20).long()}
    options["edit"] = Edit(take=take, give=give, keep_fraction=keep)
    got, want = attend(*qkv, **options), oracle(qkv, **options)
    assert_same(got, want, tolerance=1e-4, distance=1e-3)  # logits of 120 in float32
