"""Summaries of heads: what is counted, and that parts join to the whole."""

import re

import headstats
import pytest
import torch
from headstats import HeadSummary, Moments, StatSpec
from headstats.stats import BY_NAME, tensors
from headstats_cases import extras, inputs

ALL = StatSpec.all()
NONE = torch.zeros(3, 7, dtype=torch.bool)


def call(seed=0, b=3, m=7, n=11, spec=ALL, **options):
    qkv, options = inputs(b=b, m=m, n=n, seed=seed, **options)
    needed = extras(m, n, b, seed) if spec is ALL else {}
    needed = {name: x.clamp(max=3) if name == "k_segments" else x for name, x in needed.items()}
    if needed:
        needed["k_segments"][..., 0] = 3  # as many segments whatever the seed
    return headstats.attend(*qkv, **options, **needed, spec=spec)


def same(a, b, rtol=1e-12):
    assert a.tensors().keys() == b.tensors().keys() and a.tensors()
    for (name, x), y in zip(a.tensors().items(), b.tensors().values(), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-15, msg=lambda m, n=name: f"{n}: {m}")


def test_numbers_are_those_of_the_counted_positions():
    r = call(padding="left", causal=True)
    queries, keys = torch.rand(3, 7) < 0.6, torch.rand(3, 11) < 0.6
    summary = HeadSummary.of(r, queries=queries, keys=keys)
    assert set(summary.moments) == set(r.stats.as_dict()) - {"argmax"}
    for name, value in r.stats.as_dict().items():
        if name == "argmax":
            continue
        x, got = tensors(value)[0].double(), summary[name]
        for h in range(4):
            counted = queries & (r.lse[:, h] > -torch.inf) if BY_NAME[name].axis == "query" else keys
            part = x[:, h][counted]
            assert got.count[h] == len(part)
            torch.testing.assert_close(got.mean[h], part.mean(0))
            torch.testing.assert_close(got.variance[h], part.var(0, correction=0))
            assert torch.equal(got.low[h], part.amin(0)) and torch.equal(got.high[h], part.amax(0))
        assert got.mean.dtype == torch.float64 and got.mean.shape == (4, *x.shape[3:])


def test_queries_without_a_key_do_not_count():
    r = call(m=9, n=4, padding="left", spec=StatSpec())
    empty = r.lse == -torch.inf
    assert empty.any()
    assert torch.equal(HeadSummary.of(r)["entropy"].count, (~empty).sum((0, 2)))


def test_a_million_values_far_from_zero():
    """Mean 10^6, spread 10^-3: sums of squares would leave no digit of the variance."""
    g = torch.Generator().manual_seed(0)
    x = 1e6 + 1e-3 * torch.randn(1, 1, 1_000_000, generator=g, dtype=torch.float64)
    want = (x - 1e6).var(correction=0)
    every = torch.ones(1, 1, 1_000_000, dtype=torch.bool)
    whole = Moments.of(x, every)
    parts = [Moments.of(p, e) for p, e in zip(x.split(9_973, 2), every.split(9_973, 2), strict=True)]
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.merge(part)
    for got in (whole, joined):
        assert got.count.item() == 1_000_000 and (got.mean - x.mean()).abs().item() < 1e-8
        torch.testing.assert_close(got.variance[0], want, rtol=1e-7, atol=0)
        assert got.low.item() == x.min() and got.high.item() == x.max()
    naive = x.square().mean() - x.mean().square()
    assert (naive - want).abs() > want / 2  # what the update is for


def test_shards_make_the_whole_in_any_order():
    parts = [HeadSummary.of(call(seed)) for seed in range(5)]
    results = [call(seed).stats.as_dict() for seed in range(5)]
    whole = HeadSummary(
        {name: Moments.of(torch.cat([tensors(x[name])[0] for x in results]), torch.ones(1, 1, 1).bool())
         for name in results[0] if name != "argmax"}
    )  # fmt: skip
    for order in ([0, 1, 2, 3, 4], [3, 1, 4, 0, 2]):
        total = HeadSummary()
        for i in order:
            total += parts[i]
        same(total, whole, rtol=1e-10)
    left, right = parts[0] + parts[1], parts[2].merge(parts[3]).merge(parts[4])
    same(right + left, whole, rtol=1e-10)


def test_nothing_is_neutral():
    some, none = HeadSummary.of(call()), HeadSummary.of(call(), queries=NONE)
    for joined in (some + HeadSummary(), HeadSummary() + some):
        same(joined, some, rtol=0)
    assert not (HeadSummary() + HeadSummary()).moments
    x = none["entropy"]
    assert (x.count == 0).all() and (x.mean == 0).all() and (x.variance == 0).all() and (x.low > x.high).all()
    for joined in (some["entropy"].merge(x), x.merge(some["entropy"])):
        same(HeadSummary({"entropy": joined}), HeadSummary({"entropy": some["entropy"]}), rtol=0)
    assert not any(t.isnan().any() for t in (none + none).tensors().values())


def test_storage(tmp_path):
    some = HeadSummary.of(call())
    torch.save(some.tensors(), tmp_path / "summary.pt")
    same(HeadSummary.from_tensors(torch.load(tmp_path / "summary.pt")), some, rtol=0)
    assert HeadSummary.from_tensors({}).moments == {}
    broken = some.tensors()
    del broken["entropy.m2"]
    with pytest.raises(ValueError, match=r"missing or unknown: entropy\.m2"):
        HeadSummary.from_tensors(broken)


def test_printing():
    assert repr(HeadSummary.of(call(spec=StatSpec()))).startswith("HeadSummary(entropy[4], max_prob[4], distance[4]")
    assert repr(HeadSummary()) == "HeadSummary(empty; up to 0 positions a head)"


def test_what_is_wrong_is_said():
    r, some = call(), HeadSummary.of(call())
    fewer = HeadSummary.of(call(spec=StatSpec()))
    heads = HeadSummary.of(call(h=2))
    for error, message, f in (
        (ValueError, "queries has shape [3, 6]: [3, 7] expected", lambda: HeadSummary.of(r, queries=~NONE[:, :6])),
        (TypeError, "keys is torch.float32: a bool tensor", lambda: HeadSummary.of(r, keys=torch.ones(3, 11))),
        (TypeError, "queries is list: a bool tensor", lambda: HeadSummary.of(r, queries=[True])),
        (ValueError, "entropy is [4] in one summary and [2] in the other", lambda: some + heads),
        (ValueError, "only one of the summaries has column_norm", lambda: some + fewer),
        (KeyError, "'waad' is not in this summary, which has entropy, max_prob", lambda: fewer["waad"]),
    ):  # fmt: skip
        with pytest.raises(error, match=re.escape(message)):
            f()
