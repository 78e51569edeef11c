"""Gradients of blocked: numerically, and against autograd through the reference."""

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats.blocked import tiles
from headstats_cases import OPTIONS, PREFIX, SEGMENTED, WITH_BIAS, inputs

EVERY = OPTIONS | WITH_BIAS | SEGMENTED | PREFIX


@pytest.fixture(params=["one tile", "small tiles"])
def tiling(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(tiles, "CELLS", 16)
        monkeypatch.setattr(tiles, "ROWS", 2)


def doubles(options):
    def double(x):
        if isinstance(x, tuple):
            return tuple(map(double, x))
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return {name: double(x) for name, x in options.items()}


@pytest.mark.parametrize("name", ["causal", "window, bidirectional", "Gemma 2", "GPT-OSS", "everything"])
def test_gradcheck(name, tiling):
    qkv, options = inputs(b=2, h=2, hk=1, m=3, n=4, d=3, dv=2, **EVERY[name])
    options = doubles(options)
    gate = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    qkv = [x.double().requires_grad_() for x in qkv]

    def f(q, k, v, gate):
        r = headstats.attend(q, k, v, **(options | {"edit": Edit(gate=gate)}), backend="blocked")
        return r.out, r.lse.masked_fill(r.lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(f, (*qkv, gate))


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(15, 15), (7, 33)], ids=str)
def test_same_as_the_reference(name, shape, tiling):
    m, n = shape
    qkv, options = inputs(b=2, h=4, hk=2, m=m, n=n, d=8, dv=5, **EVERY[name])
    qkv, options = [x.double() for x in qkv], doubles(options)
    gate = torch.randn(2, 4, dtype=torch.float64)
    weight = torch.randn(2, 4, m, 5, dtype=torch.float64)
    grads = {}
    for backend in ("reference", "blocked"):
        leaves = [x.clone().requires_grad_() for x in (*qkv, gate)]
        r = headstats.attend(*leaves[:3], **(options | {"edit": Edit(gate=leaves[3])}), backend=backend)
        assert r.backend == backend and not any(
            x.requires_grad for x in r.stats.as_dict().values() if backend == "blocked"
        )
        (r.out * weight).sum().backward()
        grads[backend] = [x.grad for x in leaves]
    torch.testing.assert_close(grads["blocked"], grads["reference"])


@pytest.mark.parametrize("shape", [(), (4,), (2, 1), (2, 4, 1), (1, 1, 15)], ids=str)
def test_gate_gradient_has_the_shape_of_the_gate(shape):
    (q, k, v), _ = inputs()
    gate = torch.zeros(shape, requires_grad=True)  # 0 cannot be divided out again
    bare = headstats.attend(q, k, v).out
    headstats.attend(q, k, v, edit=Edit(gate=gate)).out.sum().backward()
    whole = bare.sum(-1)
    want = whole.sum_to_size(shape) if len(shape) == 3 else whole.sum(-1).sum_to_size(shape)
    torch.testing.assert_close(gate.grad, want)


def test_float32_and_bfloat16_gradients():
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        qkv, _ = inputs(m=33, n=33)
        exact = [x.to(dtype).double().requires_grad_() for x in qkv]
        headstats.attend(*exact, backend="reference").out.sum().backward()
        mine = [x.to(dtype).requires_grad_() for x in qkv]
        headstats.attend(*mine, backend="blocked").out.sum().backward()
        for a, b in zip(mine, exact, strict=True):
            assert a.grad.dtype == dtype
            assert (a.grad.double() - b.grad).norm() <= tolerance * (1 + b.grad.norm())


BIASES = {"of cells": (2, 2, 3, 4), "of heads": (1, 2, 3, 4), "of keys": (2, 1, 1, 4), "of a row": (4,), "one": ()}


@pytest.mark.parametrize("shape", BIASES)
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("name", ["causal", "window, bidirectional", "Gemma 2"])
def test_gradcheck_of_bias_alibi_and_sinks(shape, hot, name, tiling):
    qkv, options = inputs(b=2, h=2, hk=1, m=3, n=4, d=3, dv=2, **EVERY[name])
    bias = torch.randn(BIASES[shape], dtype=torch.float64)
    leaves = [
        *(x.double() for x in qkv),
        bias,
        torch.rand(2).double(),
        torch.randn(2).double(),
        torch.tensor([0.7]).double(),
    ]
    leaves = [x.requires_grad_() for x in leaves]

    def f(q, k, v, bias, alibi, sinks, heat):
        edit = Edit(temperature=heat) if hot else None
        r = headstats.attend(q, k, v, bias=bias, alibi=alibi, sinks=sinks, edit=edit, **options, backend="blocked")
        return r.out, r.lse.masked_fill(r.lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(f, leaves)


def test_hidden_cells_get_no_gradient():
    qkv, options = inputs(m=9, n=9, bias=True, hide=0.5, window=4)
    bias, sinks = options.pop("bias").requires_grad_(), torch.zeros(4, requires_grad=True)
    grads = {}
    for backend in ("blocked", "reference"):
        r = headstats.attend(*qkv, bias=bias, sinks=sinks, **options, backend=backend)
        grads[backend] = torch.autograd.grad(r.out.sin().sum(), (bias, sinks))
    for a, b in zip(*grads.values(), strict=True):
        torch.testing.assert_close(a, b)
    assert (grads["blocked"][0][bias == -torch.inf] == 0).all()


def test_statistics_are_differentiable_on_the_reference():
    qkv, options = inputs(m=9, n=5)  # with rows that see nothing
    qkv = [x.double().requires_grad_() for x in qkv]
    r = headstats.attend(*qkv, **options, spec=StatSpec.all(), backend="reference")
    (r.stats.entropy.sum() + r.stats.distance.sum() + r.stats.received.sum()).backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in qkv) and qkv[0].grad.abs().sum() > 0


def test_nothing_is_kept_without_gradients():
    (q, k, v), _ = inputs()
    r = headstats.attend(q, k, v)
    assert r.out.grad_fn is None
    with torch.no_grad():
        assert headstats.attend(q.requires_grad_(), k, v).out.grad_fn is None


def test_in_inference_mode():
    (q, k, v), _ = inputs()
    want = headstats.attend(q, k, v).out
    with torch.inference_mode():
        torch.testing.assert_close(headstats.attend(q, k, v).out, want)
