"""The blocked backend against the float64 reference."""

import headstats
import pytest
import torch
from headstats import StatSpec
from headstats.blocked import backend as blocked
from headstats.blocked import rows, tiles
from headstats.blocked import sdpa as cpu_flash
from headstats.blocked import statistics as fast
from headstats.validate.call import make_call
from headstats_cases import (
    CHANGED,
    EDITED,
    OPTIONS,
    PREFIX,
    SEGMENTED,
    WITH_BIAS,
    assert_same,
    choice_on_cpu,
    extras,
    inputs,
    oracle,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

ALL = StatSpec.all()
EVERY = OPTIONS | WITH_BIAS | SEGMENTED | PREFIX | EDITED | CHANGED


def check(qkv, options, spec=ALL):
    if spec is ALL:
        n = qkv[1].shape[2] + (options["prefix"][0].shape[2] if "prefix" in options else 0)
        options = extras(qkv[0].shape[2], n, len(qkv[0]), shared=len(qkv[0]) == 2) | options
    got = headstats.attend(*qkv, **options, spec=spec, backend="blocked")
    assert got.backend == "blocked" and got.lse.dtype == torch.float32
    assert_same(got, oracle(qkv, **options, spec=spec))


@pytest.fixture(params=["one tile", "small tiles"])
def tiling(request, monkeypatch):
    if request.param == "small tiles":
        monkeypatch.setattr(tiles, "CELLS", 128)
        monkeypatch.setattr(tiles, "ROWS", 4)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("shape", [(15, 15), (1, 63), (13, 63), (9, 4)], ids=str)
def test_options(name, shape, tiling):
    m, n = shape
    check(*inputs(m=m, n=n, **EVERY[name]))


@pytest.mark.parametrize("n", [1, 15, 63, 111, 257])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_ragged_sizes_and_head_layouts(n, heads, causal):
    h, hk = heads
    check(*inputs(b=1, h=h, hk=hk, m=n, n=n, d=20, dv=12, causal=causal))


@pytest.mark.parametrize("name", ["causal", "GPT-OSS", "everything"])
def test_more_keys_than_one_tile_holds(name, monkeypatch):
    monkeypatch.setattr(tiles, "CELLS", 1 << 14)
    check(*inputs(b=2, h=3, hk=1, m=257, n=300, **EVERY[name]))


@settings(max_examples=40, deadline=None)
@given(
    b=st.integers(1, 3), hk=st.integers(1, 3), g=st.integers(1, 3), m=st.integers(1, 20), n=st.integers(1, 20),
    d=st.integers(1, 9), dv=st.integers(1, 9), name=st.sampled_from(sorted(EVERY)),
    cells=st.sampled_from([8, 64, 1 << 19]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(b, hk, g, m, n, d, dv, name, cells, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "CELLS", cells)
        patch.setattr(tiles, "ROWS", 2)
        check(*inputs(b, hk * g, hk, m, n, d, dv, seed, **EVERY[name]))


def test_large_logits():
    (q, k, v), _ = inputs(n=63, m=63)
    q = 80 * q / q.norm(dim=-1, keepdim=True)
    k = k / k.norm(dim=-1, keepdim=True)
    k[:, :, 5] = q[:, ::2, 40] / 80  # some q.k are exactly 80, and -80 for the opposite key
    k[:, :, 6] = -k[:, :, 5]
    want = oracle((q, k, v), scale=1.0, spec=ALL)
    got = headstats.attend(q, k, v, scale=1.0, spec=ALL, backend="blocked")
    # float32 holds a logit of 80 to 4e-6 and its weight to as much, whatever the backend does
    assert_same(got, want, tolerance=4e-5, distance=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_only_the_output_cast(dtype):
    qkv, options = inputs(m=33, n=63, padding="left", gate=True)
    qkv = tuple(x.to(dtype) for x in qkv)
    got = headstats.attend(*qkv, **options, spec=ALL, backend="blocked")
    want = oracle(qkv, **options, spec=ALL)
    assert got.out.dtype == dtype and got.lse.dtype == torch.float32
    torch.testing.assert_close(got.out.double(), want.out, atol=1e-6, rtol=torch.finfo(dtype).eps)
    got.out = want.out
    assert_same(got, want)


def test_strided_inputs():
    (q, k, v), options = inputs(m=15, n=15)
    qkv = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert not qkv[0].is_contiguous()
    check(qkv, options)
    check(tuple(x.mT.contiguous().mT for x in (q, k, v)), options)


def test_batch_rows_and_heads_do_not_mix():
    (q, k, v), options = inputs(b=3, m=15, n=15, padding="left")
    whole = headstats.attend(q, k, v, **options, spec=ALL, backend="blocked")
    padding = options["key_padding"]
    for b in range(3):
        one = headstats.attend(
            q[b : b + 1], k[b : b + 1], v[b : b + 1], key_padding=padding[b : b + 1], spec=ALL, backend="blocked"
        )
        torch.testing.assert_close(one.out[0], whole.out[b])
        torch.testing.assert_close(one.stats.received[0], whole.stats.received[b])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (1, 70), (15, 15)], ids=str)
def test_flash_attention_of_pytorch_is_used_and_right(shape, causal, monkeypatch):
    if not cpu_flash._works(torch.float32):
        pytest.skip("this torch has no CPU flash operator that reproduces the formula")
    m, n = shape
    used = []
    monkeypatch.setattr(cpu_flash, "forward", lambda call, f=cpu_flash.forward: used.append(1) or f(call))
    qkv, options = inputs(b=2, h=6, hk=2, m=m, n=n, causal=causal, gate=True, scale=0.3)
    spec = headstats.StatSpec(
        entropy=False, max_prob=False, argmax=False, distance=False, sink=3, diagonal=True, previous=True
    )
    check(qkv, options, spec)
    assert used


def test_without_the_private_operator(monkeypatch):
    monkeypatch.setattr(cpu_flash, "_works", lambda dtype: False)
    qkv, options = inputs(m=64, n=64)
    check(qkv, options, StatSpec.none())


def test_no_pattern_is_held(monkeypatch):
    """The largest tensor made for long inputs stays at the tile budget, far below M x N."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor):
                    Largest.size = max(Largest.size, x.untyped_storage().nbytes())
            return out

    n = 1024
    for module in (tiles, fast):
        monkeypatch.setattr(module, "CELLS", 1 << 17)
    qkv, _ = inputs(b=1, h=2, hk=1, m=n, n=n, d=8, dv=8)
    with Largest():
        headstats.attend(*qkv, k_segments=torch.arange(n) * 3 // n, spec=ALL, backend="blocked")
    assert Largest.size <= 4 * tiles.CELLS < 4 * n * n / 4


def test_blocked_is_the_choice_where_nothing_else_can():
    qkv, _ = inputs()
    assert headstats.attend(*qkv).backend == choice_on_cpu()
    assert blocked.unsupported(make_call(*qkv)) is None


def test_place_of_the_maximum_in_long_rows():
    """Against the plain maximum, with ties everywhere: few distinct values."""
    for n in (63, 64, 127, 512, 1030, 2048, 4100):
        s = torch.randint(0, 4, (3, 50, n)).float()
        s[0] = torch.randn(50, n)
        s[1, :, -3:] = 9.0
        top, place = rows.first_maximum(s)
        assert torch.equal(top, s.amax(-1))
        assert place.flatten().tolist() == [row.index(max(row)) for row in s.flatten(0, 1).tolist()]
