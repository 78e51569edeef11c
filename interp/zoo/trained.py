"""Small trained models, shipped with the package.

Their behaviour was learned, their mechanism measured. ``experiments/train_zoo.py`` trained them (seeded, minutes on two
cores) and measured `Trained.measured`; `Trained.measure` measures it again. Nothing was set by hand, so the ground
truth is of another kind than that of the hand-set models: heads are named by their attention *and* by the cost of their
ablation, frequencies by their share of the weights *and* by the accuracy that remains without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from interp.errors import TaskError
from interp.prompts.pair_set import PairSet
from interp.prompts.pairs import PromptPair
from interp.sites import Site
from interp.zoo import shipped
from interp.zoo.known import WORDS as INDUCTION_WORDS
from interp.zoo.known import spans_of
from interp.zoo.tokenizer import SPECIALS

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from interp.model.model import Model
    from interp.model.native import TransformerBridge

MODULUS = 53
EQUALS = "="
NUMBERS = tuple(map(str, range(MODULUS)))
PERIOD = 20  # words of the repeated stretch on which heads are measured


@dataclass(frozen=True)
class Trained:
    """A trained model with measured ground truth.

    ``pairs(n, seed)`` makes pairs that it solves; ``measured`` has the measurements, and ``roles`` the roles of heads
    by these. ``roles`` is empty for the model of modular addition, whose heads share one job.
    """

    name: str
    bridge: TransformerBridge = field(repr=False)
    measured: Mapping[str, Any]
    roles: Mapping[Site, str]
    _pairs: Callable[[int, Random], list[PromptPair]] = field(repr=False)
    _measure: Callable[[Trained], dict[str, Any]] = field(repr=False)

    @cached_property
    def model(self) -> Model:
        """The bridge as an `interp.Model`."""
        from interp.model.load_model import load

        return load(self.bridge)

    def pairs(self, n: int = 32, seed: int = 0) -> PairSet:
        """Make ``n`` pairs, the same ones for the same seed. TaskError for n < 1."""
        if n < 1:
            raise TaskError(f"zoo.{self.name}: a set has at least 1 pair; n={n} was asked for")
        return PairSet(self._pairs(n, Random(f"{self.name}/{seed}")), task=f"zoo.{self.name}", seed=seed)

    def measure(self) -> dict[str, Any]:
        """Repeat the measurements of ``measured`` (takes seconds)."""
        return self._measure(self)


def trained_induction(*, folder: Path | None = None) -> Trained:
    """Load an attention-only model that learned induction.

    It has two layers of four heads with layer norm. It was trained on two kinds of sequences of 124 words: random
    stretches that repeat, and "texts" in which each word has four possible successors. ``measured``, on fresh repeated
    stretches of 20 words: the loss (nats a token) on the first pass and on the second, the scores of each head (mean
    attention to the token after the previous occurrence, ``induction``, and to the previous token, ``previous``), and
    by how much the second pass' loss rises if the head's output is replaced by its mean (``ablated``). ``roles`` names
    heads whose score is above 0.4 and whose ablation costs more than 0.1 nats.
    """
    return _load("trained_induction", INDUCTION_WORDS, _induction_pairs, _measure_induction, folder)


def modular_addition(*, folder: Path | None = None) -> Trained:
    """Load a model of modular addition, "a b =" → (a + b) mod 53.

    It has one layer of four heads and 256 ReLU neurons, without norms. Trained on half of the 2809 sums until it
    answered the others too ("grokking"), after Nanda et al. (2023), arXiv 2301.05217. ``measured``: the accuracy on all
    sums; the key frequencies k, by the share of the embedding's variance over numbers that cos and sin of 2πka/53 hold
    (``power``); the accuracy with the embedding of numbers projected onto its mean and the key frequencies
    (``only_key``), and with the key frequencies removed (``without_key``).
    """
    return _load("modular_addition", (*NUMBERS, EQUALS), _addition_pairs, _measure_addition, folder)


def table() -> tuple[Int[Tensor, "sums 4"], Int[Tensor, " sums"]]:
    """Token ids of "<bos> a b =" and of the answer for all sums."""
    import torch

    numbers = torch.arange(MODULUS)
    a, b = numbers.repeat_interleave(MODULUS), numbers.repeat(MODULUS)
    bos, first = torch.zeros_like(a), len(SPECIALS)
    return torch.stack([bos, a + first, b + first, bos + MODULUS + first], 1), (a + b) % MODULUS + first


def _load(
    name: str,
    words: tuple[str, ...],
    pairs: Callable[[int, Random], list[PromptPair]],
    measure: Callable[[Trained], dict[str, Any]],
    folder: Path | None,
) -> Trained:
    bridge, description = shipped.load(name, words, folder)
    roles = {Site.parse(s): role for s, role in description["measured"].get("roles", {}).items()}
    return Trained(name, bridge, description["measured"], roles, pairs, measure)


# ---------------------------------------------------------------- induction


def _induction_pairs(n: int, rng: Random) -> list[PromptPair]:
    """Sixteen random words, then the first of them again up to a word A.

    The answer B is the word that followed A. In the corrupt prompt A and another word C have changed places in the
    first part, so that the foil follows A.
    """
    pairs = []
    for _ in range(n):
        first = rng.sample(INDUCTION_WORDS, 16)
        a = rng.randrange(4, 9)
        c = rng.choice(range(a + 2, 15))
        changed = list(first)
        changed[a], changed[c] = first[c], first[a]
        again = first[: a + 1]
        clean, corrupt = [*first, *again], [*changed, *again]
        spans = spans_of(clean, {"A1": a + 1, "B1": a + 2, "C1": c + 1, "D1": c + 2, "A2": len(clean)})
        pairs.append(PromptPair(" ".join(clean), " ".join(corrupt), f" {first[a + 1]}", f" {first[c + 1]}", spans))
    return pairs


def _measure_induction(trained: Trained) -> dict[str, Any]:
    import torch

    draw = torch.Generator().manual_seed(1)
    stretch = torch.randint(len(INDUCTION_WORDS), (128, PERIOD), generator=draw) + len(SPECIALS)
    ids = torch.cat([torch.zeros(128, 1, dtype=torch.long), stretch, stretch, stretch], 1)
    bridge, cfg = trained.bridge, trained.bridge.cfg
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(ids)
    second = slice(PERIOD + 1, 2 * PERIOD)  # queries whose token had a successor in the first pass
    queries = torch.arange(ids.shape[1])[second]
    heads, roles = {}, {}
    whole = _loss(logits, ids, second)
    for layer in range(cfg.n_layers):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        z = cache[f"blocks.{layer}.attn.hook_z"]
        for head in range(cfg.n_heads):
            rows = pattern[:, head].mean(0)
            scores = {
                "induction": rows[queries, queries - PERIOD + 1].mean().item(),
                "previous": rows[queries, queries - 1].mean().item(),
                "ablated": _without(trained, layer, head, z, ids, second) - whole,
            }
            heads[f"z.L{layer}H{head}"] = {k: round(v, 3) for k, v in scores.items()}
            for role, score in (("induction", "induction"), ("previous token", "previous")):
                if scores[score] > 0.4 and scores["ablated"] > 0.1:
                    roles[f"z.L{layer}H{head}"] = role
    first = slice(1, PERIOD)
    return {
        "loss": {"first pass": round(_loss(logits, ids, first), 3), "second pass": round(whole, 3)},
        "heads": heads, "roles": roles,
    }  # fmt: skip


def _loss(logits: Tensor, ids: Tensor, queries: slice) -> float:
    from torch.nn.functional import cross_entropy

    after = slice(queries.start + 1, queries.stop + 1)
    return cross_entropy(logits[:, queries].flatten(0, 1), ids[:, after].flatten()).item()


def _without(trained: Trained, layer: int, head: int, z: Tensor, ids: Tensor, queries: slice) -> float:
    """The loss with one head's output replaced by its mean."""
    import torch

    def hook(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, :, head] = z[:, 1:, head].mean((0, 1))
        return x

    with torch.no_grad():
        logits = trained.bridge.run_with_hooks(ids, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", hook)])
    return _loss(logits, ids, queries)


# ---------------------------------------------------------------- addition


def _addition_pairs(n: int, rng: Random) -> list[PromptPair]:
    """Sums; the corrupt prompt changes the first or the second number in turn.

    The foil is the right answer of the corrupt prompt.
    """
    pairs = []
    for i in range(n):
        a, b = rng.randrange(MODULUS), rng.randrange(MODULUS)
        other = [a, b]
        other[i % 2] = rng.choice([x for x in range(MODULUS) if x != other[i % 2]])
        clean, corrupt = ([str(x), str(y), EQUALS] for x, y in ((a, b), other))
        answer, foil = (f" {sum(x) % MODULUS}" for x in ((a, b), other))
        spans = spans_of(clean, {"a": 1, "b": 2, "END": 3})
        pairs.append(PromptPair(" ".join(clean), " ".join(corrupt), answer, foil, spans))
    return pairs


def fourier(numbers: Float[Tensor, "p d"]) -> Float[Tensor, "frequencies 2 d"]:
    """Compute coefficients of cos(2πka/p) and sin(2πka/p) for k = 1 … (p − 1)/2.

    Both waves have norm 1 over a.
    """
    return _waves(len(numbers)).to(numbers) @ numbers


def _waves(p: int) -> Float[Tensor, "frequencies 2 p"]:
    import math

    import torch

    k, a = torch.arange(1, p // 2 + 1)[:, None], torch.arange(p)[None]
    angle = 2 * math.pi / p * (k * a).double()
    return torch.stack([angle.cos(), angle.sin()], 1) * math.sqrt(2 / p)


def _measure_addition(trained: Trained) -> dict[str, Any]:
    import torch

    weight = trained.bridge.W_E.detach()
    rows = slice(len(SPECIALS), len(SPECIALS) + MODULUS)
    numbers = weight[rows].double()
    coefficients = fourier(numbers)
    power = coefficients.square().sum((1, 2)) / (numbers - numbers.mean(0)).square().sum()
    order = power.argsort(descending=True)
    key = [int(k) for k in order if power[k] > 0.02]
    waves = torch.stack([_project(numbers, k + 1) for k in key]).sum(0)
    embeddings = {
        "accuracy": numbers, "only_key": numbers.mean(0) + waves, "without_key": numbers - waves,
    }  # fmt: skip
    measured: dict[str, Any] = {"key": {str(k + 1): round(power[k].item(), 3) for k in key}}
    for name, embedding in embeddings.items():
        measured[name] = round(_accuracy(trained, embedding.to(weight)), 4)
    return measured


def _project(numbers: Float[Tensor, "p d"], k: int) -> Float[Tensor, "p d"]:
    """The part of a function of numbers that has frequency k."""
    waves = _waves(len(numbers))[k - 1].to(numbers)
    return waves.T @ (waves @ numbers)


def _accuracy(trained: Trained, embedding: Float[Tensor, "p d"]) -> float:
    """Share of all sums answered correctly with these embeddings of the numbers."""
    import torch

    ids, targets = table()

    def hook(x: Tensor, hook: Any) -> Tensor:
        x = x.clone()
        x[:, 1:3] = embedding[ids[:, 1:3] - len(SPECIALS)]
        return x

    with torch.no_grad():
        logits = trained.bridge.run_with_hooks(ids, fwd_hooks=[("hook_embed", hook)])[:, -1]
    return (logits.argmax(1) == targets).double().mean().item()
