"""Coverage of intervals, by simulation from known distributions, and their corner cases."""

from __future__ import annotations

import numpy as np
import pytest

from interp.results.significance import mean_interval, share_interval, t_quantile, wilson

DRAWS = 1500  # whose share covered has a standard error of 0.6%


def coverage(values: np.ndarray, truth: float, over: np.ndarray | None = None) -> float:
    _, lo, hi = mean_interval(values, over, n_boot=1000)
    return float(((lo <= truth) & (truth <= hi)).mean())


@pytest.mark.parametrize("n", [8, 16, 64])
def test_from_eight_examples_intervals_cover(n: int) -> None:
    rng = np.random.default_rng(n)
    assert coverage(rng.normal(0.3, 1, (DRAWS, n)), 0.3) >= 0.93
    assert coverage(rng.exponential(1, (DRAWS, n)), 1) >= 0.90
    gap = rng.gamma(4, 1, (DRAWS, n))
    assert coverage(0.3 * gap + rng.normal(size=gap.shape), 0.3, gap) >= 0.91  # a ratio of means


@pytest.mark.parametrize("n", [2, 4, 7])
def test_below_eight_it_is_students_t(n: int) -> None:
    values = np.random.default_rng(n).normal(size=(DRAWS, n))
    mean, lo, hi = mean_interval(values)
    half = t_quantile(0.975, n - 1) * values.std(1, ddof=1) / n**0.5
    np.testing.assert_allclose([lo, hi], [mean - half, mean + half])
    assert coverage(values, 0) >= 0.93


def test_quantiles_of_students_t_are_those_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 7: 2.3646, 10: 2.2281, 30: 2.0423, 120: 1.9799}
    for df, value in table.items():
        assert t_quantile(0.975, df) == pytest.approx(value, abs=1e-4)
    assert t_quantile(0.95, 5) == pytest.approx(2.0150, abs=1e-4)


def test_rows_with_missing_values_are_as_rows_without_them() -> None:
    values = np.random.default_rng(0).normal(size=(3, 12))
    holed = np.full((3, 20), np.nan)
    holed[:, ::2][:, :10], holed[:, 1:5:2] = values[:, :10], values[:, 10:]
    # equal values in another order: the same mean, and another draw of the same interval
    whole, part = mean_interval(values), mean_interval(holed)
    np.testing.assert_allclose(whole[0], part[0])
    np.testing.assert_allclose(whole[1:], part[1:], atol=0.15)
    dense = holed[:, np.isfinite(holed[0])]
    np.testing.assert_array_equal(mean_interval(dense), part)


def test_corner_cases() -> None:
    nan = np.nan
    mean, lo, hi = mean_interval(np.array([[5, nan, nan], [2, 2, 2], [nan, nan, nan], [1, 2, 3]]))
    np.testing.assert_array_equal(mean, [5, 2, nan, 2])
    assert np.isnan(lo[[0, 2]]).all() and np.isnan(hi[[0, 2]]).all() and lo[1] == hi[1] == 2 and lo[3] < 1
    ratio, lo, hi = mean_interval(np.ones((2, 9)), np.array([np.zeros(9), np.ones(9)]))
    assert np.isnan([ratio[0], lo[0], hi[0]]).all() and ratio[1] == lo[1] == hi[1] == 1
    # seven of eight values are equal: a third of the samples has no spread, and the interval stays a sane one
    _, lo, hi = mean_interval(np.array([[1.0] * 7 + [0.0]]))
    half = t_quantile(0.975, 7) / 8
    np.testing.assert_allclose([lo[0], hi[0]], [0.875 - half, 0.875 + half])


def test_shares_count_pairs_not_directions() -> None:
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(7, 10) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    rng, covered, as_directions = np.random.default_rng(0), 0, 0
    for _ in range(DRAWS):
        right = rng.random(20) < 0.8  # both directions of a pair are right or wrong together
        _, lo, hi = share_interval(np.stack([right, right]).mean(0))
        covered += lo <= 0.8 <= hi
        low, high = wilson(2 * right.sum(), 40)
        as_directions += low <= 0.8 <= high
    assert covered / DRAWS >= 0.93 > 0.87 > as_directions / DRAWS
    assert share_interval(np.ones(12))[1] < 0.8  # all right, but not certain
