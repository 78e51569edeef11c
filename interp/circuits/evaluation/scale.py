"""The scale on which circuits are measured: 0 with every edge ablated, 1 for the whole model; and its intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.evaluator import Ablation, Evaluator
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn
from interp.model.model import Model
from interp.prompts.pairs import PromptPair

N_BOOT = 2000
Pairs = PromptPair | Iterable[PromptPair]
Index = np.ndarray  # examples drawn for a bootstrap sample


class Scale:
    """Circuits of one model on the same prompts, metric and recipe: m by example, f and its intervals.

    ``whole`` and ``empty`` [examples] are the metric on the model and with every edge ablated: what f is measured
    between. Raises InterpError where their means are equal, as for a circuit without any path from input to logits;
    ModelError for a circuit of another model.
    """

    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        circuit: Circuit,
        metric: Metric | MetricFn | str,
        using: Ablation,
        seed: int,
    ) -> None:
        circuit.check(model)
        circuit.connected()
        self.circuit = circuit
        self.evaluate = Evaluator(model, pairs, metric, using, seed)
        self.recipe: dict[str, Any] = self.evaluate.recipe
        self.whole = self.evaluate.whole
        self.empty = self.evaluate(np.zeros(circuit.graph.allowed.shape, dtype=bool))
        if not self.evaluate.has_gap(self.empty):
            raise InterpError(
                f"the metric is the same on the whole model and with every edge ablated ({self.whole.mean():.4g}, "
                f"{self.recipe['ablation']}): there is no difference that a circuit could explain"
            )

    def f(self, values: Float[np.ndarray, " examples"], index: Index | slice = slice(None)) -> float:
        """A ratio of means over examples."""
        empty = self.empty[index].mean()
        return float((values[index].mean() - empty) / (self.whole[index].mean() - empty))

    def interval(
        self, values: Float[np.ndarray, " examples"], minus: Float[np.ndarray, " examples"] | None = None
    ) -> tuple[float, float, float]:
        """f, or the difference of two, with its interval; of both, the same examples are drawn."""
        return with_interval(lambda i: self.f(values, i) - (0 if minus is None else self.f(minus, i)), len(self.whole))

    def mask(self) -> Bool[np.ndarray, "receivers senders"]:
        """The circuit's edges."""
        return self.circuit.mask()


def with_interval(statistic: Callable[[Any], float], n: int) -> tuple[float, float, float]:
    """A statistic of examples and its 95% percentile bootstrap interval; NaN with a single example."""
    value = float(statistic(slice(None)))
    if n < 2:
        return value, float("nan"), float("nan")
    generator = np.random.default_rng(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = [statistic(generator.integers(0, n, n)) for _ in range(N_BOOT)]
    lo, hi = np.nanquantile(drawn, (0.025, 0.975))
    return value, float(lo), float(hi)
