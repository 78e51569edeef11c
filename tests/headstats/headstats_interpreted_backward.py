"""Runs the Triton backward on the CPU, in Triton's interpreter: see test_headstats_triton_passes.py."""

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats.backends import BACKENDS
from headstats.blocked import recompute
from headstats.triton import launch_backward
from headstats.validate.call import make_call
from headstats_cases import CHANGED, EDITED, OPTIONS, PREFIX, SEGMENTED, WITH_BIAS, inputs
from headstats_device import attend, shapes

GAINS = {name: x for name, x in CHANGED.items() if "gain" in name or name in ("rows", "phase")}
EVERY = OPTIONS | SEGMENTED | WITH_BIAS | PREFIX | EDITED | GAINS
SHAPES = shapes((18, 35), (18, 18), (20, 9))  # they take turns
UNKNOWN = ("bias", "gain")  # of the call or the edit: PyTorch's backward takes over


def leaves_of(qkv, options):
    """Every floating tensor of the call by name, those of prefix and edit included."""
    edit, prefix = options.get("edit"), options.get("prefix", ())
    found = dict(zip(("q", "k", "v", "prefix_k", "prefix_v"), (*qkv, *prefix), strict=False)) | {
        name: x for name, x in options.items() if isinstance(x, torch.Tensor)
    }
    found |= {f"edit.{name}": x for name, x in ({} if edit is None else vars(edit)).items()}
    return {name: x for name, x in found.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}


def gradients(backend, leaves, options, dtype=torch.float32, trained=None):
    """d loss / d leaf by name, for a loss that reads out and lse."""
    trained = leaves if trained is None else trained
    leaves = {name: x.to(dtype).requires_grad_(name in trained) for name, x in leaves.items()}
    edit = options.get("edit")
    given = {name: leaves.get(name, x) for name, x in options.items()}
    if edit is not None:
        given["edit"] = Edit(**vars(edit) | {n[5:]: x for n, x in leaves.items() if n.startswith("edit.")})
    if "prefix" in options:
        given["prefix"] = leaves["prefix_k"], leaves["prefix_v"]
    r = attend(leaves["q"], leaves["k"], leaves["v"], **given, spec=StatSpec.none(), backend=backend)
    g = torch.Generator().manual_seed(5)
    weight = torch.randn(r.out.shape, generator=g).to(dtype)
    loss = (r.out * weight).sum() + r.lse.masked_fill(r.lse == -torch.inf, 0).sin().sum()
    found = torch.autograd.grad(loss, [leaves[name] for name in trained], allow_unused=True)
    return {name: x for name, x in zip(trained, found, strict=True) if x is not None}


def assert_close(got, want, tolerance=1e-5):
    assert got.keys() == want.keys()
    for name, x in want.items():
        error = (got[name].double() - x).norm() / (1 + x.norm())
        assert got[name].shape == x.shape and error <= tolerance, (name, float(error))


@pytest.mark.parametrize("name", EVERY)
def test_options(name, monkeypatch):
    m, n = SHAPES[list(EVERY).index(name) % len(SHAPES)]
    qkv, options = inputs(b=2, h=2, hk=1, m=m, n=n, d=20, dv=12, **EVERY[name])
    leaves = leaves_of(qkv, options)
    trained = [name for name in leaves if not name.endswith(UNKNOWN)]
    monkeypatch.setattr(recompute, "backward", None)  # must not be needed
    got = gradients("triton", leaves, options, trained=trained)
    monkeypatch.undo()
    assert_close(got, gradients("reference", leaves, options, torch.float64, trained))


@pytest.mark.parametrize("n", [1, 15, 63])
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_sizes(n, causal):
    qkv, options = inputs(b=1, h=2, hk=2, m=n, n=n, causal=causal)
    leaves = leaves_of(qkv, options)
    assert_close(gradients("triton", leaves, options), gradients("reference", leaves, options, torch.float64))


@pytest.mark.parametrize("leaf", ["q", "k", "v", "sinks", "alibi", "edit.temperature"])
def test_each_leaf_alone(leaf):
    qkv, options = inputs(b=2, h=2, hk=1, m=9, n=20, sinks=True, alibi=True, edits=("temperature",))
    leaves = leaves_of(qkv, options)
    got, want = (
        gradients(backend, leaves, options, dtype, [leaf])
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64))
    )
    assert_close(got, want)


@pytest.mark.parametrize("shape", [(), (4,), (2, 1), (2, 4, 1), (1, 1, 9)], ids=str)
def test_temperature_gradient_has_its_shape(shape):
    qkv, _ = inputs(b=2, h=4, hk=2, m=9, n=9)
    options = {"edit": Edit(temperature=torch.rand(shape) + 0.5)}
    leaves = leaves_of(qkv, options)
    assert_close(gradients("triton", leaves, options), gradients("reference", leaves, options, torch.float64))


OTHERS = ("bias", "log gain", "all edits", "logit factor and raise", "redistribution with sinks", "uniform", "identity")


@pytest.mark.parametrize("name", OTHERS)
def test_other_gradients_come_from_pytorch(name, monkeypatch):
    qkv, options = inputs(b=2, h=2, hk=1, m=9, n=15, **(EVERY | CHANGED)[name])
    leaves = leaves_of(qkv, options)
    taken = []
    backward = recompute.backward
    monkeypatch.setattr(recompute, "backward", lambda *a: taken.append(1) or backward(*a))
    got = gradients("triton", leaves, options)
    assert taken
    assert_close(got, gradients("reference", leaves, options, torch.float64))


def test_gradients_of_a_pattern_from_elsewhere():
    qkv, _ = inputs(b=1, h=2, hk=1, m=7, n=9)
    given = [*qkv, *(torch.randn(x.shape, generator=torch.Generator().manual_seed(3)) for x in qkv[:2])]
    leaves = {}
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        q, k, v, *pattern = leaves[backend] = [x.detach().to(dtype).requires_grad_() for x in given]
        edit = Edit(pattern_from=tuple(pattern), pattern_heads=torch.tensor([True, False]))
        attend(q, k, v, edit=edit, backend=backend).out.square().sum().backward()
    for a, b in zip(leaves["triton"], leaves["reference"], strict=True):
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-5)


def test_a_call_with_more_to_it_is_left_to_pytorch(monkeypatch):
    qkv, _ = inputs(b=1, h=1, hk=1, m=3, n=3)
    call = make_call(*qkv, window=2)
    assert launch_backward.unsupported(call, {"q", "k"}) == []
    assert launch_backward.unsupported(call, {"q", "bias", "edit_bias"}) == ["bias", "edit_bias"]
    monkeypatch.setattr(launch_backward, "READ", tuple(name for name in launch_backward.READ if name != "window"))
    assert launch_backward.unsupported(call, {"q"}) == ["window"]


def test_bfloat16_and_strides():
    qkv, options = inputs(b=1, h=2, hk=1, m=20, n=20)
    qkv = [x.transpose(1, 2).contiguous().transpose(1, 2).to(torch.bfloat16) for x in qkv]
    leaves = leaves_of(qkv, options)
    got = gradients("triton", leaves, options, torch.bfloat16)
    assert_close(got, gradients("reference", leaves, options, torch.float64), tolerance=1e-2)


def test_rows_that_see_no_key_give_no_gradient():
    qkv, options = inputs(b=1, h=1, hk=1, m=9, n=4)
    got = gradients("triton", leaves_of(qkv, options), options)
    assert (got["q"][:, :, :5] == 0).all() and all(x.isfinite().all() for x in got.values())


def test_through_the_operator(monkeypatch):
    """As torch.compile runs it."""
    qkv, options = inputs(b=1, h=2, hk=1, m=9, n=12)
    leaves = leaves_of(qkv, options)
    want = gradients("triton", leaves, options)
    monkeypatch.setattr(headstats.api, "is_tracing", lambda x: True)
    got = gradients("triton", leaves, options)
    assert all(torch.equal(got[name], x) for name, x in want.items())
    assert BACKENDS["triton"].backward is not BACKENDS["blocked"].backward
