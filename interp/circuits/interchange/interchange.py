"""Interchange interventions: test whether a site holds a causal variable.

The test includes the controls that it needs. At one site, some coordinates of a learned map φ in the base run are
replaced by those of the source run: h = φ⁻¹(φ(source) in the variable's coordinates, φ(base) in the others). If the
model then answers as the causal model does with the variable from the source, the variable can be read and written at
this site. Interchange intervention accuracy (IIA) is the share of pairs in which the model answers so. φ is a rotation
(DAS: Geiger et al. 2024; TransformerLens' `fit_das`), or a RevNet.

One number is not enough (Sutter et al. 2025, The Non-Linear Representation Dilemma, arXiv 2507.08802): with
sufficiently flexible maps, almost any network maps onto almost any algorithm. RevNets reach 100% IIA on IOI in models
that were never trained. So `interchange_accuracy` fits four times: the linear and the non-linear map, each on the model
and on the same architecture with random weights. One table has the IIA on training pairs and on held-out pairs, with
intervals. It can be read as follows:

* Linear high on the model and low on random weights, on held-out pairs: evidence that training made the variable
  linear.
* Non-linear high on random weights too: the non-linear result on the model is no evidence about the model, however high
  it is.
* Linear high on random weights: the site, the rank or the pairs reveal the answer (for example, if inputs are still
  readable there). This is no evidence either.
* High on training pairs and low on held-out pairs: the map has memorised the pairs.

Random weights: every matrix is drawn from a normal distribution with its own mean and standard deviation; vectors
(norms, biases) stay. (The paper uses the model's first checkpoint; a normal with these moments needs none.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from interp.circuits.choices import Map
from interp.circuits.fitting import require_finite, shuffled_batches, without_weight_gradients
from interp.circuits.inputs import Pairs
from interp.circuits.interchange.bijections import Exchange, RevNet
from interp.errors import InterpError, ModelError, PromptError, SiteError
from interp.model import transformer_lens_tools as tl
from interp.model.model import Model
from interp.model.prompt_provenance import prompt_provenance
from interp.model.session import in_session
from interp.prompts.coder import Encoded
from interp.prompts.embeddings import refuse_vectors
from interp.prompts.pairs import encode_pairs, listed_prompts
from interp.recipes.inputs import provenance_of
from interp.results.significance import share_interval
from interp.sites import COMPONENTS, Site
from interp.utils.arguments import check_positive, check_seed, check_whole
from interp.utils.progress import Advance, progress

WIDE = ("resid_pre", "resid_post", "attn_out", "mlp_out")  # components whose activation is [batch, position, d_model]


@dataclass(frozen=True)
class Interchange:
    """The table of `interchange_accuracy`, with provenance."""

    table: pd.DataFrame
    provenance: dict[str, Any] = field(repr=False)

    def frame(self) -> pd.DataFrame:
        """Table with one row per weights ("model", "random"), map and split.

        Columns: ``iia``, over both directions of every pair; ``lo`` and ``hi``, Wilson's 95% interval over pairs (the
        two directions of a pair go together, so they count as one unit); ``n`` pairs; ``chance`` (one over the number
        of classes); ``without`` (the accuracy with no intervention).
        """
        return self.table.copy()

    def iia(self, weights: str, map: Map, split: str = "test") -> float:
        """The IIA of one row of the table."""
        t: Any = self.table
        row = t[(t["weights"] == weights) & (t["map"] == map) & (t["split"] == split)]
        if row.empty:
            raise InterpError(f"no row for weights={weights!r}, map={map!r}, split={split!r}")
        return float(row["iia"].iloc[0])

    def verdict(self) -> str:
        """The conclusion that the held-out numbers support.

        It depends on whether the intervals of model and random weights overlap.
        """
        test: Any = self.table[self.table["split"] == "test"].set_index(["weights", "map"])
        is_above = {m: test.loc[("model", m), "lo"] > test.loc[("random", m), "hi"] for m in get_args(Map)}
        linear = (
            "the linear map does better on the model than on random weights: evidence of a linear variable here"
            if is_above["linear"]
            else "the linear map does no better on the model than on random weights: no evidence of a variable here"
        )
        nonlinear = (
            "the non-linear map too"
            if is_above["non-linear"]
            else "the non-linear map does as well on random weights, so that its number says nothing about the model"
        )
        return f"{linear}; {nonlinear}"


@in_session
def interchange_accuracy(
    model: Model,
    train: Pairs,
    test: Pairs,
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
    """Measure interchange accuracy (IIA) of a linear and a non-linear map.

    Both are fitted on the model and on random weights, and tested on held-out pairs. Every pair is used in both
    directions, and needs a foil: with base = corrupt prompt and source = clean prompt, the expected prediction is the
    answer; with base = clean and source = corrupt, it is the foil. ``site``: resid_pre, resid_post, attn_out or mlp_out
    of a layer, at a position (negative positions count from the end), like "resid_post.L3@-1". ``rank``: number of
    coordinates of the variable, the same for both maps (the paper uses half of them). ``steps`` of Adam, with
    ``batch_size`` base–source pairs each. ``lr`` is TransformerLens' step for the linear map, and ``nonlinear_lr`` the
    paper's for the RevNet (of ``blocks`` couplings with ``hidden`` units). The model's prediction is the largest logit
    among all answers and foils. Raises InterpError, PromptError, SiteError or ModelError for bad input.
    """
    site = Site.parse(site) if isinstance(site, str) else site
    counts = {"steps": steps, "batch_size": batch_size, "blocks": blocks, "hidden": hidden}
    _check(model, site, rank, counts, {"lr": lr, "nonlinear_lr": nonlinear_lr})
    check_seed(seed)
    splits = {name: listed_prompts(pairs) for name, pairs in (("train", train), ("test", test))}
    encoded = {name: encode_pairs(pairs, model.coder) for name, pairs in splits.items()}
    classes = sorted({t for ps in encoded.values() for p in ps for t in _answer_and_foil(p, "train or test")})
    data = {name: _Cases(model, prompts, site, classes) for name, prompts in encoded.items()}
    fits = _MapFits(model, site, data, rank, batch_size, seed)
    rows: list[dict[str, Any]] = []
    with progress("interchange", 4 * steps, show_progress) as advance:
        for weights in ("model", "random"):
            with random_weights(model, seed) if weights == "random" else nullcontext():
                rows += fits.rows(weights, "linear", fits.linear(steps, lr, advance))
                rows += fits.rows(weights, "non-linear", fits.nonlinear(steps, nonlinear_lr, blocks, hidden, advance))
    provenance = {
        **prompt_provenance(model, [*splits["train"], *splits["test"]], [*encoded["train"], *encoded["test"]]),
        "method": "interchange interventions", "site": str(site), "rank": rank, "steps": steps, "lr": lr,
        "nonlinear_lr": nonlinear_lr, "batch_size": batch_size, "blocks": blocks, "hidden": hidden, "seed": seed,
        "random_weights": "matrices redrawn, normal with their own mean and deviation", **provenance_of(train),
    }  # fmt: skip
    return Interchange(pd.DataFrame(rows), provenance)


class _Cases:
    """Base–source pairs in both directions, as tensors."""

    def __init__(self, model: Model, prompts: Sequence[Encoded], site: Site, classes: Sequence[int]):
        lengths = {len(p) for p in prompts}
        if len(lengths) > 1:
            raise PromptError(f"expected prompts of one length, and these have {sorted(lengths)} tokens")
        (length,) = lengths
        position = site.position
        assert isinstance(position, int)
        if not -length <= position < length:
            raise SiteError(f"{site}: the prompts have {length} tokens")
        refuse_vectors([p.clean for p in prompts] + [p.corrupt for p in prompts], "interchange trains on tokens")
        clean, corrupt = ([list(getattr(p, run)) for p in prompts] for run in ("clean", "corrupt"))
        self.base = torch.tensor(corrupt + clean, device=model.device)
        self.source = torch.tensor(clean + corrupt, device=model.device)
        answers, foils = zip(*(_answer_and_foil(p, "the set") for p in prompts), strict=True)
        self.targets = torch.tensor([classes.index(t) for t in (*answers, *foils)])
        self.positions = torch.full((len(self.targets),), position % length)
        self.classes = torch.tensor(classes, device=model.device)


class _MapFits:
    """Fits of both maps at one site, and their accuracy."""

    def __init__(self, model: Model, site: Site, data: dict[str, _Cases], rank: int, batch_size: int, seed: int):
        self.model, self.data, self.rank, self.batch_size, self.seed = model, data, rank, batch_size, seed
        self.hook = COMPONENTS[site.component].hook.format(layer=site.layer)

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits of the classes alone, after the last token."""
        return self.model.last_logits(inputs)[:, self.data["train"].classes].float()

    def linear(self, steps: int, lr: float, advance: Advance) -> tl.SubspaceInterchange:
        """Fit DAS by TransformerLens.

        The number of epochs is the one that comes closest to ``steps``.
        """
        cases = self.data["train"]
        epochs = max(1, round(steps * min(self.batch_size, len(cases.base)) / len(cases.base)))
        batches = epochs * math.ceil(len(cases.base) / self.batch_size)

        left = iter(range(batches))

        def logits(inputs: Tensor) -> Tensor:
            if next(left, None) is not None:  # a few forwards more than batches: before and after the fit
                advance(steps / batches)
            return self.logits(inputs)

        fit = tl.fit_das(
            self.model.bridge, self.hook, cases.base, cases.source, cases.targets, logits, rank=self.rank,
            base_positions=cases.positions, source_positions=cases.positions, epochs=epochs,
            batch_size=self.batch_size, lr=lr, seed=self.seed,
        )  # fmt: skip
        last_loss = torch.tensor(fit.losses[-1])
        require_finite(last_loss, "the loss of the linear map", "its fit diverged; use a smaller lr")
        return tl.SubspaceInterchange(fit.basis)

    def nonlinear(self, steps: int, lr: float, blocks: int, hidden: int, advance: Advance) -> Exchange:
        """Fit a RevNet to the same targets."""
        cases, sources = self.data["train"], self._source_activations("train")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            bijection = RevNet(sources.shape[1], blocks, hidden, scale=float(sources.float().std()) or 1.0)
        exchange = Exchange(bijection, self.rank).to(self.model.device, self.model.dtype)
        optimizer = torch.optim.Adam(exchange.parameters(), lr=lr)
        with torch.enable_grad(), without_weight_gradients(self.model):
            for batch in shuffled_batches(len(cases.base), self.batch_size, steps, self.seed):
                logits = tl.run_with_intervention(
                    self.model.bridge, self.hook, exchange, cases.base[batch], sources[batch], self.logits,
                    positions=cases.positions[batch],
                )  # fmt: skip
                loss = F.cross_entropy(logits, cases.targets[batch].to(logits.device))
                require_finite(loss, "the loss of the non-linear map", "its fit diverged; use a smaller nonlinear_lr")
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                advance(1)
        return exchange.eval()

    def _source_activations(self, split: str) -> Tensor:
        cases = self.data[split]
        return tl.collect_activations(
            self.model.bridge, self.hook, cases.source, self.logits, positions=cases.positions,
            batch_size=self.batch_size,
        )  # fmt: skip

    @torch.no_grad()
    def rows(self, weights: str, kind: Map, intervention: tl.SubspaceInterchange | Exchange) -> list[dict[str, Any]]:
        """Rows of the table for one map: accuracy on both splits, with intervals."""
        rows = []
        for split, cases in self.data.items():
            logits = tl.intervened_logits(
                self.model.bridge, self.hook, intervention, cases.base, self._source_activations(split), self.logits,
                positions=cases.positions, batch_size=self.batch_size,
            )  # fmt: skip
            base_logits = [self.logits(part).cpu() for part in cases.base.split(self.batch_size)]
            is_right = (logits.argmax(-1) == cases.targets).double().cpu().view(2, -1)  # [directions, pairs]
            without = float((torch.cat(base_logits).argmax(-1) == cases.targets).double().mean())
            iia, lo, hi = share_interval(is_right.mean(0).numpy())
            rows.append({
                "weights": weights, "map": kind, "split": split, "iia": iia, "lo": lo, "hi": hi,
                "n": is_right.shape[1], "chance": 1 / len(cases.classes), "without": without,
            })  # fmt: skip
        return rows


@contextmanager
def random_weights(model: Model, seed: int = 0) -> Iterator[None]:
    """Inside the block, the model has random weights.

    Every matrix is drawn from a normal distribution with its own mean and standard deviation. Vectors stay as they are.
    Afterwards the weights are restored from a copy, which is held in memory meanwhile.
    """
    generator = torch.Generator().manual_seed(seed)
    matrices = [p for p in model.bridge.original_model.parameters() if p.ndim >= 2]
    copies = [p.detach().clone() for p in matrices]
    try:
        with torch.no_grad():
            for p in matrices:
                drawn = torch.randn(p.shape, generator=generator).to(p)
                p.copy_(drawn * p.std() + p.mean())
        yield
    finally:
        with torch.no_grad():
            for p, original in zip(matrices, copies, strict=True):
                p.copy_(original)


def _answer_and_foil(prompt: Encoded, where: str) -> tuple[int, int]:
    """Answer and foil. Raises PromptError without a foil."""
    if prompt.foil is None:
        raise PromptError(f"every pair of {where} needs a foil: the causal model's output with the variable exchanged")
    return prompt.answer, prompt.foil


def _check(model: Model, site: Site, rank: int, counts: dict[str, int], learning_rates: dict[str, float]) -> None:
    """Raise ModelError, SiteError or InterpError for arguments that no fit can use."""
    if model.reads != "text" or model.stacks:
        raise ModelError(f"{model.name}: interchange interventions are defined for models of one stack that read text")
    if site.component not in WIDE or site.layer is None or not isinstance(site.position, int):
        raise SiteError(f"{site}: {', '.join(WIDE)} of a layer at a position expected, like resid_post.L3@-1")
    hook = COMPONENTS[site.component].hook.format(layer=site.layer)
    if site.layer >= model.n_layers or hook not in model.bridge.hook_dict:
        raise SiteError(f"{site}: {model.name} has no such site")
    check_whole(1, model.d_model - 1, rank=rank)  # all coordinates would exchange the whole site
    check_whole(1, **counts)
    check_positive(**learning_rates)
