"""Interchange interventions: is a variable of a causal model to be found at a place, by a linear map, and is that news?

At one site the base run takes, in some coordinates of a learned map φ, what the source run has there: h =
φ⁻¹(φ(source) in the variable's coordinates, φ(base) in the others). If the model then answers as the causal model does
with the variable taken from the source, the variable can be read and written there. Interchange intervention accuracy
(IIA) is the share of pairs in which it does. φ is a rotation (DAS: Geiger et al. 2024; TransformerLens' `fit_das`), or
a RevNet.

Why one number is not enough (Sutter et al. 2025, The Non-Linear Representation Dilemma, arXiv 2507.08802): with maps
that are free enough, almost any network maps onto almost any algorithm; RevNets reach 100% IIA on IOI in models that
were never trained. So `interchange_accuracy` fits four times: the linear and the non-linear map, each on the model and
on the same architecture with random weights, and shows IIA on the training pairs and on held-out ones in one table,
with intervals:

* linear high on the model, low on random weights, on held-out pairs: evidence that training made the variable linear;
* non-linear high on random weights too: the non-linear result on the model is no evidence about the model, however
  high;
* linear high on random weights: the site, the rank or the pairs give the answer away (inputs that are still legible,
  say): no evidence either;
* high on training pairs and low on held-out ones: the map has learned the pairs by heart.

Random weights: every matrix drawn anew from a normal distribution with its own mean and standard deviation; vectors
(norms, biases) stay. (The paper takes the model's first checkpoint; a normal with these moments needs none.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from interp.circuits.fitting import require_finite, shuffled_batches, without_weight_gradients
from interp.circuits.interchange.bijections import Exchange, RevNet
from interp.errors import InterpError, ModelError, PromptError, SiteError
from interp.model import transformer_lens_tools as tl
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PromptPair, encode_pairs, listed_prompts
from interp.recipes.inputs import provenance_of
from interp.sites import COMPONENTS, Site
from interp.utils.arguments import check_positive, check_seed, check_whole
from interp.utils.progress import Advance, progress
from interp.utils.provenance import now, prompt_hash

Map = Literal["linear", "non-linear"]
WIDE = ("resid_pre", "resid_post", "attn_out", "mlp_out")  # components whose activation is [batch, position, d_model]


@dataclass(frozen=True)
class Interchange:
    """The table of `interchange_accuracy`, and what made it."""

    table: pd.DataFrame
    provenance: dict[str, Any]

    def frame(self) -> pd.DataFrame:
        """One row per weights ("model", "random"), map and split.

        ``iia``, ``lo`` and ``hi`` (95%, Wilson), ``n`` pairs, ``chance`` (one over the number of classes) and
        ``without`` (the share right with no intervention).
        """
        return self.table.copy()

    def iia(self, weights: str, map: Map, split: str = "test") -> float:
        """One number of the table."""
        t: Any = self.table
        row = t[(t["weights"] == weights) & (t["map"] == map) & (t["split"] == split)]
        if row.empty:
            raise InterpError(f"no row for weights={weights!r}, map={map!r}, split={split!r}")
        return float(row["iia"].iloc[0])

    def verdict(self) -> str:
        """What the held-out numbers allow to be said, by whether intervals of model and random weights overlap."""
        test: Any = self.table[self.table["split"] == "test"].set_index(["weights", "map"])
        above = {m: test.loc[("model", m), "lo"] > test.loc[("random", m), "hi"] for m in ("linear", "non-linear")}
        linear = (
            "the linear map does better on the model than on random weights: evidence of a linear variable here"
            if above["linear"]
            else "the linear map does no better on the model than on random weights: no evidence of a variable here"
        )
        other = (
            "the non-linear map too"
            if above["non-linear"]
            else "the non-linear map does as well on random weights, so that its number says nothing about the model"
        )
        return f"{linear}; {other}"


def interchange_accuracy(
    model: Model,
    train: PromptPair | Iterable[PromptPair],
    test: PromptPair | Iterable[PromptPair],
    site: Site | str,
    *,
    rank: int = 1,
    steps: int = 200,
    batch_size: int = 64,
    lr: float = 1e-2,
    nonlinear_lr: float = 5e-4,
    blocks: int = 4,
    hidden: int = 64,
    seed: int = 0,
    show_progress: bool | None = None,
) -> Interchange:
    """IIA of a linear and a non-linear map, on the model and on random weights, on training and on held-out pairs.

    Every pair with a foil is taken both ways: base = corrupt prompt and source = clean, whose answer is to be given;
    base = clean and source = corrupt, whose foil is. ``site``: resid_pre, resid_post, attn_out or mlp_out of a layer,
    at a position (negative ones count from the end), like "resid_post.L3@-1". ``rank``: coordinates of the variable,
    the same for both maps (the paper takes half of them). ``steps`` of Adam, of ``batch_size`` base–source pairs;
    TransformerLens' step for the linear map and the paper's for the RevNet (of ``blocks`` couplings, ``hidden`` wide).
    An answer is the largest logit among all answers and foils. Raises InterpError, PromptError, SiteError or
    ModelError for bad input.
    """
    place = Site.parse(site) if isinstance(site, str) else site
    counts = {"steps": steps, "batch_size": batch_size, "blocks": blocks, "hidden": hidden}
    _check(model, place, rank, counts, {"lr": lr, "nonlinear_lr": nonlinear_lr})
    check_seed(seed)
    splits = {name: listed_prompts(pairs) for name, pairs in (("train", train), ("test", test))}
    encoded = {name: encode_pairs(pairs, model.coder) for name, pairs in splits.items()}
    classes = sorted({t for ps in encoded.values() for p in ps for t in _both(p, "train or test")})
    data = {name: _Cases(model, prompts, place, classes) for name, prompts in encoded.items()}
    job = _Job(model, place, data, rank, batch_size, seed)
    rows: list[dict[str, Any]] = []
    with progress("interchange", 4 * steps, show_progress) as advance:
        for weights in ("model", "random"):
            with random_weights(model, seed) if weights == "random" else _as_it_is():
                rows += job.rows(weights, "linear", job.linear(steps, lr, advance))
                rows += job.rows(weights, "non-linear", job.nonlinear(steps, nonlinear_lr, blocks, hidden, advance))
    made = {
        **model.provenance(), "prompts": prompt_hash([*splits["train"], *splits["test"]]), "created": now(),
        "method": "interchange interventions", "site": str(place), "rank": rank, "steps": steps, "lr": lr,
        "nonlinear_lr": nonlinear_lr, "batch_size": batch_size, "blocks": blocks, "hidden": hidden, "seed": seed,
        "random_weights": "matrices redrawn, normal with their own mean and deviation", **provenance_of(train),
    }  # fmt: skip
    return Interchange(pd.DataFrame(rows), made)


class _Cases:
    """Base–source pairs both ways, as tensors of one length each."""

    def __init__(self, model: Model, prompts: Sequence[Encoded], place: Site, classes: Sequence[int]):
        lengths = {len(p) for p in prompts}
        if len(lengths) > 1:
            raise PromptError(f"prompts of one length are needed, and these have {sorted(lengths)} tokens")
        (length,) = lengths
        position = place.position
        assert isinstance(position, int)
        if not -length <= position < length:
            raise SiteError(f"{place}: the prompts have {length} tokens")
        clean, corrupt = ([list(getattr(p, run)) for p in prompts] for run in ("clean", "corrupt"))
        self.base = torch.tensor(corrupt + clean, device=model.device)
        self.source = torch.tensor(clean + corrupt, device=model.device)
        wanted = [t for which in (0, 1) for t in (_both(p, "the set")[which] for p in prompts)]
        self.targets = torch.tensor([classes.index(t) for t in wanted])
        self.positions = torch.full((len(wanted),), position % length)
        self.classes = torch.tensor(classes, device=model.device)


class _Job:
    def __init__(self, model: Model, place: Site, data: dict[str, _Cases], rank: int, batch_size: int, seed: int):
        self.model, self.data, self.rank, self.batch_size, self.seed = model, data, rank, batch_size, seed
        self.hook = COMPONENTS[place.component].hook.format(layer=place.layer)

    def logits(self, inputs: Tensor) -> Tensor:
        """Of the classes alone, after the last token."""
        return self.model.last_logits(inputs)[:, self.data["train"].classes].float()

    def linear(self, steps: int, lr: float, advance: Advance) -> Any:
        """DAS by TransformerLens. (It counts epochs: as many as hold the steps.)"""
        cases = self.data["train"]
        epochs = max(1, round(steps * min(self.batch_size, len(cases.base)) / len(cases.base)))
        done = tl.fit_das(
            self.model.bridge, self.hook, cases.base, cases.source, cases.targets, self.logits, rank=self.rank,
            base_positions=cases.positions, source_positions=cases.positions, epochs=epochs,
            batch_size=self.batch_size, lr=lr, seed=self.seed,
        )  # fmt: skip
        require_finite(
            torch.tensor(done.losses[-1]), "the loss of the linear map", "its fit diverged; take a smaller lr"
        )
        advance(steps)
        return tl.SubspaceInterchange(done.basis)

    def nonlinear(self, steps: int, lr: float, blocks: int, hidden: int, advance: Advance) -> Exchange:
        """A RevNet fitted to the same targets."""
        cases, there = self.data["train"], self._sources("train")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            bijection = RevNet(there.shape[1], blocks, hidden, scale=float(there.float().std()) or 1.0)
        exchange = Exchange(bijection, self.rank).to(self.model.device, self.model.dtype)
        optimizer = torch.optim.Adam(exchange.parameters(), lr=lr)
        with torch.enable_grad(), without_weight_gradients(self.model):
            for batch in shuffled_batches(len(cases.base), self.batch_size, steps, self.seed):
                logits = tl.run_with_intervention(
                    self.model.bridge, self.hook, exchange, cases.base[batch], there[batch], self.logits,
                    positions=cases.positions[batch],
                )  # fmt: skip
                loss = F.cross_entropy(logits, cases.targets[batch].to(logits.device))
                require_finite(loss, "the loss of the non-linear map", "its fit diverged; take a smaller nonlinear_lr")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance(1)
        return exchange.eval()

    def _sources(self, split: str) -> Tensor:
        cases = self.data[split]
        return tl.collect_activations(
            self.model.bridge, self.hook, cases.source, self.logits, positions=cases.positions,
            batch_size=self.batch_size,
        )  # fmt: skip

    @torch.no_grad()
    def rows(self, weights: str, kind: Map, intervention: Any) -> list[dict[str, Any]]:
        """Accuracy on both splits, with intervals."""
        out = []
        for split, cases in self.data.items():
            logits = tl.intervened_logits(
                self.model.bridge, self.hook, intervention, cases.base, self._sources(split), self.logits,
                positions=cases.positions, batch_size=self.batch_size,
            )  # fmt: skip
            plain = [self.logits(part).cpu() for part in cases.base.split(self.batch_size)]
            right = int((logits.argmax(-1) == cases.targets).sum())
            before = float((torch.cat(plain).argmax(-1) == cases.targets).double().mean())
            lo, hi = wilson(right, len(cases.base))
            out.append({
                "weights": weights, "map": kind, "split": split, "iia": right / len(cases.base), "lo": lo, "hi": hi,
                "n": len(cases.base), "chance": 1 / len(cases.classes), "without": before,
            })  # fmt: skip
        return out


@contextmanager
def random_weights(model: Model, seed: int = 0) -> Iterator[None]:
    """Inside, the model has random weights: every matrix drawn from a normal with its own mean and deviation.

    Vectors stay as they are. Afterwards all is as before. Holds a second copy of the weights meanwhile.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.bridge.original_model.parameters() if p.ndim >= 2]
    kept = [p.detach().clone() for p in matrices]
    try:
        with torch.no_grad():
            for p in matrices:
                drawn = torch.randn(p.shape, generator=generator).to(p)
                p.copy_(drawn * p.std() + p.mean())
        yield
    finally:
        with torch.no_grad():
            for p, before in zip(matrices, kept, strict=True):
                p.copy_(before)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion."""
    p, half = right / n, z * np.sqrt(right / n * (1 - right / n) / n + z**2 / (4 * n**2))
    middle, size = p + z**2 / (2 * n), 1 + z**2 / n
    return float((middle - half) / size), float((middle + half) / size)


def _both(prompt: Encoded, where: str) -> tuple[int, int]:
    """Answer and foil. PromptError without a foil."""
    if prompt.foil is None:
        raise PromptError(f"every pair of {where} needs a foil: what the causal model says with the variable exchanged")
    return prompt.answer, prompt.foil


def _check(model: Model, place: Site, rank: int, counts: dict[str, int], steps_of: dict[str, float]) -> None:
    if model.reads != "text" or model.stacks:
        raise ModelError(f"{model.name}: interchange interventions are defined for models of one stack that read text")
    if place.component not in WIDE or place.layer is None or not isinstance(place.position, int):
        raise SiteError(f"{place}: {', '.join(WIDE)} of a layer at a position is expected, like resid_post.L3@-1")
    hook = COMPONENTS[place.component].hook.format(layer=place.layer)
    if place.layer >= model.n_layers or hook not in model.bridge.hook_dict:
        raise SiteError(f"{place}: {model.name} has no such site")
    check_whole(1, model.d_model - 1, rank=rank)  # all coordinates would exchange the whole site
    check_whole(1, **counts)
    check_positive(**steps_of)
