"""Runs the Triton pass over columns on the CPU, in Triton's interpreter: see test_headstats_triton_passes.py."""

from dataclasses import replace

import pytest
import torch
from headstats import StatSpec
from headstats.triton import backend as launch
from headstats_cases import CELLS, EDITED, OPTIONS, PREFIX, SEGMENTED, WITH_BIAS, assert_same, inputs, oracle
from headstats_device import attend, shapes

EVERY = OPTIONS | SEGMENTED | WITH_BIAS | PREFIX | EDITED | CELLS
SHAPES = shapes((18, 35), (18, 18), (20, 9))  # they take turns
COLUMNS = replace(StatSpec.none(), received=True, received_max=True, column_norm=True, fai=(2, 9))


@pytest.mark.parametrize("name", EVERY)
def test_options(name):
    m, n = SHAPES[list(EVERY).index(name) % len(SHAPES)]
    qkv, options = inputs(b=2, h=2, hk=1, m=m, n=n, d=20, dv=12, **EVERY[name])
    got = attend(*qkv, **options, spec=COLUMNS)
    assert_same(got, oracle(qkv, **options, spec=COLUMNS))


@pytest.mark.parametrize("n", [1, 63])
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_sizes(n, causal):
    qkv, options = inputs(b=1, h=2, hk=2, m=n, n=n, d=16, dv=16, causal=causal)
    got = attend(*qkv, **options, spec=COLUMNS)
    assert_same(got, oracle(qkv, **options, spec=COLUMNS))


@pytest.mark.parametrize("name", launch.COLUMNS)
def test_each_statistic_alone(name):
    spec = replace(StatSpec.none(), **{name: getattr(COLUMNS, name)})
    qkv, options = inputs(b=1, h=1, hk=1, m=17, n=33, d=16, dv=16)
    got = attend(*qkv, **options, spec=spec)
    assert list(got.stats.as_dict()) == [name]
    assert_same(got, oracle(qkv, **options, spec=spec))


def test_padded_queries_do_not_count():
    qkv, _ = inputs(b=2, h=2, hk=1, m=20, n=33)
    real = torch.rand(2, 20) < 0.5
    got, want = (
        f(qkv, query_padding=real, causal=False, spec=COLUMNS) for f in (lambda x, **o: attend(*x, **o), oracle)
    )
    assert_same(got, want)


def test_large_logits_and_bfloat16():
    qkv, _ = inputs(b=1, h=2, hk=1, m=35, n=35)
    q, k, v = (x.to(torch.bfloat16) for x in (qkv[0] * 20, qkv[1], qkv[2]))  # logits of about +-80
    got, want = attend(q, k, v, spec=COLUMNS), oracle((q, k, v), spec=COLUMNS)
    got.out = want.out
    assert_same(got, want, tolerance=1e-4)
