"""How causal tracing corrupts a prompt: Gaussian noise on the subject's embeddings, or the pair's corrupt prompt."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.engine import Engine, Run
from interp.engine.packed_forward import StopForward
from interp.engine.runs import ReadRows
from interp.errors import InterpError
from interp.model.batching import equal_length_batches
from interp.model.hooks import hooks
from interp.model.model import Model
from interp.prompts.coder import Encoded
from interp.utils.arguments import is_number, is_whole

PUBLISHED_NOISE, PUBLISHED_SAMPLES = 3.0, 10  # Meng et al. 2022


@dataclass(frozen=True)
class NoiseCorruption:
    """Corrupted runs of facts: noise of ``multiple`` × ``sigma`` on the subject's embeddings."""

    model: Model
    multiple: float
    sigma: float
    samples: int
    seed: int

    def runs(
        self, runner: Engine, prompts: Sequence[Encoded], numbers: range, components: Sequence[str],
        read: ReadRows | None = None,
    ) -> list[Run]:  # fmt: skip
        """Record ``samples`` corrupted runs of each prompt, which keep ``components``. ``read``: rows of each run."""
        jobs = [(i, p, s) for i, p in zip(numbers, prompts, strict=True) for s in range(self.samples)]
        std = self.multiple * self.sigma
        noises = [subject_noise(self.model, p, std, self.seed, i, s) for i, p, s in jobs]
        return runner.record([p.clean for _, p, _ in jobs], components, noises, read=read)

    def first(self, prompt: Encoded) -> int:
        """Return the first row that the corruption changes."""
        return prompt.spans["subject"][0]

    def recipe(self) -> dict[str, object]:
        """Return what the provenance says of it."""
        words = f"Gaussian, {self.multiple} × σ on subject embeddings"
        return {"corruption": words, "noise": words, "sigma": self.sigma, "samples": self.samples}


@dataclass(frozen=True)
class PairCorruption:
    """Corrupted runs of pairs: their corrupt prompts."""

    samples: int = 1

    def runs(
        self, runner: Engine, prompts: Sequence[Encoded], numbers: range, components: Sequence[str],
        read: ReadRows | None = None,
    ) -> list[Run]:  # fmt: skip
        """Record the corrupt run of each pair, which keeps ``components``. ``read``: rows of each run."""
        return runner.record([p.corrupt for p in prompts], components, read=read)

    def first(self, prompt: Encoded) -> int:
        """Return the first row that the corruption changes."""
        return prompt.first_difference

    def recipe(self) -> dict[str, object]:
        """Return what the provenance says of it."""
        return {"corruption": "the corrupt prompt (symmetric token replacement)", "samples": 1}


def corruption_of(
    model: Model, prompts: Sequence[Encoded], has_pairs: bool, noise: float | None, samples: int | None,
    sigma: float | None, seed: int,
) -> NoiseCorruption | PairCorruption:  # fmt: skip
    """Return the corruption of facts (noise) or pairs (their corrupt prompts). Raises InterpError for bad settings."""
    if has_pairs:
        if noise is not None or samples is not None or sigma is not None:
            raise InterpError("noise, samples and sigma are for Facts: a PromptPair is corrupted by its corrupt prompt")
        return PairCorruption()
    noise = PUBLISHED_NOISE if noise is None else noise
    samples = PUBLISHED_SAMPLES if samples is None else samples
    positive = [noise] if sigma is None else [noise, sigma]
    if not all(is_number(x) and 0 < x < float("inf") for x in positive) or not is_whole(samples, 1):
        raise InterpError(
            f"noise must be positive, sigma too, and samples a number from 1 on, got noise={noise}, samples={samples}, "
            f"sigma={sigma}"
        )
    return NoiseCorruption(model, noise, subject_std(model, prompts) if sigma is None else sigma, samples, seed)


@torch.no_grad()
def subject_std(model: Model, prompts: Sequence[Encoded]) -> float:
    """Return the standard deviation of all subject tokens' values where noise is added, each as often as it occurs.

    That is at ``hook_embed``: behind the factor by which some models scale their embedding (Granite, Gemma), and behind
    the norm that others have there (BLOOM).
    """
    values: list[Tensor] = []

    def keep(x: Tensor, hook: object) -> None:
        values.append(x.detach())
        raise StopForward

    rows = []
    for batch in equal_length_batches([p.clean for p in prompts]):
        with suppress(StopForward), hooks(model, ("hook_embed", keep)):
            model.forward([prompts[i].clean for i in batch])
        rows += [x[slice(*prompts[i].spans["subject"])] for i, x in zip(batch, values.pop(), strict=True)]
    if sum(map(len, rows)) == 0:
        raise InterpError("the facts have no subject tokens")
    return float(torch.cat(rows).float().std())


def subject_noise(model: Model, prompt: Encoded, std: float, seed: int, example: int, sample: int) -> Tensor:
    """Return noise on the subject's embeddings, zero elsewhere; equal for equal (seed, example, sample)."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + example) * 10_007 + sample) % 2**63)
    start, stop = prompt.spans["subject"]
    table = getattr(model.bridge.embed, "original_component", None)
    width = int(getattr(table, "embedding_dim", model.d_model))  # OPT-350m's is not d_model
    out = torch.zeros(len(prompt), width)
    out[start:stop] = std * torch.randn(stop - start, width, generator=generator)
    return out.to(model.device)
