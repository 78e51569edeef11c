"""Products by oneDNN: the same numbers as by torch.bmm, and only where they may be taken."""

from __future__ import annotations

import pytest
import torch
from headstats.blocked import matmul as products
from torch.utils.flop_counter import FlopCounterMode

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this build of torch has no oneDNN"
)


@pytest.fixture
def paying(monkeypatch):
    """oneDNN, whether it is the faster one here or not; and the products that went to it."""
    calls = []
    original = torch.ops.mkldnn._linear_pointwise

    def noted(*args):
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(products, "onednn_pays", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", noted)
    return calls


def pair(r: int = 3, m: int = 192, k: int = 48, n: int = 256, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(0)
    return torch.randn(r, m, k, generator=g, dtype=dtype), torch.randn(r, n, k, generator=g, dtype=dtype).mT


@needs_onednn
@pytest.mark.parametrize("r", [1, 3])
@pytest.mark.parametrize("strided", [False, True])
def test_products_are_those_of_bmm(paying, r: int, strided: bool) -> None:
    a, b = pair(r)
    b = b if strided else b.contiguous()
    want = torch.bmm(a.double(), b.double())
    room = torch.full((r, 192, 300), float("nan"))
    for out in (None, torch.full(want.shape, float("nan")), room[:, :, 10:266]):
        found = products.batched(a, b, out)
        torch.testing.assert_close(found.double(), want, rtol=0, atol=2e-5)
    assert len(paying) == 3 * r
    assert room[:, :, :10].isnan().all() and room[:, :, 266:].isnan().all()


@needs_onednn
def test_where_it_must_not_be_taken(paying) -> None:
    products.batched(*pair(dtype=torch.float64))
    products.batched(*pair(dtype=torch.bfloat16))
    products.batched(*pair(m=64, n=3))  # small
    products.batched(*pair(m=150)), products.batched(*pair(n=300))  # shapes of which too many would occur
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # bfloat16 products would be let pass
    try:
        products.batched(*pair())
    finally:
        torch.set_float32_matmul_precision(before)
    with FlopCounterMode(display=False) as counter:  # which knows no private operators
        products.batched(*pair())
    assert not paying and counter.get_total_flops() == 2 * 3 * 192 * 48 * 256


@pytest.mark.parametrize("n", [257, 1000, 4096, 8192, 20000])
def test_tiles_end_at_few_places(n: int) -> None:
    """Each shape costs a megabyte for as long as the process lives."""
    ends = {products.round_end(stop, n) for stop in range(1, n + 1)}
    assert len(ends) <= 8 and max(ends) == n
    assert all(products.round_end(stop, n) >= stop for stop in range(1, n + 1))


def test_the_trial_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    products.onednn_pays.cache_clear()
    assert products.onednn_pays() in (True, False)
    assert torch.get_num_threads() == before
