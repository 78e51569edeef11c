"""Bound on the number of sites with an effect that a screen missed.

It is computed from a random sample of the unverified sites. A screen ranks N sites by an estimate and leaves M of them
unverified. Draw m of those M uniformly, without replacement, and measure their exact effects. If D of the M have an
|effect| above τ, the number of those in the sample is hypergeometric, however good or bad the estimates are. So, if the
sample has x of them,

    D ≤ max{d : P(Hypergeometric(M, d, m) ≤ x) > 1 − confidence}

holds with probability ≥ confidence over the draw. This is Clopper and Pearson's argument on a finite population. It
requires that the sample is drawn independently of the effects, and that an effect is a fixed number: the exact mean
over the prompts that were run. It says nothing about other prompts, about sites that were not ranked, or about sites
that act only together.

The same bound with x = 0 also holds for τ = the largest |effect| in the sample, although the sample then chooses τ:
more than D sites lie above that maximum only if none of the D + 1 largest was drawn, and the bound keeps the
probability of that below 1 − confidence. The diagnostic of Kramár et al. 2024 (arXiv 2403.00745) also samples the
unverified sites, but it is a different one: its formula was not available, and no assumption of additive effects is
made here.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import numpy as np
from jaxtyping import Float

from interp.errors import InterpError


@dataclass(frozen=True)
class Missed:
    """A bound on the effects of unverified sites. ``str(missed)`` states it in words.

    Of ``population`` unverified sites, ``sampled`` were measured and ``found`` of these lie above ``threshold``. With
    the stated ``confidence``, at most ``at_most`` sites of the population lie above ``threshold`` (including those in
    the sample), and at most ``above_sample`` lie above ``largest``, the largest |effect| in the sample. Each of the two
    statements holds with that confidence on its own.
    """

    population: int
    sampled: int
    confidence: float
    largest: float
    above_sample: int
    threshold: float
    found: int
    at_most: int

    def __str__(self) -> str:
        if not self.population:
            return "every site was verified: nothing was passed over"
        return (
            f"of {self.population} sites passed over, {self.sampled} drawn at random were measured: with "
            f"{self.confidence:.0%} confidence at most {self.above_sample} have an |effect| above {self.largest:.4g} "
            f"(the largest drawn), and at most {self.at_most} one above {self.threshold:.4g} ({self.found} drawn)"
        )


def missed(
    effects: Float[np.ndarray, " sampled"], population: int, threshold: float, confidence: float = 0.95
) -> Missed:
    """Compute the bound from exact effects of a uniform sample of sites.

    ``population`` is the number of sites that the sample was drawn from. ``threshold`` is in the effects' unit and must
    be chosen without looking at the sample. Raises InterpError for impossible numbers.
    """
    size = np.abs(np.asarray(effects, dtype=float))
    if not 0 < confidence < 1 or not threshold >= 0:
        raise InterpError(f"confidence={confidence}, threshold={threshold}: expected between 0 and 1, and at least 0")
    if len(size) > population or (population > 0 and not len(size)) or np.isnan(size).any():
        raise InterpError(f"{len(size)} effects of {population} sites: expected a sample of at least 1, without NaN")
    largest, n_above = (float(size.max()), int((size > threshold).sum())) if len(size) else (0.0, 0)
    return Missed(
        population=population,
        sampled=len(size),
        confidence=confidence,
        largest=largest,
        above_sample=at_most(population, len(size), 0, confidence),
        threshold=float(threshold),
        found=n_above,
        at_most=at_most(population, len(size), n_above, confidence),
    )


def at_most(population: int, sampled: int, found: int, confidence: float = 0.95) -> int:
    """Upper confidence bound on the number of marked sites in a population.

    ``found`` sites of a sample are marked. That is max{d : P(Hypergeometric(population, d, sampled) ≤ found) > 1 −
    confidence}.
    """
    low, high = found, population - (sampled - found)  # bisection, since the probability falls with d
    while low < high:
        middle = (low + high + 1) // 2
        if _probability_at_most(population, middle, sampled, found) > 1 - confidence:
            low = middle
        else:
            high = middle - 1
    return low


def _probability_at_most(population: int, marked: int, sampled: int, found: int) -> float:
    """P(Hypergeometric(population, marked, sampled) ≤ found)."""
    first = max(0, sampled - (population - marked))
    samples = sum(
        comb(marked, x) * comb(population - marked, sampled - x) for x in range(first, min(found, marked) + 1)
    )
    return samples / comb(population, sampled)
