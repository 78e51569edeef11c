"""Logits up to 1e30, rows of -inf, and NaN: against torch.softmax in float64, on every backend."""

import math

import headstats
import pytest
import torch
from headstats import StatSpec

HEADS, QUERIES, KEYS, SIZE = 2, 6, 24, 16
SPEC = StatSpec(
    entropy=True, max_prob=True, sink=4, diagonal=True, previous=True, waad=10, local=5, received=True,
    received_max=True, column_norm=True, effective_keys=True, topk=3,
)  # fmt: skip
SIZES = (1e4, -1e4, 1e9, -1e9, 1e20, -1e20, 9e29, -9e29)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def equal_logits(size: float, dtype: torch.dtype, by: str) -> tuple[tuple[torch.Tensor, ...], dict]:
    """Calls whose visible logits all equal `size`: by a bias, or by the product of q and k."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, n, SIZE, generator=generator, dtype=torch.float64)
               for h, n in ((HEADS, QUERIES), (1, KEYS), (1, KEYS)))  # fmt: skip
    q, k = torch.zeros_like(q), torch.zeros_like(k)
    if by == "bias":
        return (q.to(dtype), k.to(dtype), v.to(dtype)), {"bias": torch.full((1, 1, QUERIES, KEYS), size)}
    side = math.sqrt(abs(size) * SIZE**0.5)
    q[..., 0], k[..., 0] = side, math.copysign(side, size)
    return (q.to(dtype), k.to(dtype), v.to(dtype)), {}


def expected(qkv, sinks=None, bias=None) -> dict[str, torch.Tensor]:
    """Statistics by arithmetic on torch.softmax of the scores."""
    q, k, v = qkv
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q.to(wide) @ k.to(wide).mT * SIZE**-0.5).double()
    scores = scores if bias is None else scores + bias.to(wide).double()
    distance = torch.arange(QUERIES)[:, None] + KEYS - QUERIES - torch.arange(KEYS)
    scores = scores.masked_fill(distance < 0, -torch.inf)
    columns = [scores] if sinks is None else [scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)]
    p = torch.cat(columns, -1).softmax(-1)[..., :KEYS]
    at = KEYS - QUERIES
    return {
        "p": p, "out": p @ v.double(), "entropy": -torch.special.xlogy(p, p).sum(-1), "max_prob": p.amax(-1),
        "sink": p[..., :4].sum(-1), "diagonal": p.diagonal(at, -2, -1), "previous": p.diagonal(at - 1, -2, -1),
        "waad": (p * distance.abs().clamp(max=10)).sum(-1), "local": (p * (distance.abs() < 5)).sum(-1),
        "received": p.sum(-2) / (distance >= 0).sum(0), "received_max": p.amax(-2),
        "column_norm": p.square().sum(-2).sqrt(), "lse": torch.cat(columns, -1).logsumexp(-1),
    }  # fmt: skip


def check(backend: str, size: float, dtype: torch.dtype, by: str, sinks=None) -> None:
    """Compare a call and its gradients with the arithmetic."""
    qkv, options = equal_logits(size, dtype, by)
    want = expected(qkv, sinks, **options)
    got = headstats.attend(*qkv, sinks=sinks, backend=backend, spec=SPEC, **options)
    atol = 2e-2 if dtype.itemsize == 2 else 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(got.out.double(), want["out"], rtol=0, atol=atol)
    torch.testing.assert_close(got.lse.double(), want["lse"], rtol=1e-6, atol=1e-6)
    for name in sorted(set(want) - {"p", "out", "lse"}):
        close = {"rtol": 1e-5, "atol": 1e-5 if dtype != torch.float64 else 1e-10}
        torch.testing.assert_close(
            getattr(got.stats, name).double(), want[name], **close, msg=lambda m, n=name: f"{n}: {m}"
        )
    values = qkv[2].requires_grad_()
    headstats.attend(*qkv, sinks=sinks, backend=backend, spec=StatSpec.none(), **options).out.sum().backward()
    grad = want["p"].sum((1, 2))[:, None, :, None].expand(values.shape)
    torch.testing.assert_close(values.grad.double(), grad, rtol=2e-2 if dtype.itemsize == 2 else 1e-5, atol=atol)


def cases(dtypes=DTYPES, sizes=SIZES):
    """(size, dtype, by) whose numbers the dtype holds."""
    for size in sizes:
        for dtype in dtypes:
            for by in ("bias", "product"):
                if by == "bias" or dtype != torch.float16 or abs(size) < 1e5:
                    yield size, dtype, by


@pytest.mark.parametrize("backend", ["reference", "blocked", "compiled"])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0])], ids=["", "sinks"])
def test_equal_logits_of_any_size_weigh_the_same(backend, sinks, compiled_library):
    for size, dtype, by in cases():
        check(backend, size, dtype, by, sinks)


@pytest.mark.parametrize("backend", ["blocked", "compiled"])
def test_gradients_of_alibi_temperature_and_bias_beside_a_large_bias(backend, compiled_library):
    """A constant added to all logits changes lse alone.

    In base 2 a logit near 1.44 · 2**20 is rounded to a multiple of 1/8, so that weights are off by up to a factor of
    2**(1/8), 9%. A gradient that cancels the constant against itself would be off by the constant.
    """
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator) for n in (5, 9, 9))
    grads = []
    for size in (0.0, 2.0**20):
        leaves = {"alibi": torch.tensor([0.5, 0.25]), "temperature": torch.full((1, 2, 5), 2.0)}
        for x in leaves.values():
            x.requires_grad_()
        bias = torch.full((1, 1, 5, 9), size)
        # Logits are multiples of 1/4, which float32 holds beside 2**20.
        ints = [(4 * x).round() / 4 for x in (q, k)]
        edit = headstats.Edit(temperature=leaves["temperature"])
        r = headstats.attend(*ints, v, scale=4.0, bias=bias, alibi=leaves["alibi"], edit=edit, backend=backend)
        r.out.square().sum().backward()
        grads.append([x.grad for x in leaves.values()])
    for small, large in zip(*grads, strict=True):
        torch.testing.assert_close(small, large, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("backend", ["reference", "blocked", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_parameters_are_widened_before_arithmetic(backend, dtype, compiled_library):
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, n, 8, generator=generator).to(dtype) for n in (5, 9, 9))
    ids_q, ids_k = torch.arange(5) % 2, torch.arange(9) % 2
    half = {"sinks": torch.tensor([1.03, -0.77]).bfloat16(), "alibi": torch.tensor([0.33, 0.071]).bfloat16()}
    table = torch.tensor([[0.3, 1.7], [0.9, 1.1]]).bfloat16()
    edit = {"bias": table, "gain": table, "temperature": torch.tensor([1.3, 0.7]).bfloat16(), "logit_factor": table}
    edit["logit_raise"], edit["gate"] = table, torch.tensor([0.3, 0.7]).bfloat16()
    wide = [{n: x.double() for n, x in d.items()} for d in (half, edit)]
    where = {"q_segments": ids_q, "k_segments": ids_k, "spec": StatSpec(sink=2, entropy=True)}
    got = headstats.attend(q, k, v, **half, **where, edit=headstats.Edit(**edit), backend=backend)
    exact = headstats.attend(
        *(x.double() for x in (q, k, v)), **wide[0], **where, edit=headstats.Edit(**wide[1]), backend="reference"
    )
    torch.testing.assert_close(got.lse.double(), exact.lse, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(got.stats.sink.double(), exact.stats.sink, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got.stats.entropy.double(), exact.stats.entropy, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", ["reference", "blocked", "compiled"])
def test_a_row_whose_logits_are_all_minus_infinity_sees_no_key(backend, compiled_library):
    """As with a bias of -inf: out 0, lse -inf, nothing for future keys. Elsewhere such a key has weight 0."""
    q, k, v = torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    k[0, 0, 0] = -torch.inf
    r = headstats.attend(q, k, v, backend=backend, spec=StatSpec.all())
    assert r.out[0, 0, 0].eq(0).all() and r.lse[0, 0, 0] == -torch.inf and r.stats.argmax[0, 0, 0] == -1
    assert r.stats.topk.indices[0, 0, 0].eq(-1).all() and r.stats.entropy[0, 0, 0] == 0
    torch.testing.assert_close(r.out[0, 0, 3], v[0, 0, 1:].mean(0))
    torch.testing.assert_close(r.stats.entropy[0, 0, 3], torch.tensor(3.0).log())
    assert r.stats.received_max[0, 0, 0] == 0


@pytest.mark.parametrize("backend", ["reference", "blocked", "compiled"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_of_a_query_reaches_every_statistic_of_its_row_and_no_hidden_key(backend, value, compiled_library):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 2, 20, 8, generator=generator) for _ in range(3))
    clean = headstats.attend(q, k, v, backend="reference", spec=StatSpec.all())
    q[0, 0, 7] = value
    if value == torch.inf:
        k.abs_()  # so that logits are +inf
        clean = headstats.attend(q.masked_fill(q == torch.inf, 0), k, v, backend="reference", spec=StatSpec.all())
    r = headstats.attend(q, k, v, backend=backend, spec=StatSpec.all())
    assert r.out[0, 0, 7].isnan().all() and r.lse[0, 0, 7].isnan()
    for s in headstats.STATISTICS:
        if (x := getattr(r.stats, s.name)) is None:
            continue
        values, want = (x.values, clean.stats.topk.values) if s.name == "topk" else (x, getattr(clean.stats, s.name))
        if s.axis == "query":
            bad = (x.indices if s.name == "topk" else x)[0, 0, 7]
            assert (bad == -1).all() if s.name in ("argmax", "topk") else values[0, 0, 7].isnan().all(), s.name
            rows = torch.arange(20) != 7
            torch.testing.assert_close(values[0, 0, rows], want[0, 0, rows], msg=lambda m, n=s.name: f"{n}: {m}")
        else:
            hidden = slice(8, None)  # keys that query 7 does not see
            torch.testing.assert_close(values[0, 0, hidden], want[0, 0, hidden])
            if s.name != "fai":
                assert values[0, 0, :8].isnan().all(), s.name
        torch.testing.assert_close(values[0, 1], want[0, 1])


@pytest.mark.parametrize("backend", ["reference", "blocked", "compiled"])
@pytest.mark.parametrize("limit", [300, 100_000, 2**31 - 1])
def test_waad_with_a_wide_window_keeps_its_digits(backend, limit, compiled_library):
    """Weight near the query, window far beyond: W - (W - distance) would cancel."""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 1, 700, 8, generator=generator) for _ in range(3))
    r = headstats.attend(q, k, v, alibi=torch.tensor([2.0]), backend=backend, spec=StatSpec(waad=limit))
    scores = (q.double() @ k.double().mT) * 8**-0.5
    distance = torch.arange(700)[:, None] - torch.arange(700)
    p = (scores - 2.0 * distance.abs()).masked_fill(distance < 0, -torch.inf).softmax(-1)
    torch.testing.assert_close(
        r.stats.waad.double(), (p * distance.abs().clamp(max=limit)).sum(-1), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("backend", ["auto", "compiled"])
def test_edits_of_whole_rows_beside_large_logits_fall_back_or_are_refused(backend, compiled_library):
    (q, k, v), options = equal_logits(-1e9, torch.float32, "bias")
    edit = headstats.Edit(counterfactual="uniform")
    if backend == "auto":
        r = headstats.attend(q, k, v, edit=edit, backend=backend, **options)
        assert r.backend == "blocked"
        torch.testing.assert_close(r.out[0, 0, -1], v[0, 0].mean(0))
    else:
        with pytest.raises(NotImplementedError, match="limited to logits"):
            headstats.attend(q, k, v, edit=edit, backend=backend, **options)
