"""The work of a sweep: one part in, one table out. What it gives depends on the config and the part alone."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from interp.errors import InterpError, ModelError, SiteError
from interp.jobs.job import PartResult, RunFiles
from interp.recipes.registry import RECIPES
from interp.sweep import prompt_sets
from interp.sweep.config import Config, ModelSpec, Part, parse
from interp.sweep.prompt_sets import Prompts, PromptSet, as_task, file_name, make_set
from interp.sweep.table import failed_rows, table_of
from interp.utils.out_of_memory import free_memory, is_out_of_memory

log = logging.getLogger("interp")


class EffectsJob:
    """Computes parts of a sweep. Holds one model at a time. ``models``: model objects in place of loading, by name."""

    def __init__(self, document: dict[str, Any], shelf: RunFiles, models: dict[str, Any] | None = None):
        self.config: Config = parse(document)
        self.shelf, self.given = shelf, models or {}
        self.loaded: tuple[str, Any] | None = None
        self.warmed_up_for: tuple[str, str, int] | None = None
        self.sets: dict[tuple[str, str, int], PromptSet] = {}
        self.shared: dict[Any, Any] = {}  # means over whole sets

    def compute(self, number: int) -> PartResult:
        """One part. ModelError if its model cannot be loaded; everything else that goes wrong is in the table."""
        part = self.config.parts[number]
        model = self.model(part.model)
        prompts = self.prompts(part, model)
        reasons = dict.fromkeys(part.examples, prompts.error) if prompts.error else dict(prompts.failed)
        good = [i for i in part.examples if i not in reasons]
        bad = {i: str(reasons[i]) for i in part.examples if i in reasons}
        trial = _Trial(self, part, model, prompts)
        frames = trial.measured(good)
        bad |= trial.failed
        if bad:
            frames.append(failed_rows(sorted(bad), [bad[i] for i in sorted(bad)]))
        labels = dict(zip(("model", "task", "recipe", "sites", "seed"), part.combination, strict=True))
        tables = [table_of(frame, {**labels, "part": part.number}) for frame in frames]
        table = pa.concat_tables(tables) if tables else table_of(pd.DataFrame(), {})
        failed = table.num_rows - table["error"].null_count
        about = {"provenance": {**trial.provenance, "behaviour": prompts.behaviour}, "error": prompts.error}
        return PartResult(table, failed, about, {"halved": trial.halved} if trial.halved else {})

    def shared_file(self, part: int) -> str:
        """Name the file of the run with the part's prompts."""
        return frozen_name(self.config.parts[part])

    def model(self, spec: ModelSpec) -> Any:
        """The model, loaded once and kept until another is needed."""
        if spec.name in self.given:
            return self.given[spec.name]
        if self.loaded is None or self.loaded[0] != spec.name:
            from interp.model.model import load

            self.loaded = self.warmed_up_for = None
            self.shared.clear()
            gc.collect()
            self.loaded = spec.name, load(spec.load, **spec.options)
        return self.loaded[1]

    def prompts(self, part: Part, model: Any) -> PromptSet:
        """The part's frozen prompts, made now if nobody has made them yet. ModelError for other weights than theirs."""
        key = part.model.name, part.task.name, part.seed
        if key not in self.sets:
            name = frozen_name(part)
            content = self.shelf.get(name)
            if content is None:
                own = None
                if part.task.pairs is not None:
                    own = self.shelf.get(f"inputs/{input_name(part.task)}")
                    if own is None or prompt_sets.digest_of(own) != part.task.pairs_digest:
                        raise InterpError(
                            f"the run's copy of {part.task.pairs} is missing or damaged: make the run anew"
                        )
                self.warmed_up_for = None
                made = make_set(model, part.task, part.seed, own, partial(self._ask, model, part)).encoded()
                content = self.shelf.keep(name, made)
                self.warmed_up_for = key if content == made else None
            found = PromptSet.decoded(content)
            if found.weights != model.fingerprint():
                raise ModelError(
                    f"{part.model.name} ({part.model.load}) has other weights than when this run began: its numbers "
                    "would not belong together. Make a new run"
                )
            self.sets[key] = found
        if self.warmed_up_for != key:
            self.warmed_up_for = key
            if self.sets[key].error is None:
                self.warm_up(model, [self.sets[key].prompts[i] for i in self.sets[key].usable])
        return self.sets[key]

    def _ask(self, model: Any, part: Part, prompts: Prompts) -> str:
        """How well a model does a task, by its prompts; leaves the model warmed up for these."""
        from interp.sweep.task_check import BaseRuns, check_task

        self.warm_up(model, prompts)
        runs = BaseRuns(model, self.config.engine, self.config.memory)
        return check_task(runs, prompts, lambda some: as_task(some, part.task, part.seed), part.task.require)

    def warm_up(self, model: Any, prompts: Prompts, anew: bool = False) -> None:
        """Make what the engine knows about a model the same before every part of these prompts."""
        from interp.engine.warm_up import warm_up

        warm_up(model, prompts, self.config.engine, self.config.memory, anew)


def frozen_name(part: Part) -> str:
    """Under which the part's prompts are kept in the run."""
    return f"prompts/{file_name(part.model.name, part.task.name, part.seed)}"


def input_name(task: Any) -> str:
    """Under which a task's own prompts are kept in the run's ``inputs``."""
    from pathlib import Path

    return f"{task.pairs_digest}{Path(str(task.pairs)).suffix.lower()}"


class _Trial:
    """One part's measurement: as a whole; with trouble, example by example."""

    def __init__(self, job: EffectsJob, part: Part, model: Any, prompts: PromptSet):
        self.job, self.part, self.model, self.prompts = job, part, model, prompts
        self.recipe = RECIPES[part.recipe.recipe]
        self.usable = prompts.usable
        self.failed: dict[int, str] = {}
        self.provenance: dict[str, Any] = {}
        self.halved = 0

    def measured(self, examples: Sequence[int]) -> list[pd.DataFrame]:
        """Rows of the examples; out of memory, of their halves; with any other trouble, of each alone.

        Alone and with the engine's checks done anew, so that what an example gives does not depend on which parts this
        process happened to compute before.
        """
        if not examples:
            return []
        try:
            frame = self.run(examples)
        except SiteError as error:
            self.failed |= dict.fromkeys(examples, _reason(error))
            return []
        except Exception as error:
            return self._in_trouble(examples, error)
        if _lacking(frame).any():
            if len(examples) == 1:
                return [_marked(frame, self.part.recipe.metric)]
            return self._one_by_one(examples)
        return [frame]

    def _in_trouble(self, examples: Sequence[int], error: Exception) -> list[pd.DataFrame]:
        if len(examples) == 1:
            self.failed[examples[0]] = _reason(error)
            return []
        if not is_out_of_memory(error):
            return self._one_by_one(examples)
        self.halved += 1
        half = len(examples) // 2
        log.warning("%s: out of memory with %d examples; going on with half as many", self.part, len(examples))
        del error
        free_memory()
        return [*self.measured(examples[:half]), *self.measured(examples[half:])]

    def _one_by_one(self, examples: Sequence[int]) -> list[pd.DataFrame]:
        frames = []
        usable = [self.prompts.prompts[i] for i in self.usable]
        for i in examples:
            self.job.warm_up(self.model, usable, anew=True)
            frames += self.measured([i])
        self.job.warm_up(self.model, usable, anew=True)
        return frames

    def run(self, examples: Sequence[int]) -> pd.DataFrame:
        """The recipe on some examples, as a frame that counts them as the set does; NaN is let through."""
        from interp.recipes.sweep_loop import Subset

        where = {i: n for n, i in enumerate(self.usable)}
        first, last = where[examples[0]], where[examples[-1]]
        whole = self.recipe.whole_set
        kept = self.usable if whole else list(examples)
        prompts = as_task([self.prompts.prompts[i] for i in kept], self.part.task, self.part.seed)
        subset = Subset(range(first, last + 1) if whole else None, keep_nan=True, means=self.job.shared)
        recipe, arguments = call_of(self.job.config, self.part, self.model)
        if self.recipe.prepare:  # which recorded other texts
            self.job.warm_up(self.model, [self.prompts.prompts[i] for i in self.usable])
        effects = recipe(self.model, prompts, **arguments, subset=subset)
        self.provenance = {k: v for k, v in effects.provenance.items() if k not in ("created", "prompts", "n_prompts")}
        self.provenance |= {
            "prompts": self.prompts.digest[:16],
            "n_prompts": len(self.usable),
        }
        frame = effects.frame()
        frame["example"] = np.asarray(kept)[frame["example"].to_numpy(dtype=int)]
        return frame


def call_of(config: Config, part: Part, model: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the recipe's function and its keyword arguments besides model and prompts."""
    spec, recipe = part.recipe, RECIPES[part.recipe.recipe]
    arguments = recipe.arguments(model, spec.options)
    if part.sites is not None:
        arguments |= recipe.site_arguments(model, part.sites.sites, part.sites.layers, part.sites.groups)
    common = {
        "metric": spec.metric,
        "engine": config.engine,
        "memory": config.memory,
        "show_progress": False,
        "seed": part.seed,
    }
    arguments |= {k: v for k, v in common.items() if v is not None and recipe.takes(k)}
    return recipe.load(), recipe.prepared(model, arguments)


def _lacking(frame: pd.DataFrame) -> np.ndarray:
    return frame["patched"].isna().to_numpy() | frame["clean"].isna().to_numpy()


def _marked(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Rows without a number get their reason."""
    of = np.where(frame["clean"].isna(), "the clean run", "the changed run")
    reasons = [
        f"the metric {metric} of {which} is NaN" if bad else None
        for which, bad in zip(of, _lacking(frame), strict=True)
    ]
    return frame.assign(error=reasons)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
