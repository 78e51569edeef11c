"""What the recipes share: encode and check inputs, cut examples into chunks, turn scores into Effects rows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from interp import engine
from interp.engine.cells import rows_of
from interp.errors import InterpError, ModelError, PromptError
from interp.metrics import METRICS, Metric, Readout, recovery
from interp.model.model import Model
from interp.prompts.pairs import Encoded, PairSet, listed_prompts
from interp.recipes.targets import Address
from interp.results.effects import COLUMNS, Effects
from interp.sites import EACH, Site, Sites
from interp.utils.progress import Advance
from interp.utils.provenance import now, prompt_hash

log = logging.getLogger("interp")

RUN_BYTES = 600 * 2**20  # activations of base runs held at one time

# Set by `interp.sweep`, which cuts a recipe's examples into parts; both leave a recipe's numbers as they are.
EXAMPLES: ContextVar[range | None] = ContextVar("examples", default=None)  # which to run, of a set seen as a whole
KEEP_NAN: ContextVar[bool] = ContextVar("keep_nan", default=False)  # rows of NaN are marked later, in place of refused


def asked_of(model: Model, prompts: Any) -> list[Any]:
    """The prompts as a list. Raises InterpError for what is no model, PromptError for what is no prompts."""
    if not isinstance(model, Model):
        raise InterpError(f"a model expected, e.g. interp.load('smollm2'), got {model!r:.80}")
    return listed_prompts(prompts)


def provenance_of(items: Any) -> dict[str, Any]:
    """Task name and seed of a PairSet; nothing for a plain list."""
    return {"task": items.task, "seed": items.seed} if isinstance(items, PairSet) else {}


def check_seed(seed: object) -> None:
    """Refuse what is no seed."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InterpError(f"seed={seed!r}: a number from 0 on expected")


def resolve(sites: Sites, prompt: Encoded) -> Iterator[Site]:
    """The sites with ``"each"`` spelled out for one prompt; PromptError if a position is not in it."""
    for site in sites:
        if site.position == EACH:
            yield from (site.at(i) for i in range(len(prompt)))
        else:
            rows_of(site, prompt)
            yield site


def chosen(n: int) -> range:
    """The examples that are to be run, of ``n``: all, unless `EXAMPLES` says some."""
    return range(n) if (some := EXAMPLES.get()) is None else some


def check_metric(metric: Metric, prompts: Sequence[Encoded], model: Model) -> None:
    """Refuse, before any forward, a metric that needs foils when some pair has none, or words of a model without any.

    A metric of one's own may read the hidden states of a model without a head.
    """
    if model.headless and METRICS.get(metric.name) is metric:
        raise InterpError(
            f"{model.name} has no language-model head and ends in hidden states, and metric {metric.name!r} reads "
            "logits of words: load the model with its head, or give a metric of your own"
        )
    missing = [i for i, p in enumerate(prompts) if metric.needs_foil and p.foil is None]
    if missing:
        raise PromptError(
            f"metric {metric.name!r} needs a foil, and pair {missing[0]} has none: give PromptPair(foil=…), "
            "or use metric=interp.logprob"
        )


def chunks(
    prompts: Sequence[Encoded], runner: engine.Engine, components: Sequence[str], runs_per_example: int
) -> Iterator[range]:
    """Consecutive examples whose base runs fit in `RUN_BYTES` together, or in half of the engine's budget if less.

    Only `chosen` ones. Cuts the engine's batches to what is left of the budget. Raises InterpError, before anything is
    run, if not one cell fits beside the base runs of one example.
    """
    budget = runner.budget
    held = [runs_per_example * budget.run(len(p), components) for p in prompts]
    # while it is recorded, a run needs a forward's rows too
    sizes = [h + runs_per_example * budget.row * len(p) for h, p in zip(held, prompts, strict=True)]
    limit = RUN_BYTES if budget.limit is None else min(RUN_BYTES, budget.limit / 2)
    for size, own, prompt in zip(sizes, held, prompts, strict=True):
        budget.check(len(prompt), max(own, size - budget.cell(len(prompt))))
    here = chosen(len(prompts))
    parts, start, used = [], here.start, 0.0
    for i in here:
        if i > start and used + sizes[i] > limit:
            parts.append(range(start, i))
            start, used = i, 0
        used += sizes[i]
    for part in [*parts, range(start, here.stop)]:
        runner.fit_batches_to_memory(max(len(prompts[i]) for i in part), sum(held[i] for i in part))
        yield part


def readout(prompts: Sequence[Encoded], clean_logits: Sequence[torch.Tensor]) -> Readout:
    """A metric's readout, one row per prompt. ModelError if the model's output has no logit for an answer or foil."""
    device = clean_logits[0].device
    foils = [p.foil for p in prompts]
    largest, size = max(x for p in prompts for x in (p.answer, p.foil or 0)), clean_logits[0].shape[-1]
    if largest >= size:
        raise ModelError(
            f"the model gives {size} numbers for a prompt, and an answer or foil is token {largest}: it has no head "
            "over its vocabulary, or the tokenizer is another model's"
        )
    return Readout(
        answer=torch.tensor([p.answer for p in prompts], device=device),
        foil=None if any(f is None for f in foils) else torch.tensor(foils, device=device),
        clean_logits=torch.stack(list(clean_logits)),
    )


def score_runs(metric: Metric, runs: Sequence[engine.Run], read: Readout) -> torch.Tensor:
    """The metric on base runs themselves, float64 on the CPU. InterpError, before any cell is run, if it is NaN."""
    scores = metric(torch.stack([r.logits for r in runs]), read).cpu().double()
    if (broken := int((~scores.isfinite()).sum())) and not KEEP_NAN.get():
        raise InterpError(
            f"metric {metric.name!r} returned NaN or infinity for {broken} of {len(scores)} prompts as they are, "
            "before anything was changed: no effect could be read from it"
        )
    return scores


def tell_of_equal(metric: Metric, clean: Sequence[float], corrupt: Sequence[float]) -> None:
    """Says, before cells are run, for how many pairs there will be no recovery: the metric sees no difference."""
    alike = sum(a == b for a, b in zip(clean, corrupt, strict=True))
    if alike and not KEEP_NAN.get():
        log.warning(
            "metric %r is the same on the clean and the corrupt prompt of %d of %d pairs: they have no recovery "
            "(effect is NaN), only raw changes", metric.name, alike, len(clean),
        )  # fmt: skip


def evaluate(
    runner: engine.Engine,
    metric: Metric,
    runs: Sequence[engine.Run],
    cells: Sequence[engine.Cell],
    read: Readout,
    advance: Advance,
) -> torch.Tensor:
    """The metric of every cell; row i of ``read`` belongs to run i."""
    if metric.reads_pair and read.foil is not None:
        return _evaluate_pair(runner, metric, runs, cells, read.answer, read.foil, advance)

    def score(logits: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        return metric(logits, read.rows(torch.tensor([cells[i].run for i in which])))

    return runner.score(runs, cells, score, advance)


def evaluate_or_keep(
    runner: engine.Engine,
    metric: Metric,
    runs: Sequence[engine.Run],
    cells: Sequence[engine.Cell | None],
    unchanged: Sequence[float],
    read: Readout,
    advance: Advance,
) -> list[float]:
    """The metric of every cell; of one that is None, because it would change nothing, ``unchanged`` of its number."""
    changing = [c for c in cells if c is not None]
    advance(runner.count_answered(len(cells) - len(changing)))
    found = iter(evaluate(runner, metric, runs, changing, read, advance).tolist())
    return [known if cell is None else next(found) for cell, known in zip(cells, unchanged, strict=True)]


def _evaluate_pair(
    runner: engine.Engine,
    metric: Metric,
    runs: Sequence[engine.Run],
    cells: Sequence[engine.Cell],
    answer: torch.Tensor,
    foil: torch.Tensor,
    advance: Advance,
) -> torch.Tensor:
    """The same where answer and foil are all that is read: logits of two columns, the answer's first."""

    def score(logits: torch.Tensor, which: Sequence[int]) -> torch.Tensor:
        first = answer.new_zeros(len(which))
        return metric(logits, Readout(first, first + 1))

    return runner.score(runs, cells, score, advance, torch.stack([answer, foil], dim=1))


@dataclass
class Rows:
    """Collects result rows of one recipe and makes Effects of them."""

    intervention: str
    mode: str
    metric: Metric

    def __post_init__(self) -> None:
        self.columns: dict[str, list[Any]] = {c: [] for c in COLUMNS if c not in ("effect", "raw")}

    def add(
        self, example: int, site: Site | Address, prompt: Encoded, clean: float, corrupt: float, patched: float,
        sender: Site | None = None,
    ) -> None:  # fmt: skip
        """One row; position, token and role follow from the site. ``sender``: the other end, if it is an edge."""
        where = site.position
        single = where % len(prompt) if isinstance(where, int) else None
        role = where if isinstance(where, str) else ("" if single is None else prompt.role(single))
        values = {
            "example": example, "component": site.component, "layer": site.layer, "head": site.head,
            "position": single, "sender": None if sender is None else str(sender),
            "token": "" if single is None else prompt.tokens[single], "role": role,
            "intervention": self.intervention, "mode": self.mode, "metric": self.metric.name,
            "clean": clean, "corrupt": corrupt, "patched": patched,
        }  # fmt: skip
        for name, value in values.items():
            self.columns[name].append(value)

    def effects(self, model: Model, prompts: Sequence[Any], **recipe: Any) -> Effects:
        """The table, with effects on the recovery scale and the recipe in its provenance.

        Raises InterpError if the metric came out NaN or infinite: a table of those is not a result.
        """
        numbers = {c: torch.tensor(self.columns[c], dtype=torch.float64) for c in ("clean", "corrupt", "patched")}
        # corrupt is NaN where there is no corrupt run
        broken = ~(numbers["patched"].isfinite() & numbers["clean"].isfinite() & ~numbers["corrupt"].isinf()).numpy()
        if broken.any() and not KEEP_NAN.get():
            first = {c: values[broken.argmax()] for c, values in self.columns.items()}
            raise InterpError(
                f"metric {self.metric.name!r} returned NaN or infinity for {int(broken.sum())} of {len(broken)} cells "
                f"(first: example {first['example']}, {first['component']} layer {first['layer']})"
            )
        start = numbers["corrupt"] if self.mode == "denoise" else numbers["clean"]
        effect, raw = recovery(**numbers, mode=self.mode), numbers["patched"] - start
        frame = pd.DataFrame({**self.columns, "effect": effect.numpy(), "raw": raw.numpy()})
        provenance = {
            **model.provenance(), "prompts": prompt_hash(prompts), "n_prompts": len(prompts), "created": now(),
            "intervention": self.intervention, "mode": self.mode, "metric": self.metric.name,
            "metric_unit": self.metric.unit,
            "normalisation": "(patched − corrupt)/(clean − corrupt)" if self.mode == "denoise"
            else "(patched − clean)/(corrupt − clean)",
            **recipe,
        }  # fmt: skip
        return Effects(frame, provenance)
