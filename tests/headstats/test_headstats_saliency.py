"""Saliency p_ij dL/dp_ij against the float64 pattern and autograd, and what must hold of it."""

import math
from dataclasses import replace

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats.blocked import tiles
from headstats.reference import build_pattern, expand_keys
from headstats.validate.call import make_call
from headstats_cases import EDITED, OPTIONS, PREFIX, SEGMENTED, WITH_BIAS, inputs

EVERY = OPTIONS | WITH_BIAS | SEGMENTED | PREFIX | EDITED


@pytest.fixture(params=["one tile", "small tiles"])
def tiling(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(tiles, "CELLS", 64)
        monkeypatch.setattr(tiles, "ROWS", 2)


def double(x):
    if isinstance(x, tuple):
        return tuple(map(double, x))
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


def cells(qkv, options, grad):
    """p * dL/dp of every cell, dL/dp by autograd through the values, gate and replacement."""
    call = make_call(*map(double, qkv), **{name: double(x) for name, x in options.items()}, spec=StatSpec.none())
    p = build_pattern(call)[0].p.detach().requires_grad_()
    out = call.apply_gate(p @ expand_keys(call, call.v, call.prefix_v))
    (d,) = torch.autograd.grad((out * grad.double()).sum(), p)
    real = torch.ones(2, qkv[0].shape[2]).bool() if call.query_padding is None else call.query_padding
    return (p * d).detach() * real[:, None, :, None]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(7, 33), (9, 4)], ids=str)
def test_every_sum(name, shape, tiling):
    m, n = shape
    qkv, options = inputs(m=m, n=n, d=8, dv=5, **EVERY[name])
    r, grad = headstats.attend(*qkv, **options, spec=StatSpec.none()), torch.randn(2, 4, m, 5)
    want = cells(qkv, options, grad)
    n = want.shape[3]
    rows, columns, chosen = torch.randint(-1, 3, (2, m)), torch.randint(-1, 4, (n,)), torch.tensor([2, 3, -1, 0])
    rows[0, 0], columns[0] = 2, 3
    options |= {"queries": chosen, "from_segments": rows, "to_segments": columns}
    got = headstats.saliency(*qkv, r.lse, grad, **options)
    inside = (rows[..., None] == torch.arange(3)).double()[:, None].mT
    to = (columns[..., None] == torch.arange(4)).double()
    for suffix, s in (("", want), ("_abs", want.abs())):
        close(getattr(got, f"query{suffix}"), s.sum(-1))
        close(getattr(got, f"key{suffix}"), s.sum(-2))
        close(getattr(got, f"segments{suffix}"), inside @ s @ to)
    close(got.rows, want[:, :, chosen] * (chosen >= 0)[:, None])
    assert got.head_norm is None


def test_the_norm_over_heads(tiling):
    """It needs all heads in a tile: with grouped heads, several batch rows and a prefix."""
    qkv, options = inputs(m=9, n=12, d=8, dv=5, prefix=5, runs=2, padding="left")
    r, grad = headstats.attend(*qkv, **options), torch.randn(2, 4, 9, 5)
    got = headstats.saliency(*qkv, r.lse, grad, head_norm=True, **options)
    want = cells(qkv, options, grad)
    close(got.head_norm, want.abs().sum(1).square().sum((1, 2)).sqrt())
    close(got.query, want.sum(-1))
    assert got.rows is None and got.segments is None and got.segments_abs is None


def test_signed_row_sum_is_gradient_times_output_of_a_real_backward():
    (q, k, v), _ = inputs(m=20, n=20)
    q.requires_grad_()
    gate = torch.randn(2, 4, 20)
    r = headstats.attend(q, k, v, edit=Edit(gate=gate))
    r.out.retain_grad()
    r.out.square().cumsum(2).sin().sum().backward()
    got = headstats.saliency(q, k, v, r.lse, r.out.grad, edit=Edit(gate=gate))
    close(got.query, (r.out.grad * r.out).sum(-1).double().detach(), 1e-4)
    close(got.key.sum(-1), got.query.sum(-1).double(), 1e-4)
    assert not got.query.requires_grad


def test_finite_differences():
    """d loss / d p by moving single weights; a loss that is not linear in the output."""
    (q, k, v), _ = inputs(b=1, h=2, hk=1, m=4, n=4, d=4, dv=3)
    call = make_call(q.double(), k.double(), v.double(), spec=StatSpec.none())
    p, values = build_pattern(call)[0].p, expand_keys(call, call.v, None)

    def loss(p):
        return (p @ values).sin().prod(-1).sum()

    out = (p @ values).requires_grad_()
    (grad,) = torch.autograd.grad(out.sin().prod(-1).sum(), out)
    got = headstats.saliency(call.q, call.k, call.v, None, grad, queries=torch.arange(4)).rows
    step = 1e-6
    for cell in ((0, 0, 3, 1), (0, 1, 2, 2), (0, 1, 0, 0), (0, 0, 1, 3)):
        d = torch.zeros_like(p)
        d[cell] = step
        slope = (loss(p + d) - loss(p - d)) / (2 * step)
        assert got[cell].item() == pytest.approx((p[cell] * slope).item(), abs=1e-8)
    assert got[0, 0, 1, 3] == 0  # not visible


def test_rows_after_the_position_that_the_loss_reads_are_zero():
    """The released LVLMs-Saliency reads row T-1 under a loss at T-2: by causality that is exactly 0.

    Two layers, so that the loss reaches the first through other tokens as well."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 2, 6, 4), torch.randn(3, 4, 4)
    q, k, v = (x @ one for one in w)
    first = headstats.attend(q.requires_grad_(), k, v)
    first.out.retain_grad()
    second = headstats.attend(*(first.out @ one for one in w))
    second.out[:, :, -2].square().sum().backward()
    rows = torch.arange(6)
    got = headstats.saliency(q, k, v, first.lse, first.out.grad, queries=rows)
    assert (got.rows[:, :, -1] == 0).all() and (got.query_abs[..., -1] == 0).all()
    assert (got.query_abs[..., :-1] > 0).all() and (got.rows[:, :, -2, :-1] != 0).all()


def test_a_replaced_head_has_none():
    (q, k, v), _ = inputs()
    edit = Edit(replacement=torch.randn(4, 16))
    r = headstats.attend(q, k, v, edit=edit)
    got = headstats.saliency(q, k, v, r.lse, torch.randn_like(r.out), edit=edit)
    assert (got.query_abs == 0).all() and (got.key_abs == 0).all()


def test_query_fix_of_atp_star():
    """Sum_j (p'_j - p_j) dL/dp_j, p' from the patched query, is (out' - out) . grad: a second call of attend.

    Saturated softmax: the plain estimate through the query is 0, the fix is exact."""
    k = torch.eye(2)[None, None]
    clean, patched = torch.tensor([[[[20.0, 0.0]]]]), torch.tensor([[[[0.0, 20.0]]]])
    v, grad = torch.tensor([[[[1.0], [5.0]]]]), torch.ones(1, 1, 1, 1)
    out, other = (headstats.attend(x, k, v, scale=1.0).out for x in (clean, patched))
    assert ((other - out) * grad).sum().item() == pytest.approx(4.0, abs=1e-6)
    s = headstats.saliency(clean, k, v, None, grad, scale=1.0, queries=torch.tensor([0]))
    p = headstats.pattern_rows(clean, k, None, torch.tensor([0]), scale=1.0)
    changed = headstats.pattern_rows(patched, k, None, torch.tensor([0]), scale=1.0)
    fix = (s.rows / p * (changed - p)).sum()
    assert fix.item() == pytest.approx(4.0, abs=1e-5) and math.isfinite(fix)


def test_what_is_wrong_is_said():
    (q, k, v), _ = inputs(m=9, n=12, dv=5)
    r = headstats.attend(q, k, v)
    ids = torch.zeros(9).long()
    for message, f in {
        r"grad_out has shape \[2, 4, 9, 4\]: that of out, \[2, 4, 9, 5\]": lambda: headstats.saliency(
            q, k, v, r.lse, r.out[..., 1:]
        ),
        "to_segments is None: pairs of segments need both": lambda: headstats.saliency(
            q, k, v, r.lse, r.out, from_segments=ids
        ),
        "lse is not that of these q, k": lambda: headstats.saliency(q, k, v, r.lse, r.out, window=2),
    }.items():
        with pytest.raises(ValueError, match=message):
            f()
    with pytest.raises(TypeError, match="grad_out is a NoneType: a torch"):
        headstats.saliency(q, k, v, r.lse, None)
    with pytest.raises(TypeError, match="spec: of attend's arguments"):
        headstats.saliency(q, k, v, r.lse, r.out, spec=replace(StatSpec(), sink=2))
