"""The bound on what a screen passed over: against enumeration, and covered as often as it says."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest

from interp.circuits.attribution.miss_bound import at_most, missed
from interp.errors import InterpError


@pytest.mark.parametrize("population,sampled,found", [(7, 3, 0), (9, 4, 1), (8, 8, 3), (10, 1, 1), (6, 5, 2)])
def test_equals_counting_every_sample(population: int, sampled: int, found: int) -> None:
    for confidence in (0.5, 0.9, 0.95):
        allowed = []
        for marked in range(found, population - (sampled - found) + 1):
            few = sum(sum(i < marked for i in drawn) <= found for drawn in combinations(range(population), sampled))
            if few / comb(population, sampled) > 1 - confidence:
                allowed.append(marked)
        assert at_most(population, sampled, found, confidence) == max(allowed)


@pytest.mark.parametrize("population,marked,sampled", [(40, 6, 10), (300, 9, 60), (300, 100, 20), (25, 1, 20)])
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_covers_as_often_as_it_says(population: int, marked: int, sampled: int, confidence: float) -> None:
    """Heavy-tailed effects, thresholds fixed beforehand and read off the sample: both bounds, each by itself."""
    rng = np.random.default_rng(population + marked)
    effects = rng.standard_cauchy(population)
    order = np.sort(np.abs(effects))[::-1]
    threshold = (order[marked - 1] + order[marked]) / 2
    runs, fixed, own = 1500, 0, 0
    for _ in range(runs):
        bound = missed(rng.permutation(effects)[:sampled], population, threshold, confidence)
        fixed += bound.at_most >= marked
        own += bound.above_sample >= (np.abs(effects) > bound.largest).sum()
    error = 3 * np.sqrt(confidence * (1 - confidence) / runs)
    assert fixed / runs >= confidence - error and own / runs >= confidence - error


def test_the_bound_is_not_idle() -> None:
    """More sampling says more; one site less in the bound would be wrong too often."""
    bounds = [at_most(250, n, 0) for n in (5, 20, 60, 150, 250)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > 100 and bounds[2] < 12 and bounds[-1] == 0
    for n, d in zip((5, 20, 60, 150), bounds, strict=False):
        assert comb(250 - d, n) / comb(250, n) > 0.05 >= comb(250 - d - 1, n) / comb(250, n)


def test_impossible_numbers_are_refused() -> None:
    for effects, population, threshold, confidence in (
        ([1.0], 3, -1.0, 0.9), ([1.0], 3, 1.0, 1.0), ([], 3, 1.0, 0.9), ([1.0, 2.0], 1, 1.0, 0.9),
        ([float("nan")], 3, 1.0, 0.9), ([1.0], 3, float("nan"), 0.9),
    ):  # fmt: skip
        with pytest.raises(InterpError):
            missed(np.array(effects), population, threshold, confidence)
