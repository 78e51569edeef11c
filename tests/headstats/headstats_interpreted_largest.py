"""Runs the Triton pass for the largest weights on the CPU, in Triton's interpreter: see
test_headstats_triton_passes.py."""

from dataclasses import replace

import pytest
import torch
from headstats import StatSpec
from headstats_cases import CELLS, EDITED, OPTIONS, PREFIX, SEGMENTED, WITH_BIAS, assert_same, inputs, oracle
from headstats_device import attend, shapes

EVERY = OPTIONS | SEGMENTED | WITH_BIAS | PREFIX | EDITED | CELLS
SHAPES = shapes((18, 35), (18, 18), (20, 9))  # they take turns


def spec(k):
    return replace(StatSpec.none(), topk=k)


@pytest.mark.parametrize("name", EVERY)
def test_options(name):
    m, n = SHAPES[list(EVERY).index(name) % len(SHAPES)]
    qkv, options = inputs(b=2, h=2, hk=1, m=m, n=n, d=20, dv=12, **EVERY[name])
    got = attend(*qkv, **options, spec=spec(5))
    assert_same(got, oracle(qkv, **options, spec=spec(5)))


@pytest.mark.parametrize("k", [1, 2, 16, 17, 40, 64])
def test_how_many(k):
    qkv, _ = inputs(b=1, h=1, hk=1, m=3, n=50)
    got = attend(*qkv, spec=spec(k))
    assert_same(got, oracle(qkv, spec=spec(k)))


@pytest.mark.parametrize("name", ["prefix, everything", "identity"])
def test_more_than_one_pass_holds(name):
    qkv, options = inputs(b=2, h=2, hk=1, m=9, n=90, **EVERY[name])
    assert_same(attend(*qkv, **options, spec=spec(85)), oracle(qkv, **options, spec=spec(85)))


def test_ties_go_left_from_pass_to_pass():
    q, k = torch.zeros(1, 1, 3, 4), torch.randn(1, 1, 150, 4)
    got = attend(q, k, k, causal=False, spec=spec(150)).stats.topk
    assert (got.indices == torch.arange(150)).all()


@pytest.mark.parametrize("causal", [True, False])
def test_ties_go_left_within_and_across_tiles(causal):
    """Small integers: equal keys give equal logits to the last bit."""
    g = torch.Generator().manual_seed(3)
    k = torch.randint(-1, 2, (1, 1, 50, 4), generator=g).float()
    q = torch.randint(-1, 2, (1, 1, 20, 4), generator=g).float()
    got = attend(q, k, k, causal=causal, spec=spec(9)).stats.topk
    want = oracle((q, k, k), causal=causal, spec=spec(9)).stats.topk
    assert (got.indices == want.indices).all()
    assert (want.values[..., 1:] == want.values[..., :-1]).any()


def test_argmax_is_the_first():
    qkv, _ = inputs(b=1, h=2, hk=1, m=20, n=33)
    stats = attend(*qkv, spec=StatSpec(topk=3, sink=0)).stats
    assert (stats.topk.indices[..., 0] == stats.argmax).all()
