"""The metric of many circuits on the same prompts under one recipe of ablation.

Circuits are run by the engine (`interp.circuits.evaluation.packed_forward`) where it can take a model's blocks, else
one full forward each (`interp.circuits.evaluation.ablated_forward`), which is the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.circuits.capture import capture
from interp.circuits.choices import Ablation
from interp.circuits.evaluation.ablated_forward import run_circuit
from interp.circuits.evaluation.packed_forward import (
    Prompts,
    Recorded,
    record_circuit,
    rows_that_fit,
    run_circuits,
    slim,
)
from interp.circuits.inputs import TOKENS, token_batches
from interp.circuits.wiring import Wiring, sender_hooks
from interp.engine import Engine
from interp.engine.core import CHECK_TOLERANCE, EngineKind
from interp.engine.verified import Verified
from interp.errors import InterpError, PromptError
from interp.metrics import Metric, MetricFn, Readout, as_metric, rounding
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PromptPair, encode_pairs, listed_prompts
from interp.recipes.inputs import check_metric, provenance_of
from interp.recipes.mean_activations import Means
from interp.recipes.scoring import readout
from interp.sites import COMPONENTS, Site, Sites
from interp.utils.arguments import check_whole
from interp.utils.provenance import now, prompt_hash

RECIPES: dict[Ablation, str] = {
    "counterfactual": "edges outside the circuit carry the activation of the pair's corrupt run",
    "zero": "edges outside the circuit carry 0",
    "mean": "edges outside the circuit carry the activation's mean over all tokens of all clean prompts of the set",
    "resample": "edges outside the circuit carry the activation of another example's clean run, of the same length",
}
STARTS = 4  # times what a forward may hold: what the runs of a circuit may, that others go on from
log = logging.getLogger("interp")


@dataclass(frozen=True)
class Batch:
    """Some examples that are run together: their numbers, what their metric reads, and what senders send."""

    numbers: list[int]
    read: Readout
    ablated: dict[str, Tensor]  # by hook [batch, position, …], or alike for all


@dataclass(frozen=True)
class Start:
    """A circuit's runs, which others go on from: its edges, and what each stretch of examples has come to."""

    kept: Bool[np.ndarray, "receivers senders"]
    recorded: list[Recorded]


class Evaluator:
    """``evaluate(mask)`` is the metric [examples], float64, of the clean prompts run with the edges in the mask.

    ``whole`` is that of the model itself; ``rounding`` is how far rounding of the logits can move it.
    ``engine="naive"``: one full forward for each circuit, the reference. Raises InterpError, PromptError or ModelError
    for bad input.
    """

    def __init__(
        self,
        model: Model,
        pairs: PromptPair | Iterable[PromptPair],
        metric: Metric | MetricFn | str,
        using: Ablation,
        seed: int = 0,
        engine: EngineKind = "auto",
    ) -> None:
        if using not in RECIPES:
            raise InterpError(f"unknown ablation {using!r}: choose one of {', '.join(map(repr, RECIPES))}")
        check_whole(0, seed=seed)
        listed = listed_prompts(pairs)
        self.model, self.metric = model, as_metric(metric)
        self.prompts = encode_pairs(listed, model.coder)
        check_metric(self.metric, self.prompts, model)
        self.wiring = Wiring(model)
        self.graph = self.wiring.graph
        self.wiring.check(self.prompts[0].clean)
        self.recipe = {
            **model.provenance(), "prompts": prompt_hash(listed), "n_prompts": len(listed), "created": now(),
            "metric": self.metric.name, "using": using, "ablation": RECIPES[using], "ablation_seed": seed,
            "normalisation": "(m(C) − m(∅)) / (m(M) − m(∅)), ratio of means over examples", **provenance_of(pairs),
        }  # fmt: skip
        sends = sender_hooks(self.wiring)
        donors = _donors(self.prompts, seed) if using == "resample" else [p.corrupt for p in self.prompts]
        fixed = _constants(model, self.prompts, sends, using)
        self.batches: list[Batch] = []
        self.whole, self.rounding = np.zeros(len(self.prompts)), np.zeros(len(self.prompts))
        for batch in token_batches(self.prompts):
            clean = capture(model, [self.prompts[i].clean for i in batch], [])["logits"]
            read = readout([self.prompts[i] for i in batch], list(clean))
            self.batches.append(Batch(batch, read, fixed or capture(model, [donors[i] for i in batch], sends)))
            self.whole[batch] = self.metric(clean, read).double().cpu().numpy()
            self.rounding[batch] = rounding(self.metric, clean, read, model.dtype).cpu().numpy()
        # rows before the first in which the prompts differ are the clean run's, whatever is ablated
        same = [min(p.first_difference, len(p) - 1) if using == "counterfactual" else 0 for p in self.prompts]
        self.packed = self._pack(same, engine)
        if self.packed is not None:
            self.batches = []  # what is sent is held once

    def has_gap(self, empty: Float[np.ndarray, " examples"]) -> bool:
        """Return whether the mean of ``whole`` differs from that of ``empty`` by more than rounding.

        ``empty``: the metric with every edge ablated.
        """
        return abs((self.whole - empty).mean()) > self.rounding.mean()

    def __call__(self, kept: Bool[np.ndarray, "receivers senders"]) -> Float[np.ndarray, " examples"]:
        """The metric by example."""
        return self.many(kept[None])[0]

    def many(
        self, kept: Bool[np.ndarray, "circuits receivers senders"], since: Start | None = None
    ) -> Float[np.ndarray, "circuits examples"]:
        """The same of several circuits, as many in one forward as `TOKENS` allow.

        ``since``: each circuit goes on from this one's runs, from the first layer with a receiver whose edges differ.
        """
        out, masks = np.zeros((len(kept), len(self.prompts))), torch.from_numpy(kept)
        if self.packed is None:
            for i, mask in enumerate(masks):
                for batch in self.batches:
                    out[i, batch.numbers] = self._metric(self._slowly(batch, mask), batch.read)
            return self._known(out)
        layers = np.zeros(len(kept), dtype=int) if since is None else self._layers(kept != since.kept)
        for number, (numbers, read, prompts) in enumerate(self.packed):
            recorded = None if since is None else since.recorded[number]
            for layer in np.unique(layers).tolist():
                some = np.flatnonzero(layers == layer)
                step = max(1, rows_that_fit(self.wiring, layer, TOKENS) // sum(prompts.lengths))
                for part in (some[i : i + step] for i in range(0, len(some), step)):
                    found = run_circuits(self.wiring, prompts, masks[part], recorded, layer)
                    for i, logits in zip(part, found, strict=True):
                        out[i, numbers] = self._metric(logits, read)
        return self._known(out)

    def start(self, kept: Bool[np.ndarray, "receivers senders"]) -> Start | None:
        """The runs of a circuit, for `many` to go on from; None where the engine cannot, or they are too large."""
        rows = sum(sum(prompts.lengths) for _, _, prompts in self.packed or ())
        if self.packed is None or rows > rows_that_fit(self.wiring, 0, rows, STARTS):
            return None
        return Start(kept.copy(), [record_circuit(self.wiring, p, torch.from_numpy(kept)) for _, _, p in self.packed])

    @property
    def at_once(self) -> int:
        """How many circuits a forward takes, of those that go on from late layers."""
        longest = max(sum(prompts.lengths) for _, _, prompts in self.packed) if self.packed else TOKENS
        return max(1, TOKENS // longest)

    # ------------------------------------------------------------ one way and the other

    def _pack(self, starts: list[int], engine: EngineKind) -> list[tuple[list[int], Readout, Prompts]] | None:
        """The examples, as many together as fit, ready for the engine; None where it cannot take them."""
        rows = [len(p) - start for p, start in zip(self.prompts, starts, strict=True)]
        fit = rows_that_fit(self.wiring, 0, max(TOKENS, *rows))
        if engine == "naive" or max(rows) > fit or Verified.of(self.model).packed_circuits is False:
            return None
        runner, found = Engine(self.model, engine), []
        for batch in _stretches(rows, min(TOKENS, fit)):
            runs = runner.record([self.prompts[i].clean for i in batch], keep_kv=True)
            if runner.unpackable():
                return None
            slimmed = [slim(run, starts[i]) for run, i in zip(runs, batch, strict=True)]
            read = readout([self.prompts[i] for i in batch], [run.logits for run in runs])
            ablated = self._ablated(batch, starts)
            found.append((batch, read, Prompts(slimmed, [starts[i] for i in batch], ablated, runner.frame)))
        return found if self._agrees(found[0]) else None

    def _ablated(self, numbers: list[int], starts: list[int]) -> dict[str, Tensor]:
        """What senders of some examples send along ablated edges, in the rows that can differ."""
        home = {i: (batch, row) for batch in self.batches for row, i in enumerate(batch.numbers)}
        names = self.batches[0].ablated
        if all(x.ndim < 3 for x in names.values()):
            return names
        return {n: torch.cat([home[i][0].ablated[n][home[i][1], starts[i] :] for i in numbers]) for n in names}

    def _agrees(self, packed: tuple[list[int], Readout, Prompts]) -> bool:
        """Whether a circuit drawn by lot runs alike both ways, on the first example: tried once for each model."""
        if Verified.of(self.model).packed_circuits:
            return True
        numbers, _, prompts = packed
        kept = torch.from_numpy(self.graph.allowed & (np.random.default_rng(0).random(self.graph.allowed.shape) < 0.9))
        batch = next(b for b in self.batches if numbers[0] in b.numbers)
        slow = self._slowly(batch, kept)[batch.numbers.index(numbers[0])]
        gap = (run_circuits(self.wiring, prompts, kept[None])[0, 0] - slow).abs().max().item()
        if not gap <= CHECK_TOLERANCE * max(slow.abs().max().item(), 1.0):
            log.warning("circuits: one full forward each, because packed ones differ by %.1e on this model", gap)
            Verified.of(self.model).packed_circuits = False
            return False
        Verified.of(self.model).packed_circuits = True
        return True

    def _slowly(self, batch: Batch, kept: Tensor) -> Float[Tensor, "batch vocab"]:
        return run_circuit(self.wiring, [self.prompts[i].clean for i in batch.numbers], kept, batch.ablated)

    def _layers(self, differs: Bool[np.ndarray, "circuits receivers senders"]) -> np.ndarray:
        """The first layer of each circuit with a receiver whose edges differ; n_layers: that of the logits, if any."""
        last = self.graph.n_layers
        of_row = np.array([last if r == self.graph.output else r.layer for r in self.graph.receivers])
        return np.where(differs.any(2), of_row, last).min(1)

    def _metric(self, logits: Tensor, read: Readout) -> Float[np.ndarray, " examples"]:
        return self.metric(logits, read).double().cpu().numpy()

    def _known(self, values: np.ndarray) -> np.ndarray:
        if np.isnan(values).any():
            raise InterpError(f"metric {self.metric.name!r} returned NaN for {int(np.isnan(values).sum())} examples")
        return values


def _stretches(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers, in order, of which as many are taken together as sum up to ``most``."""
    batch: list[int] = []
    for i, size in enumerate(sizes):
        if batch and sum(sizes[j] for j in batch) + size > most:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _constants(model: Model, prompts: Sequence[Encoded], sends: Sequence[str], using: Ablation) -> dict[str, Tensor]:
    """What zero or mean ablation sends, by hook name: the same for every example."""
    if using == "zero":
        return {name: torch.zeros((), device=model.device, dtype=model.dtype) for name in sends}
    if using != "mean":
        return {}
    sites = [Site("resid_pre", 0), *model.sites("z")]
    sites += [Site("mlp_out", i) for i in range(model.n_layers) if f"blocks.{i}.hook_mlp_out" in sends]
    means = Means(Engine(model, "naive"), [p.clean for p in prompts], Sites(sites), "mean")
    found = {}
    for (component, layer), total in means.totals.items():
        mean = total[0] / means.count[0]
        found[COMPONENTS[component].hook.format(layer=layer)] = mean.to(model.device, model.dtype)
    return found


def _donors(prompts: Sequence[Encoded], seed: int) -> list[tuple[int, ...]]:
    """For each example another one's clean prompt of the same length, each used once."""
    generator = np.random.default_rng(seed)
    donors: list[tuple[int, ...]] = [p.clean for p in prompts]
    lengths: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(i)
    for length, members in lengths.items():
        if len(members) < 2:
            raise PromptError(
                f"using='resample': only one prompt has {length} tokens (pair {members[0]}), so that there is no other "
                "to draw from: give more pairs of that length, or another ablation"
            )
        order = generator.permutation(members).tolist()
        for here, there in zip(order, order[1:] + order[:1], strict=True):
            donors[here] = prompts[there].clean
    return donors
