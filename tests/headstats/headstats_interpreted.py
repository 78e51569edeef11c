"""Runs the Triton kernel on the CPU, in Triton's interpreter. test_headstats_triton.py starts it as a process of
its own, because TRITON_INTERPRET=1 changes what @triton.jit means for the whole process."""

from dataclasses import replace

import headstats
import pytest
import torch
from headstats import StatSpec, launch
from headstats_cases import OPTIONS, assert_same, extras, inputs, oracle

MOST = replace(
    StatSpec.none(), entropy=True, max_prob=True, argmax=True, distance=True, participation=True, sink=4, diagonal=True,
    previous=True, targets=None,
)  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(35, 35), (5, 21), (9, 4)], ids=str)
def test_options(name, shape):
    m, n = shape
    qkv, options = inputs(b=2, h=2, hk=1, m=m, n=n, d=20, dv=12, **OPTIONS[name])
    options["targets"] = extras(m, n)["targets"]
    got = headstats.attend(*qkv, **options, spec=MOST, backend="triton")
    assert got.backend == "triton"
    assert_same(got, oracle(qkv, **options, spec=MOST))


@pytest.mark.parametrize("n", [1, 15, 63, 111])
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_sizes(n, causal):
    qkv, options = inputs(b=1, h=2, hk=2, m=n, n=n, d=16, dv=16, causal=causal)
    got = headstats.attend(*qkv, **options, backend="triton")
    assert_same(got, oracle(qkv, **options))


@pytest.mark.parametrize("name", launch.IN_KERNEL)
def test_each_statistic_alone(name):
    spec = replace(StatSpec.none(), **{name: True})
    qkv, options = inputs(b=1, h=1, hk=1, m=17, n=33, d=16, dv=16)
    got = headstats.attend(*qkv, **options, spec=spec, backend="triton")
    assert list(got.stats.as_dict()) == [name]
    assert_same(got, oracle(qkv, **options, spec=spec))


def test_ties_go_left_within_and_across_tiles():
    """Small integers: equal keys give equal logits to the last bit."""
    k = torch.randint(-2, 3, (1, 1, 40, 4)).float()
    k[:, :, 20:] = k[:, :, :20]
    q = torch.randint(-2, 3, (1, 1, 20, 4)).float()
    got = headstats.attend(q, k, k, causal=False, backend="triton").stats.argmax
    want = oracle((q, k, k), causal=False).stats.argmax
    assert (want < 20).all() and (got == want).all()


def test_bfloat16_and_strides():
    qkv, options = inputs(b=1, h=2, hk=1, m=20, n=20)
    qkv = tuple(x.transpose(1, 2).contiguous().transpose(1, 2).to(torch.bfloat16) for x in qkv)
    got = headstats.attend(*qkv, **options, backend="triton")
    want = oracle(qkv, **options)
    torch.testing.assert_close(got.out.double(), want.out, atol=1e-5, rtol=torch.finfo(torch.bfloat16).eps)
    got.out = want.out
    assert_same(got, want)


def test_gradients_by_recomputation():
    qkv, _ = inputs(b=1, h=2, hk=1, m=7, n=9)
    leaves = {name: [x.clone().requires_grad_() for x in qkv] for name in ("triton", "reference")}
    for x in leaves.values():
        x.append(torch.ones(2, requires_grad=True))
    for backend, (q, k, v, sinks) in leaves.items():
        headstats.attend(q, k, v, sinks=sinks, backend=backend).out.square().sum().backward()
    for a, b in zip(*leaves.values(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": StatSpec.all()}, "does not compute .*received"),
        ({"bias": torch.zeros(9)}, "takes no bias"),
        ({"edit": headstats.Edit(temperature=torch.ones(2))}, "takes no Edit.temperature"),
        ({"edit": headstats.Edit(replacement=torch.ones(16))}, "takes no Edit.replacement"),
        ({"alibi": torch.zeros(2)}, "takes no alibi"),
        ({"prefix": (torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3, 16))}, "takes no prefix"),
        (
            {
                "q_segments": torch.zeros(7).long(),
                "k_segments": torch.zeros(9).long(),
                "segment_mask": torch.ones(1, 1).bool(),
            },
            "takes no segment_mask",
        ),
    ],
    ids=str,
)
def test_what_it_cannot_do(change, message):
    qkv, _ = inputs(b=1, h=2, hk=1, m=7, n=9)
    with pytest.raises(
        NotImplementedError, match=f"backend='triton' cannot do this call: it .*{message.split(' ', 1)[1]}"
    ):
        headstats.attend(*qkv, **change, backend="triton")
    with pytest.raises(NotImplementedError, match="inputs are float64"):
        headstats.attend(*(x.double() for x in qkv), backend="triton")
    assert headstats.attend(*qkv, **change).backend in ("blocked", "reference")
