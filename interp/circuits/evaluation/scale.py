"""The faithfulness scale of circuits, with intervals over examples.

It is 0 with every edge ablated and 1 for the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from interp.circuits.choices import Ablation
from interp.circuits.circuit import Circuit
from interp.circuits.evaluation.evaluator import Evaluator
from interp.circuits.inputs import Pairs
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn
from interp.model.model import Model
from interp.results.significance import mean_interval


class Scale:
    """The faithfulness scale for one model, set of prompts, metric and ablation.

    It measures m by example, f, and f's intervals, for any circuit of the model. ``whole`` and ``empty`` [examples] are
    the metric of the model and with every edge ablated, the two ends of the scale. Raises InterpError if their means
    are equal, or for a circuit without any path from the input to the logits, and ModelError for a circuit of another
    model.
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
        if not self.evaluate.has_gap(self.whole.mean(), self.empty.mean()):
            raise InterpError(
                f"the metric is the same on the whole model and with every edge ablated ({self.whole.mean():.4g}, "
                f"{self.recipe['ablation']}): there is no difference that a circuit could explain"
            )

    def f(self, values: Float[np.ndarray, " examples"]) -> float:
        """f, a ratio of means over examples."""
        return float(position_on_scale(values.mean(), self.whole.mean(), self.empty.mean()))

    def interval(
        self, values: Float[np.ndarray, " examples"], minus: Float[np.ndarray, " examples"] | None = None
    ) -> tuple[float, float, float]:
        """f of ``values``, or its difference to f of ``minus``, with an interval.

        The difference is paired: it is taken example by example.
        """
        return ratio_interval(values - (self.empty if minus is None else minus), self.whole - self.empty)

    def mask(self) -> Bool[np.ndarray, "receivers senders"]:
        """The circuit's edges."""
        return self.circuit.mask()


def recipe_text(recipe: Mapping[str, Any], n: int) -> str:
    """Describe in words how a faithfulness was measured: metric, what edges outside carry, number of prompts."""
    metric, ablation = recipe.get("metric", "?"), recipe.get("ablation", recipe.get("using", "?"))
    return f"{metric}; {ablation}; {n} prompt(s)"


def position_on_scale(value: Any, whole: Any, empty: Any) -> Any:
    """(m(C) − m(∅)) / (m(M) − m(∅)), of means of the metric over examples."""
    return (value - empty) / (whole - empty)


def ratio_interval(
    values: Float[np.ndarray, " examples"], over: Float[np.ndarray, " examples"]
) -> tuple[float, float, float]:
    """A ratio of means over examples with its 95% interval, which is NaN for a single example.

    The interval is that of all tables (`interp.results.significance.mean_interval`).
    """
    value, lo, hi = mean_interval(values[None], over[None])
    return float(value[0]), float(lo[0]), float(hi[0])
