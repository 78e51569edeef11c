"""Evaluate the metric of many circuits on one set of prompts.

All circuits share one ablation recipe. The engine runs circuits (`interp.circuits.evaluation.packed_forward`) if it
supports the model's blocks. Otherwise each circuit takes one full forward
(`interp.circuits.evaluation.ablated_forward`), which is the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
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
    RecordedRun,
    record_circuit,
    rows_that_fit,
    run_circuits,
    slim,
)
from interp.circuits.inputs import TOKENS, Pairs, token_batches
from interp.circuits.wiring import Wiring, sender_hooks
from interp.engine import Engine
from interp.engine.core import CHECK_TOLERANCE, EngineKind
from interp.engine.verified import Verified
from interp.errors import InterpError
from interp.metrics import Metric, MetricFn, Readout, as_metric, rounding
from interp.model.layer_progress import by_layer
from interp.model.model import Model
from interp.model.prompt_provenance import prompt_provenance
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.pairs import encode_pairs, listed_prompts
from interp.recipes.donors import resample_donors, source_rows
from interp.recipes.inputs import check_metric, provenance_of
from interp.recipes.mean_activations import Means
from interp.recipes.scoring import readout
from interp.sites import COMPONENTS, Site, Sites
from interp.utils.arguments import check_seed
from interp.utils.progress import Advance, progress

RECIPES: dict[Ablation, str] = {
    "counterfactual": "edges outside the circuit carry the activation of the pair's corrupt run",
    "zero": "edges outside the circuit carry 0",
    "mean": "edges outside the circuit carry the activation's mean over all tokens of all clean prompts of the set",
    "resample": "edges outside the circuit carry the activation of another example's clean run, of the same length or "
    "the nearest, aligned at the last token",
}
STARTS = 4  # runs of a circuit that others continue may take this many times the memory of a forward
log = logging.getLogger("interp")


@dataclass(frozen=True)
class ExampleBatch:
    """Examples that run together: indices, readout, senders' ablated outputs.

    ``ablated``: by hook, [batch, position, …], or the same for all examples.
    """

    examples: list[int]
    read: Readout
    ablated: dict[str, Tensor]


@dataclass(frozen=True)
class PackedBatch:
    """Examples that the engine runs together: indices, readout, clean runs."""

    examples: list[int]
    read: Readout
    prompts: Prompts


@dataclass(frozen=True)
class Start:
    """The recorded runs of a circuit, which other circuits continue.

    ``mask``: its edges; ``recorded``: the run of each packed batch.
    """

    mask: Bool[np.ndarray, "receivers senders"]
    recorded: list[RecordedRun]


class Evaluator:
    """``evaluate(mask)`` is the metric of the circuit with the edges in the mask.

    It has one value per example, float64, for the clean prompts. ``whole`` is the metric of the model itself, and
    ``rounding`` is how far rounding of the logits can move it. ``engine="naive"`` runs one full forward for each
    circuit, as the reference. Raises InterpError, PromptError or ModelError for bad input.
    """

    @in_session
    def __init__(
        self,
        model: Model,
        pairs: Pairs,
        metric: Metric | MetricFn | str,
        using: Ablation,
        seed: int = 0,
        engine: EngineKind = "auto",
    ) -> None:
        if using not in RECIPES:
            raise InterpError(f"unknown ablation {using!r}: choose one of {', '.join(map(repr, RECIPES))}")
        check_seed(seed)
        pair_list = listed_prompts(pairs)
        self.model, self.metric, self.edited = model, as_metric(metric), model.instrument.edited
        self.prompts = encode_pairs(pair_list, model.coder)
        check_metric(self.metric, self.prompts, model)
        self.wiring = Wiring.checked(model, self.prompts[0].clean)
        self.graph = self.wiring.graph
        self.recipe = {
            **prompt_provenance(model, pair_list, self.prompts), "metric": self.metric.name, "using": using,
            "ablation": RECIPES[using], "ablation_seed": seed,
            "normalisation": "(m(C) − m(∅)) / (m(M) − m(∅)), ratio of means over examples", **provenance_of(pairs),
        }  # fmt: skip
        self.whole, self.rounding = np.zeros(len(self.prompts)), np.zeros(len(self.prompts))
        self.batches = self._run_whole_model(using, seed)
        # positions before the first difference of the prompts are the clean run's in any circuit
        starts = [min(p.first_difference, len(p) - 1) if using == "counterfactual" else 0 for p in self.prompts]
        self.packed = self._pack(starts, engine)
        if self.packed is not None:
            self.batches = []  # packed batches hold the ablated outputs

    @in_session
    def __call__(self, mask: Bool[np.ndarray, "receivers senders"]) -> Float[np.ndarray, " examples"]:
        """The metric by example of the circuit with the edges in ``mask``."""
        return self.many(mask[None])[0]

    def many(
        self, masks: Bool[np.ndarray, "circuits receivers senders"], since: Start | None = None
    ) -> Float[np.ndarray, "circuits examples"]:
        """The metric of several circuits.

        As many of them run in one forward as `TOKENS` allows. With ``since``, each circuit continues that circuit's
        runs from the first layer with a receiver whose edges differ.
        """
        if self.model.instrument.edited is not self.edited:
            raise InterpError(
                "these circuits' base runs were recorded under other attention edits: make the Evaluator, and call it, "
                "in the same `with model.edited(…)` block, or both outside"
            )
        with progress("circuits", len(masks) * len(self.prompts)) as advance:
            return self._check_values(self._values(masks, since, advance))

    def _values(
        self, masks: Bool[np.ndarray, "circuits receivers senders"], since: Start | None, advance: Advance
    ) -> Float[np.ndarray, "circuits examples"]:
        values, torch_masks = np.zeros((len(masks), len(self.prompts))), torch.from_numpy(masks)
        if self.packed is None:
            for i, mask in enumerate(torch_masks):
                for batch in self.batches:
                    with by_layer(self.model, advance, len(batch.examples)):
                        values[i, batch.examples] = self._metric(self._run_reference(batch, mask), batch.read)
            return values
        layers = np.zeros(len(masks), dtype=int) if since is None else self._first_layers(masks != since.mask)
        for number, batch in enumerate(self.packed):
            recorded = None if since is None else since.recorded[number]
            for layer in np.unique(layers).tolist():
                circuits = np.flatnonzero(layers == layer)
                step = max(1, rows_that_fit(self.wiring, layer, TOKENS) // sum(batch.prompts.lengths))
                for part in (circuits[i : i + step] for i in range(0, len(circuits), step)):
                    with by_layer(self.model, advance, len(part) * len(batch.examples)):
                        logits = run_circuits(self.wiring, batch.prompts, torch_masks[part], recorded, layer)
                    for i, circuit_logits in zip(part, logits, strict=True):
                        values[i, batch.examples] = self._metric(circuit_logits, batch.read)
        return values

    def start(self, mask: Bool[np.ndarray, "receivers senders"]) -> Start | None:
        """Record the runs of a circuit, for `many` to continue.

        None if the engine does not support the model, or if the runs take too much memory.
        """
        rows = sum(sum(batch.prompts.lengths) for batch in self.packed or ())
        if self.packed is None or rows > rows_that_fit(self.wiring, 0, rows, STARTS):
            return None
        torch_mask = torch.from_numpy(mask)
        return Start(mask.copy(), [record_circuit(self.wiring, b.prompts, torch_mask) for b in self.packed])

    def has_gap(self, first: float, second: float) -> bool:
        """Return whether two means of the metric over the examples differ by more than rounding.

        Rounding of the logits, and 1e-9 of the metric's own size: sums of many numbers in another order.
        """
        size = abs(first) + abs(second)
        return abs(first - second) > max(float(self.rounding.mean()), 1e-9 * size)

    @property
    def at_once(self) -> int:
        """Number of circuits in one forward, if they continue runs from late layers."""
        longest = max(sum(batch.prompts.lengths) for batch in self.packed) if self.packed else TOKENS
        return max(1, TOKENS // longest)

    # ------------------------------------------------------------ preparing both ways to run

    def _run_whole_model(self, using: Ablation, seed: int) -> list[ExampleBatch]:
        """Set the metric of the whole model, and return batches of one length.

        The batches have their ablated outputs.
        """
        names = sender_hooks(self.wiring)
        sources = [p.corrupt for p in self.prompts]
        if using == "resample":
            sources = resample_donors(self.prompts, [p.clean for p in self.prompts], True, seed)
        constants = _constants(self.model, self.prompts, names, using)
        batches = []
        for examples in token_batches(self.prompts):
            clean = capture(self.model, [self.prompts[i].clean for i in examples], [])["logits"]
            read = readout([self.prompts[i] for i in examples], list(clean))
            ablated = constants or self._senders_of(
                [sources[i] for i in examples], len(self.prompts[examples[0]]), names
            )
            batches.append(ExampleBatch(examples, read, ablated))
            self.whole[examples] = self._metric(clean, read)
            self.rounding[examples] = rounding(self.metric, clean, read, self.model.dtype).cpu().numpy()
        return batches

    def _senders_of(self, sources: Sequence[Sequence[int]], length: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Senders' outputs in other prompts' runs, in the rows of prompts of ``length`` tokens.

        Prompts of another length are aligned as `interp.ablate` does it.
        """
        if all(len(ids) == length for ids in sources):
            acts = capture(self.model, sources, names)
            return {name: acts[name] for name in names}
        runs = [(capture(self.model, [ids], names), source_rows(len(ids), 0, length, length)) for ids in sources]
        return {name: torch.cat([acts[name][:, rows.to(acts[name].device)] for acts, rows in runs]) for name in names}

    def _pack(self, starts: list[int], engine: EngineKind) -> list[PackedBatch] | None:
        """Prepare the examples for the engine, as many together as fit.

        None if the engine does not support them.
        """
        rows = [len(p) - start for p, start in zip(self.prompts, starts, strict=True)]
        fit = rows_that_fit(self.wiring, 0, max(TOKENS, *rows))
        if engine == "naive" or max(rows) > fit or Verified.of(self.model).packed_circuits is False:
            return None
        runner, packed = Engine(self.model, engine), []
        for examples in _fill(rows, min(TOKENS, fit)):
            runs = runner.record([self.prompts[i].clean for i in examples], keep_kv=True)
            if runner.unpackable():
                return None
            slimmed = [slim(run, starts[i]) for run, i in zip(runs, examples, strict=True)]
            read = readout([self.prompts[i] for i in examples], [run.logits for run in runs])
            ablated = self._ablated_rows(examples, starts)
            prompts = Prompts(slimmed, [starts[i] for i in examples], ablated, runner.frame)
            packed.append(PackedBatch(examples, read, prompts))
        return packed if self._agrees(packed[0]) else None

    def _ablated_rows(self, examples: list[int], starts: list[int]) -> dict[str, Tensor]:
        """Ablated outputs of senders in the rows of some examples from ``starts`` on."""
        home = {i: (batch, row) for batch in self.batches for row, i in enumerate(batch.examples)}
        names = self.batches[0].ablated
        if all(x.ndim < 3 for x in names.values()):
            return names
        return {n: torch.cat([home[i][0].ablated[n][home[i][1], starts[i] :] for i in examples]) for n in names}

    def _agrees(self, packed: PackedBatch) -> bool:
        """Whether a random circuit has the same logits both ways on the first example.

        This is checked once for each model.
        """
        is_edited = self.model.instrument.edited is not None  # what holds under some edits says nothing of others
        if Verified.of(self.model).packed_circuits and not is_edited:
            return True
        example = packed.examples[0]
        mask = torch.from_numpy(self.graph.allowed & (np.random.default_rng(0).random(self.graph.allowed.shape) < 0.9))
        batch = next(b for b in self.batches if example in b.examples)
        reference = self._run_reference(batch, mask)[batch.examples.index(example)]
        gap = (run_circuits(self.wiring, packed.prompts, mask[None])[0, 0] - reference).abs().max().item()
        if not gap <= CHECK_TOLERANCE * max(reference.abs().max().item(), 1.0):
            log.warning("circuits: one full forward each, because packed runs differ by %.1e on this model", gap)
            if not is_edited:
                Verified.of(self.model).packed_circuits = False
            return False
        if not is_edited:
            Verified.of(self.model).packed_circuits = True
        return True

    # ------------------------------------------------------------ details of a run

    def _run_reference(self, batch: ExampleBatch, mask: Tensor) -> Float[Tensor, "batch vocab"]:
        return run_circuit(self.wiring, [self.prompts[i].clean for i in batch.examples], mask, batch.ablated)

    def _first_layers(self, differs: Bool[np.ndarray, "circuits receivers senders"]) -> np.ndarray:
        """The first layer of each circuit with a receiver whose edges differ.

        It is n_layers if only the edges into the logits differ, or none.
        """
        last = self.graph.n_layers
        of_row = np.array([last if r == self.graph.output else r.layer for r in self.graph.receivers])
        return np.where(differs.any(2), of_row, last).min(1)

    def _metric(self, logits: Tensor, read: Readout) -> Float[np.ndarray, " examples"]:
        return self.metric(logits, read).double().cpu().numpy()

    def _check_values(self, values: np.ndarray) -> np.ndarray:
        """The values. Raises InterpError if any is NaN."""
        if np.isnan(values).any():
            raise InterpError(f"metric {self.metric.name!r} returned NaN for {int(np.isnan(values).sum())} examples")
        return values


def _fill(sizes: Sequence[int], most: int) -> Iterator[list[int]]:
    """Cut indices, in order, into batches whose sizes sum up to at most ``most``."""
    batch: list[int] = []
    for i, size in enumerate(sizes):
        if batch and sum(sizes[j] for j in batch) + size > most:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _constants(model: Model, prompts: Sequence[Encoded], names: Sequence[str], using: Ablation) -> dict[str, Tensor]:
    """Ablated outputs by hook name that are the same for every example.

    They are those of zero or mean ablation; empty for other ablations.
    """
    if using == "zero":
        return {name: torch.zeros((), device=model.device, dtype=model.dtype) for name in names}
    if using != "mean":
        return {}
    sites = [Site("resid_pre", 0), *model.sites("z")]
    sites += [Site("mlp_out", i) for i in range(model.n_layers) if f"blocks.{i}.hook_mlp_out" in names]
    means = Means(Engine(model, "naive"), [p.clean for p in prompts], Sites(sites), "mean")
    constants = {}
    for (component, layer), total in means.totals.items():
        mean = total[0] / means.count[0]
        constants[COMPONENTS[component].hook.format(layer=layer)] = mean.to(model.device, model.dtype)
    return constants
