"""Answers known in closed form, on the reference and on blocked."""

import math

import headstats
import pytest
import torch
from headstats import Edit, StatSpec
from headstats.stats import BY_NAME, tensors

ALL = StatSpec.all()
N = 12
BACKENDS = ["reference", "blocked"]


@pytest.fixture(params=[*BACKENDS, "compiled"])
def attend(request):
    if request.param == "compiled":
        run = request.getfixturevalue("attend_compiled")
        return lambda q, k, v, **options: run(q, k, v, spec=options.pop("spec", ALL), **options)
    return lambda q, k, v, **options: headstats.attend(
        q, k, v, spec=options.pop("spec", ALL), backend=request.param, **options
    )


def uniform(n=N, m=None):
    """Zero queries: every visible key gets the same weight."""
    k = torch.randn(1, 1, n, 4, dtype=torch.float64)
    return torch.zeros(1, 1, m or n, 4, dtype=torch.float64), k, torch.randn(1, 1, n, 3, dtype=torch.float64)


def one_hot(target, n=N, strength=200.0):
    """Queries that put all weight on the key target[i]."""
    k = torch.eye(n, dtype=torch.float64)[None, None]
    return strength * k[:, :, target], k, k.clone()


def close(a, b):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype).expand_as(a))


def test_uniform_causal(attend):
    q, k, v = uniform()
    r = attend(q, k, v)
    seen = torch.arange(1, N + 1, dtype=torch.float64)
    close(r.stats.entropy[0, 0], seen.log())
    close(r.stats.max_prob[0, 0], 1 / seen)
    close(r.stats.participation[0, 0], 1 / seen)
    close(r.stats.distance[0, 0], (seen - 1) / 2)
    close(r.stats.sink[0, 0], (4 / seen).clamp(max=1))
    close(r.stats.diagonal[0, 0], 1 / seen)
    close(r.stats.previous[0, 0], torch.where(seen > 1, 1 / seen, 0.0))
    close(r.lse[0, 0], seen.log())
    assert (r.stats.argmax == 0).all()  # all keys tie: the leftmost wins
    harmonic = [sum(1 / s for s in range(j + 1, N + 1)) / (N - j) for j in range(N)]
    close(r.stats.received[0, 0], harmonic)
    close(r.out[0, 0], v[0, 0].cumsum(0) / seen[:, None])


def test_uniform_harmonic_sink_value_of_64_tokens(attend):
    r = attend(*uniform(64))
    assert r.stats.received[0, 0, 0].item() == pytest.approx(0.0741, abs=5e-5)  # H_64 / 64


def test_previous_token_pattern(attend):
    target = [0, *range(N - 1)]
    r = attend(*one_hot(target))
    first = torch.arange(N) == 0
    close(r.stats.previous[0, 0], (~first).double())
    close(r.stats.diagonal[0, 0], first.double())
    close(r.stats.distance[0, 0], (~first).double())
    close(r.stats.entropy, 0.0)
    close(r.stats.max_prob, 1.0)
    close(r.stats.participation, 1.0)
    assert r.stats.argmax[0, 0].tolist() == target
    close(r.stats.sink[0, 0], (torch.tensor(target) < 4).double())


def test_two_equal_keys(attend):
    """Half on key 0, half on the query itself."""
    q, k, v = one_hot(list(range(N)))
    q = q + 200.0 * k[:, :, :1]
    r = attend(q, k, v)
    rows = torch.arange(N, dtype=torch.float64)
    half = torch.where(rows == 0, 1.0, 0.5)
    close(r.stats.entropy[0, 0], torch.where(rows == 0, 0.0, math.log(2)))
    close(r.stats.participation[0, 0], half)
    close(r.stats.diagonal[0, 0], half)
    close(r.stats.distance[0, 0], rows / 2)
    assert (r.stats.argmax == 0).all()
    close(r.stats.received[0, 0], [(1 + 0.5 * (N - 1)) / N] + [0.5 / (N - j) for j in range(1, N)])


def test_bottom_right_alignment(attend):
    """Three queries at the end of twelve keys see 10, 11 and 12 of them."""
    r = attend(*uniform(m=3))
    close(r.lse[0, 0], torch.tensor([10.0, 11.0, 12.0]).log())
    close(r.stats.distance[0, 0], torch.tensor([4.5, 5.0, 5.5]))


def test_window_counts_the_query(attend):
    r = attend(*uniform(), window=3)
    close(r.lse[0, 0].exp(), torch.arange(1, N + 1).clamp(max=3))
    alone = attend(*uniform(), window=1)
    close(alone.stats.diagonal, 1.0)
    both = attend(*uniform(), window=3, causal=False)
    close(both.lse[0, 0].exp(), [3, 4, *[5] * (N - 4), 4, 3])


def test_sink_logit_takes_its_share(attend):
    """A learned sink of logit ln 3 beside i + 1 keys of logit 0: the keys keep (i + 1) / (i + 4)."""
    q, k, v = uniform()
    r = attend(q, k, v, sinks=torch.tensor([math.log(3)], dtype=torch.float64))
    seen = torch.arange(1, N + 1, dtype=torch.float64)
    p = 1 / (seen + 3)
    close(r.lse[0, 0], (seen + 3).log())
    close(r.stats.max_prob[0, 0], p)
    close(r.stats.entropy[0, 0], -seen * p * p.log())  # over keys; the sink is no key
    close(r.stats.sink[0, 0], seen.clamp(max=4) * p)
    close(r.out[0, 0], v[0, 0].cumsum(0) * p[:, None])


def test_softcap_bounds_logits(attend):
    q, k, v = one_hot(list(range(N)), strength=1e6)
    r = attend(q, k, v, softcap=2.0, causal=False)
    close(r.stats.max_prob, math.exp(2) / (math.exp(2) + N - 1))


def test_rows_without_keys(attend):
    """Four queries before the first key, and a batch row that is padding throughout."""
    q, k, v = (x.expand(2, -1, -1, -1) for x in uniform(n=5, m=9))
    padding = torch.tensor([[True] * 5, [False] * 5])
    r = attend(q, k, v, key_padding=padding)
    empty = torch.tensor([[True] * 4 + [False] * 5, [True] * 9])[:, None]
    assert ((r.lse == -torch.inf) == empty).all()
    assert (r.stats.argmax[empty] == -1).all() and (r.out[empty] == 0).all()
    for name, value in r.stats.as_dict().items():
        assert all(x.isfinite().all() for x in tensors(value)), name
        if name == "topk":
            assert (value.values[empty] == 0).all() and (value.indices[empty] == -1).all()
        elif name != "argmax" and BY_NAME[name].axis == "query":
            assert (value[empty] == 0).all(), name
    assert (r.stats.received[1] == 0).all()


def test_rows_without_keys_stay_empty_beside_a_sink(attend):
    q, k, v = uniform(n=5, m=9)
    r = attend(q, k, v, sinks=torch.zeros(1))
    assert (r.lse[0, 0, :4] == -torch.inf).all() and (r.out[0, 0, :4] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_sink_and_received_skip_padding(attend, side):
    """Two padded positions: the first real keys are the sink, and padded queries are out of the mean."""
    real = torch.ones(1, N, dtype=torch.bool)
    real[:, :2] = False
    if side == "right":
        real = real.flip(1)
    q, k, v = uniform()
    r = attend(q, k, v, key_padding=real)
    seen = torch.arange(1.0, N - 1, dtype=torch.float64)
    where = slice(2, None) if side == "left" else slice(0, N - 2)
    close(r.stats.sink[0, 0, where], (4 / seen).clamp(max=1))
    harmonic = [sum(1 / s for s in range(j + 1, N - 1)) / (N - 2 - j) for j in range(N - 2)]
    close(r.stats.received[0, 0, where], harmonic)
    assert (r.stats.received[0, 0][~real[0]] == 0).all()


def test_query_padding_may_be_given(attend):
    q, k, v = uniform(n=4)
    r = attend(q, k, v, causal=False, query_padding=torch.tensor([[True, False, False, False]]))
    close(r.stats.received, 0.25)
    one = attend(q, k, v, query_padding=torch.tensor([[True, False, False, False]]))
    close(one.stats.received[0, 0], [1.0, 0.0, 0.0, 0.0])


def test_hiding_by_bias_equals_padding(attend):
    q, k, v = uniform()
    real = torch.arange(N)[None] >= 3
    for low in (-torch.inf, torch.finfo(torch.float64).min, -1e30):
        bias = torch.zeros(N, dtype=torch.float64).masked_fill(~real[0], low)
        a, b = attend(q, k, v, bias=bias), attend(q, k, v, key_padding=real)
        close(a.out, b.out)
        close(a.stats.entropy, b.stats.entropy)
        assert (a.stats.argmax == b.stats.argmax).all()
    half = torch.zeros(N, dtype=torch.float16).masked_fill(~real[0], torch.finfo(torch.float16).min)
    assert (attend(q, k, v, bias=half).lse[..., :3] == -torch.inf).all()


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1), (1, 3, 1), (2, 3, N), (1, 1, N)], ids=str)
def test_gate_scales_out_and_nothing_else(attend, shape):
    q, k, v = (torch.randn(2, 3, N, 4, dtype=torch.float64) for _ in range(3))
    gate = torch.randn(shape, dtype=torch.float64)
    plain, gated = attend(q, k, v), attend(q, k, v, edit=Edit(gate=gate))
    whole = gate if gate.dim() == 3 else gate[..., None]
    close(gated.out, plain.out * whole[..., None])
    for name, value in plain.stats.as_dict().items():
        for mine, one in zip(tensors(getattr(gated.stats, name)), tensors(value), strict=True):
            close(mine, one)
    close(gated.lse, plain.lse)


def test_constant_bias_moves_lse_only(attend):
    q, k, v = (torch.randn(2, 3, N, 4, dtype=torch.float64) for _ in range(3))
    plain, moved = attend(q, k, v), attend(q, k, v, bias=torch.tensor(2.5, dtype=torch.float64))
    close(moved.lse, plain.lse + 2.5)
    close(moved.out, plain.out)
    close(moved.stats.entropy, plain.stats.entropy)


def test_order_of_keys_does_not_matter_when_bidirectional(attend):
    q, k, v = (torch.randn(2, 3, N, 4, dtype=torch.float64) for _ in range(3))
    order = torch.randperm(N)
    a, b = attend(q, k, v, causal=False), attend(q, k[:, :, order], v[:, :, order], causal=False)
    close(b.out, a.out)
    close(b.stats.entropy, a.stats.entropy)
    close(b.stats.received, a.stats.received[:, :, order])
    assert (order[b.stats.argmax] == a.stats.argmax).all()


def test_ties_go_left(attend):
    """Small integers: equal keys give equal logits to the last bit, whatever the order of summation."""
    k = torch.randint(-3, 4, (1, 1, 200, 4)).double()
    k[:, :, 100:] = k[:, :, :100]
    q = torch.randint(-3, 4, (1, 1, 50, 4)).double()
    r = attend(q, k, k, causal=False)
    logits = (q @ k.mT)[0, 0]
    want = [row.index(max(row)) for row in logits.tolist()]
    assert max(want) < 100 and r.stats.argmax[0, 0].tolist() == want
