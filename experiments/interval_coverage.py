"""How often 95% intervals of means hold the true mean, by number of examples and distribution.

For every distribution and n, draws of n values are simulated; the coverage is the share of draws whose interval holds
the true mean. Compared: the interval of all tables (`interp.results.significance.mean_interval`), the percentile
bootstrap, and Student's t. ``width`` is the median width over that of mean ± 1.96 standard errors. ``ratio``: a ratio
of means, raw change over gap, with gaps from a gamma distribution (shape 4).

    python experiments/interval_coverage.py                 # writes experiments/results/interval_coverage.json
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from interp.results.significance import mean_interval, resample_weights, t_quantile
from interp.utils.provenance import now, versions

DRAWS, N_BOOT = 4000, 2000
SIZES = (2, 4, 6, 8, 12, 16, 32, 64)
TRUTH = {"normal": 0.3, "exponential": 1.0, "lognormal": float(np.exp(0.5)), "ratio": 0.3}
RESULTS = Path(__file__).parent / "results" / "interval_coverage.json"


def draw(name: str, n: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Values [draws, n], and for a ratio its denominators."""
    rng, shape = np.random.default_rng([n, len(name)]), (DRAWS, n)
    if name == "ratio":
        gap = rng.gamma(4, 1, shape)
        return TRUTH[name] * gap + rng.normal(size=shape), gap
    drawn = {"normal": lambda: rng.normal(TRUTH[name], 1, shape), "exponential": lambda: rng.exponential(1, shape),
             "lognormal": lambda: rng.lognormal(size=shape)}  # fmt: skip
    return drawn[name](), None


def intervals(values: np.ndarray, gap: np.ndarray | None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Ends of the 95% intervals by method."""
    n = values.shape[1]
    _, lo, hi = mean_interval(values, gap, n_boot=N_BOOT)
    over = np.ones_like(values) if gap is None else gap
    weights = resample_weights(n, N_BOOT)
    percentile = np.quantile((values @ weights.T) / (over @ weights.T), [0.025, 0.975], axis=1)
    point = values.sum(1) / over.sum(1)
    error = np.sqrt(((values - point[:, None] * over) ** 2).sum(1) * n / (n - 1)) / over.sum(1)
    half = t_quantile(0.975, n - 1) * error
    return {"tables": (lo, hi), "percentile": tuple(percentile), "student": (point - half, point + half),
            "1.96 standard errors": (point - 1.96 * error, point + 1.96 * error)}  # fmt: skip


def main() -> None:
    """Simulate, print and write the table."""
    rows = []
    for name, truth in TRUTH.items():
        for n in SIZES:
            ends = intervals(*draw(name, n))
            base = np.median(ends["1.96 standard errors"][1] - ends["1.96 standard errors"][0])
            for method, (lo, hi) in ends.items():
                covered = round(float(((lo <= truth) & (truth <= hi)).mean()), 4)
                width = round(float(np.median(hi - lo) / base), 3)
                rows.append({"distribution": name, "n": n, "method": method, "coverage": covered, "width": width})
            print(name, n, {r["method"]: r["coverage"] for r in rows[-len(ends) :]}, flush=True)
    document = {"created": now(), "versions": versions(), "draws": DRAWS, "n_boot": N_BOOT, "rows": rows}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
