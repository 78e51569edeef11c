"""Tiles on several threads: the same numbers in every run, errors and state of the caller carried over."""

from __future__ import annotations

import threading

import headstats
import pytest
import torch
from headstats.blocked import threads as workers
from headstats.stats import tensors
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def ran_on(monkeypatch):
    """The threads that asked for a tile, of calls small enough for a test."""
    seen = set()
    monkeypatch.setattr(workers, "CELLS", 1 << 10)
    original = workers._Crew._next

    def noted(self):
        found = original(self)
        if found is not None:
            seen.add(threading.get_ident())
        return found

    monkeypatch.setattr(workers._Crew, "_next", noted)
    return seen


def inputs(n: int = 300, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, h, n, 16, generator=g, dtype=dtype) for h in (6, 2, 2))


def test_every_statistic_is_the_same_bit_for_bit_in_every_run(two_threads, ran_on) -> None:
    spec = headstats.StatSpec(received=True, received_max=True, fai=(2, 40), column_norm=True, topk=3)
    first, *others = [headstats.attend(*inputs(), spec=spec, backend="blocked") for _ in range(5)]
    assert len(ran_on) > 1
    for r in others:
        assert torch.equal(r.out, first.out) and torch.equal(r.lse, first.lse)
        for name, x in first.stats.as_dict().items():
            pairs = zip(tensors(x), tensors(r.stats.as_dict()[name]), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs), name


def test_two_threads_agree_with_one_and_with_the_reference(two_threads, ran_on) -> None:
    q, k, v = inputs(dtype=torch.float64)
    spec = headstats.StatSpec(received=True, fai=(2, 40), distance_var=True)
    two = headstats.attend(q, k, v, spec=spec, backend="blocked")
    assert ran_on
    torch.set_num_threads(1)
    for backend in ("blocked", "reference"):
        other = headstats.attend(q, k, v, spec=spec, backend=backend)
        torch.testing.assert_close(two.out, other.out, rtol=0, atol=1e-12)
        for name, x in other.stats.as_dict().items():
            torch.testing.assert_close(tensors(two.stats.as_dict()[name])[0], tensors(x)[0], rtol=0, atol=1e-9)


def test_an_error_on_any_thread_reaches_the_caller_and_threads_are_given_back(two_threads) -> None:
    def fail(room: None, i: int) -> int:
        if i == 3:
            raise ValueError("tile 3")
        return i

    with pytest.raises(ValueError, match="tile 3"):
        workers.run_all(range(50), lambda: None, fail, lambda i, x: None, 2)
    assert torch.get_num_threads() == 2
    assert threading.active_count() < 50


def test_found_is_put_in_the_order_of_the_items(two_threads) -> None:
    order: list[int] = []
    workers.run_all(range(200), lambda: None, lambda room, i: i, lambda i, x: order.append(x), 2)
    assert order == list(range(200))


@pytest.mark.parametrize("inference", [False, True])
def test_grad_and_inference_mode_are_those_of_the_caller(two_threads, inference: bool) -> None:
    found = set()

    def state(room: None, i: int) -> None:
        found.add((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    with torch.inference_mode(inference):
        expected = {(torch.is_grad_enabled(), torch.is_inference_mode_enabled())}
        workers.run_all(range(20), lambda: None, state, lambda i, x: None, 2)
    assert found == expected


def test_what_watches_operators_sees_all_of_them(two_threads, ran_on) -> None:
    """A dispatch mode belongs to one thread: then that thread does all."""
    q, k, v = inputs()
    with FlopCounterMode(display=False) as counter:
        headstats.attend(q, k, v, backend="blocked")
    n = q.shape[2]
    visible = q[:, :, 0, 0].numel() * n * (n + 1) // 2
    assert counter.get_total_flops() >= 2 * 2 * q.shape[3] * visible  # two products, a multiplication and an addition
    assert not ran_on


def test_a_small_call_is_left_to_one_thread_without_help(two_threads) -> None:
    seen = set()
    assert workers.thread_count(9 * 256 * 256) == 1 and workers.thread_count(9 * 512 * 512) == 2
    workers.run_all(range(5), lambda: None, lambda room, i: seen.add(torch.get_num_threads()), lambda i, x: None, 1)
    assert seen == {1} and torch.get_num_threads() == 2
