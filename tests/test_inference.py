"""Permutation tests and false discovery rates, against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from interp.results.significance import benjamini_hochberg, sign_flip


def test_sign_flip_counts_every_sign_pattern() -> None:
    x = np.array([[1.0, 2.0, -0.5, 3.0], [0.1, -0.1, 0.2, -0.2], [0.0, 0.0, 0.0, 0.0]])
    for row, p in zip(x, sign_flip(x), strict=True):
        sums = [abs(np.dot(s, row)) for s in itertools.product((1, -1), repeat=4)]
        assert p == np.mean(np.array(sums) >= abs(row.sum()) - 1e-12)
    assert sign_flip(np.ones((1, 10)))[0] == 2**-9


def test_sign_flip_is_calibrated_and_finds_what_is_there() -> None:
    rng = np.random.default_rng(0)
    null = sign_flip(rng.standard_t(3, size=(2000, 10)))
    for level in (0.05, 0.2, 0.5):
        assert abs((null <= level).mean() - level) < 4 * np.sqrt(level * (1 - level) / 2000) + 2**-9
    drawn = sign_flip(rng.normal(size=(500, 30)), n_perm=999)
    assert abs((drawn <= 0.1).mean() - 0.1) < 0.06 and drawn.min() >= 1 / 1000
    assert sign_flip(rng.normal(1, 1, size=(1, 40)), n_perm=999)[0] == pytest.approx(1 / 1000)


def test_missing_values_are_left_out() -> None:
    p = sign_flip(np.array([[1.0, 2.0, np.nan], [np.nan, np.nan, np.nan]]))
    assert p[0] == sign_flip(np.array([[1.0, 2.0]]))[0] and np.isnan(p[1])


def test_benjamini_hochberg_by_hand() -> None:
    p = np.array([0.01, 0.04, 0.03, 0.005, np.nan, 0.8])
    np.testing.assert_allclose(benjamini_hochberg(p), [0.025, 0.05, 0.05, 0.025, np.nan, 0.8])
    assert benjamini_hochberg(np.array([])).shape == (0,)


def test_false_discoveries_stay_below_the_level() -> None:
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(200):
        p = np.concatenate([rng.uniform(size=90), rng.uniform(0, 1e-4, size=10)])
        found = benjamini_hochberg(p) <= 0.1
        shares.append(found[:90].sum() / max(1, found.sum()))
    assert np.mean(shares) < 0.12
