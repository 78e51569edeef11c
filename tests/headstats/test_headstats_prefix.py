"""A prefix that batch rows share: the same as writing it before each row's keys, without doing so."""

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats.blocked import sdpa as cpu_flash
from headstats.blocked import tiles
from headstats_cases import inputs
from torch.utils._python_dispatch import TorchDispatchMode


def written_out(k, v, prefix):
    """Keys and values with the prefix before those of each batch row."""
    return tuple(
        torch.cat([p.repeat_interleave(len(x) // len(p), 0), x], 2) for x, p in zip((k, v), prefix, strict=True)
    )


@pytest.fixture(params=["reference", "blocked", "blocked in small tiles", "compiled"])
def attend(request, monkeypatch):
    if "small" in request.param:
        monkeypatch.setattr(tiles, "CELLS", 64)
        monkeypatch.setattr(tiles, "ROWS", 2)
    if request.param == "compiled":
        return request.getfixturevalue("attend_compiled")
    return lambda q, k, v, **o: headstats.attend(q, k, v, backend=request.param.split()[0], **o)


@pytest.mark.parametrize("runs", [1, 2, 3, 6])
@pytest.mark.parametrize("m", [1, 4, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_same_as_written_out(attend, runs, m, causal):
    (q, k, v), options = inputs(b=6, m=m, n=4, prefix=11, runs=runs, causal=causal)
    whole = headstats.attend(q, *written_out(k, v, options["prefix"]), causal=causal, spec=StatSpec.all())
    r = attend(q, k, v, spec=StatSpec.all(), **options)
    torch.testing.assert_close(r.out, whole.out)
    torch.testing.assert_close(r.lse, whole.lse)
    for name, value in whole.stats.as_dict().items():
        torch.testing.assert_close(getattr(r.stats, name), value, msg=lambda m, n=name: f"{n}: {m}")
    assert r.stats.received.shape == (6, 4, 15)


@pytest.mark.parametrize("runs", [1, 3])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_flash_over_both_regions_and_their_merge(runs, m, causal, monkeypatch):
    """Attention alone: PyTorch's flash attention over prefix and suffix, joined by log-sum-exp."""
    if not cpu_flash._works(torch.float32):
        pytest.skip("this torch has no CPU flash operator that reproduces the formula")
    used = []
    monkeypatch.setattr(cpu_flash, "forward", lambda call, f=cpu_flash.forward: used.append(1) or f(call))
    (q, k, v), options = inputs(b=6, m=m, n=4, prefix=90, runs=runs, causal=causal, gate=True)
    r = headstats.attend(q, k, v, spec=StatSpec.none(), **options, backend="blocked")
    whole = headstats.attend(
        q, *written_out(k, v, options["prefix"]), causal=causal, edit=options["edit"], backend="reference"
    )
    torch.testing.assert_close(r.out, whole.out)
    torch.testing.assert_close(r.lse, whole.lse)
    assert used


def test_keys_of_the_prefix_have_the_first_positions(attend):
    """Zero queries: two prefix keys and the suffix up to the query weigh the same."""
    q, k, v = torch.zeros(1, 1, 3, 2), torch.randn(1, 1, 3, 2), torch.randn(1, 1, 3, 2)
    prefix = (torch.randn(1, 1, 2, 2), torch.randn(1, 1, 2, 2))
    s = attend(q, k, v, prefix=prefix, spec=StatSpec(sink=1, diagonal=True), k_segments=torch.tensor([0, 0, 1, 1, 1]),
               targets=torch.tensor([[1, 4]] * 3)).stats  # fmt: skip
    weight = 1 / torch.arange(3.0, 6)
    torch.testing.assert_close(s.sink[0, 0], weight)
    torch.testing.assert_close(s.diagonal[0, 0], weight)
    torch.testing.assert_close(s.segments[0, 0], torch.stack([2 * weight, 1 - 2 * weight], -1))
    torch.testing.assert_close(s.targets[0, 0], torch.stack([weight, weight * torch.tensor([0, 0, 1])], -1))
    torch.testing.assert_close(s.distance[0, 0], torch.arange(2.0, 5) / 2)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, torch.Tensor):
                self.size = max(self.size, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("spec", [StatSpec.none(), StatSpec()], ids=["alone", "statistics"])
def test_the_prefix_is_not_repeated(spec, monkeypatch):
    monkeypatch.setattr(tiles, "CELLS", 1 << 13)
    (q, k, v), options = inputs(b=64, h=2, hk=1, m=4, n=4, d=16, dv=16, prefix=512)
    with Largest() as seen:
        headstats.attend(q, k, v, **options, spec=spec, backend="blocked")
    assert seen.size < 64 * 512 * 16 * 4 / 8  # a key for each of 64 rows would be 8 times this


@pytest.mark.parametrize("name", ["none", "all"])
@pytest.mark.parametrize("runs", [1, 2])
def test_gradients_reach_the_prefix(name, runs, monkeypatch):
    monkeypatch.setattr(tiles, "CELLS", 32)
    monkeypatch.setattr(tiles, "ROWS", 2)
    qkv, options = inputs(b=2, h=2, hk=1, m=3, n=3, d=3, dv=2, prefix=4, runs=runs, softcap=2.0)
    leaves = [x.double().requires_grad_() for x in (*qkv, *options["prefix"])]
    gate = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def f(q, k, v, k0, v0, gate):
        r = headstats.attend(q, k, v, prefix=(k0, v0), softcap=2.0, edit=Edit(gate=gate),
                             spec=getattr(StatSpec, name)(), backend="blocked")  # fmt: skip
        return r.out, r.lse

    assert torch.autograd.gradcheck(f, (*leaves, gate))
    torch.autograd.grad(f(*leaves, gate)[0].sum(), leaves[3:])


def test_half_precision():
    (q, k, v), options = inputs(b=6, m=4, n=4, prefix=90)
    q, k, v, *prefix = (x.to(torch.bfloat16) for x in (q, k, v, *options["prefix"]))
    want = headstats.attend(q.double(), *(x.double() for x in written_out(k, v, prefix)), backend="reference")
    for spec in (StatSpec.none(), StatSpec()):
        r = headstats.attend(q, k, v, prefix=tuple(prefix), spec=spec)
        assert r.out.dtype == torch.bfloat16
        assert (r.out.double() - want.out).norm() <= 2 * torch.finfo(torch.bfloat16).eps * want.out.norm()
