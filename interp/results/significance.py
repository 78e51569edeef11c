"""Bootstrap intervals, sign-flip permutation tests, and false discovery rates."""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import Float, Int

EXACT_UP_TO = 12  # examples: all 2^12 sign patterns are tried


def resample_weights(n: int, n_boot: int, seed: int = 0) -> Float[np.ndarray, "draws examples"]:
    """Return how often each of ``n`` examples occurs in each of ``n_boot`` bootstrap samples."""
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot)
    return draws.astype(float)


def resample_examples(n: int, n_boot: int, seed: int = 0) -> Int[np.ndarray, "draws examples"]:
    """Return the numbers of the examples in each of ``n_boot`` bootstrap samples of ``n``."""
    return np.random.default_rng(seed).integers(n, size=(n_boot, n))


def percentile_interval(
    draws: Float[np.ndarray, "*groups draws"], tail: float = 0.025
) -> tuple[Float[np.ndarray, "*groups"], Float[np.ndarray, "*groups"]]:
    """Return the percentile bootstrap interval of statistics.

    The last axis has one statistic per bootstrap sample.

    ``tail``: the share of draws outside at either end; 0.025 gives 95% intervals. NaN draws are ignored; where all are
    NaN, so is the interval (without a warning).
    """
    empty = np.isnan(draws).all(-1)
    safe = np.where(np.expand_dims(empty, -1), 0.0, draws)
    lo, hi = np.nanquantile(safe, [tail, 1 - tail], axis=-1)
    return np.where(empty, np.nan, lo), np.where(empty, np.nan, hi)


def sign_flip(
    values: Float[np.ndarray, "groups examples"], n_perm: int = 10_000, seed: int = 0
) -> Float[np.ndarray, " groups"]:
    """Return two-sided p-values of a permutation test that the mean of each row is zero.

    Under the null hypothesis the sign of each value is random. This null is exact for paired differences that are
    exchangeable (Fisher 1935; one-sample permutation test). With up to `EXACT_UP_TO` values per row all sign patterns
    are counted; with more, ``n_perm`` patterns are drawn by ``seed`` and p = (1 + hits) / (1 + n_perm), so that p is
    never 0 (Phipson & Smyth 2010). NaN values are left out; a row of NaN only gives NaN. The smallest p that n values
    can give is 2^(1 − n).
    """
    values = np.asarray(values, dtype=float)
    finite = np.isfinite(values)
    x = np.where(finite, values, 0.0)
    n = values.shape[1]
    exact = n <= EXACT_UP_TO
    if exact:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n))).reshape(-1, n)
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(n_perm, n))
    observed = np.abs(x.sum(1))
    slack = 1e-12 * np.abs(x).sum(1)  # rounding of the same sum in another order
    hits = np.zeros(len(x))
    for part in np.array_split(signs, max(1, len(signs) // 1000)):
        hits += (np.abs(x @ part.T) >= (observed - slack)[:, None]).sum(1)
    p = hits / len(signs) if exact else (1 + hits) / (1 + len(signs))
    return np.where(finite.any(1), p, np.nan)


def benjamini_hochberg(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Return q-values, which control the false discovery rate.

    Rejecting all tests with q ≤ α keeps the expected share of false discoveries at most α.

    Benjamini & Hochberg 1995: q of the i-th smallest of m p-values = min over j ≥ i of p_(j) m / j. Valid for
    independent or positively dependent tests. NaN stays NaN and does not count as a test.
    """
    p = np.asarray(p, dtype=float)
    q = np.full_like(p, np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    scaled = p[order] * len(order) / np.arange(1, len(order) + 1)
    q[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return q
