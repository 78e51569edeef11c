"""The job of a sweep: compute the table of one part. The result depends only on the config and the part."""

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
from interp.model.edited import refuse_edited
from interp.model.prompt_provenance import hash_of_prompts
from interp.prompts.pairs import encode_any
from interp.recipes.registry import RECIPES
from interp.sweep import prompt_sets
from interp.sweep.config import Config, ModelSpec, SweepPart, parse
from interp.sweep.identity import SweepPartCheck, check_model, contradiction, frozen_name, groups, trusted_set
from interp.sweep.prompt_sets import Prompts, PromptSet, as_task, make_set
from interp.sweep.table import failed_rows, table_of
from interp.utils.out_of_memory import free_memory, is_out_of_memory
from interp.utils.provenance import code_hash, versions

log = logging.getLogger("interp")


class EffectsJob:
    """Computes parts of a sweep, with one model in memory at a time.

    ``models``: model objects to use instead of loading, by name.
    """

    def __init__(self, document: dict[str, Any], files: RunFiles, models: dict[str, Any] | None = None):
        self.config: Config = parse(document)
        self.files, self.given_models = files, models or {}
        self.loaded: tuple[str, Any] | None = None
        self.warmed_up_for: tuple[str, str, int] | None = None
        self.sets: dict[tuple[str, str, int], PromptSet] = {}
        self.hashes: dict[tuple[str, str, int], str] = {}
        self.unequal: dict[tuple[str, str, int], bool] = {}
        self.groups = groups(self.config.parts)
        self.shared: dict[Any, Any] = {}  # means over whole sets

    part_check = staticmethod(SweepPartCheck)

    def compute(self, number: int) -> PartResult:
        """Compute one part. Raises ModelError if its model cannot be loaded; all other errors are rows of the table."""
        part = self.config.parts[number]
        model = self.model(part.model)
        refuse_edited(model)
        prompts = self.prompts(part, model)
        reasons = dict.fromkeys(part.examples, prompts.error) if prompts.error else dict(prompts.failed)
        good = [i for i in part.examples if i not in reasons]
        bad = {i: str(reasons[i]) for i in part.examples if i in reasons}
        measurement = _PartMeasurement(self, part, model, prompts)
        frames = measurement.measure(good)
        bad |= measurement.failed
        if bad:
            frames.append(failed_rows(sorted(bad), [bad[i] for i in sorted(bad)]))
        labels = dict(zip(("model", "task", "recipe", "sites", "seed"), part.combination, strict=True))
        tables = [table_of(frame, {**labels, "part": part.number}) for frame in frames]
        table = pa.concat_tables(tables) if tables else table_of(pd.DataFrame(), {})
        failed = table.num_rows - table["error"].null_count
        about = {
            "provenance": {**measurement.provenance, "behaviour": prompts.behaviour}, "error": prompts.error,
            "identity": prompts.identity, "made_with": made_with(model),
        }  # fmt: skip
        return PartResult(table, failed, about, {"halved": measurement.halved} if measurement.halved else {})

    def shared_file(self, part: int) -> str:
        """Name the file of the run with the part's prompts."""
        return frozen_name(self.config.parts[part])

    def model(self, spec: ModelSpec) -> Any:
        """Return the model, which is loaded once and kept until another one is needed."""
        if spec.name in self.given_models:
            return self.given_models[spec.name]
        if self.loaded is None or self.loaded[0] != spec.name:
            from interp.model.load_model import load

            self.loaded = self.warmed_up_for = None
            self.shared.clear()
            gc.collect()
            self.loaded = spec.name, load(spec.load, **spec.options)
        return self.loaded[1]

    def prompt_hash(self, part: SweepPart, prompts: PromptSet, model: Any) -> str:
        """Return the hash of a set's usable prompts and of their token ids."""
        key = part.model.name, part.task.name, part.seed
        if key not in self.hashes:
            usable = [prompts.prompts[i] for i in prompts.usable]
            self.hashes[key] = hash_of_prompts(usable, encode_any(usable, model.coder, "declared", strings=True)[0])
        return self.hashes[key]

    def lengths_differ(self, part: SweepPart, prompts: PromptSet, model: Any) -> bool:
        """Return whether clean prompts of a set differ in length, so that parts of it name positions alike."""
        key = part.model.name, part.task.name, part.seed
        if key not in self.unequal:
            usable = [prompts.prompts[i] for i in prompts.usable]
            encoded = encode_any(usable, model.coder, "declared", strings=True)[0] if usable else []
            self.unequal[key] = len({len(e.clean) for e in encoded}) > 1
        return self.unequal[key]

    def prompts(self, part: SweepPart, model: Any) -> PromptSet:
        """Return the part's frozen prompts, and make them if the run does not have them yet.

        Raises ModelError if the model is not the one that they, or the finished parts, were made with: other weights,
        another dtype or other token ids.
        """
        key = part.model.name, part.task.name, part.seed
        if key not in self.sets:
            prompt_set = self._frozen(part) or self._make_prompts(part, model)
            check_model(prompt_set, model, f"{part.model.name} ({part.model.load})")
            self.sets[key] = prompt_set
        if self.warmed_up_for != key:
            self.warmed_up_for = key
            if self.sets[key].error is None:
                self.warm_up(model, [self.sets[key].prompts[i] for i in self.sets[key].usable])
        return self.sets[key]

    def _frozen(self, part: SweepPart) -> PromptSet | None:
        """Return the part's frozen prompts; None if the run has none that can be trusted."""
        name = frozen_name(part)
        return trusted_set(self.files, name, self.groups[name])

    def _make_prompts(self, part: SweepPart, model: Any) -> PromptSet:
        """Make and freeze the part's prompts. ModelError if the parts that are finished had others."""
        file = None
        if part.task.pairs is not None:
            file = self.files.get(f"inputs/{input_name(part.task)}")
            if file is None or prompt_sets.digest_of(file) != part.task.pairs_digest:
                raise InterpError(f"the run's copy of {part.task.pairs} is missing or damaged: make the run anew")
        self.warmed_up_for = None
        new_set = make_set(model, part.task, part.seed, file, partial(self._check_task, model, part)).encoded()
        self.check_new_content(part.number, new_set)
        content = self.files.keep(frozen_name(part), new_set)
        self.warmed_up_for = (part.model.name, part.task.name, part.seed) if content == new_set else None
        return PromptSet.decoded(content)

    def shared_content(self, part: int) -> bytes | None:
        """Return the part's frozen prompts as the run has them; None if they have to be made."""
        prompts = self._frozen(self.config.parts[part])
        return None if prompts is None else self.files.get(self.shared_file(part))

    def check_new_content(self, part: int, content: bytes) -> None:
        """Raise ModelError if prompts to be frozen contradict every part that was finished with others before."""
        at = self.config.parts[part]
        recorded = self.files.recorded(self.groups[frozen_name(at)])
        if words := contradiction(PromptSet.decoded(content), recorded, "now")[0]:
            raise ModelError(
                f"{at.model.name} ({at.model.load}): the finished parts were computed with {', '.join(words)}, and "
                "new numbers would not belong with them. Make a new run"
            )

    def _check_task(self, model: Any, part: SweepPart, prompts: Prompts) -> str:
        """Return how well a model does a task; the engine is then warmed up for these prompts."""
        from interp.sweep.task_check import BaseRuns, check_task

        self.warm_up(model, prompts)
        runs = BaseRuns(model, self.config.engine, self.config.memory)
        return check_task(runs, prompts, lambda some: as_task(some, part.task, part.seed), part.task.require)

    def warm_up(self, model: Any, prompts: Prompts, anew: bool = False) -> None:
        """Make what the engine knows about a model the same before every part of these prompts."""
        from interp.engine.warm_up import warm_up

        warm_up(model, prompts, self.config.engine, self.config.memory, anew)


def made_with(model: Any) -> dict[str, str]:
    """Return what may change a number's last digits: device, backend, and the versions of our code and of libraries."""
    device, backend = str(model.device).partition(":")[0], str(model.instrument.backend)
    return {"device": device, "backend": backend, "code": code_hash(), **versions()}


def input_name(task: Any) -> str:
    """Return the name of the file in the run's ``inputs`` that holds a copy of a task's prompt file."""
    from pathlib import Path

    return f"{task.pairs_digest}{Path(str(task.pairs)).suffix.lower()}"


class _PartMeasurement:
    """Measures one part as a whole; after an error, example by example."""

    def __init__(self, job: EffectsJob, part: SweepPart, model: Any, prompts: PromptSet):
        self.job, self.part, self.model, self.prompts = job, part, model, prompts
        self.recipe = RECIPES[part.recipe.recipe]
        self.usable = prompts.usable
        self.failed: dict[int, str] = {}
        self.provenance: dict[str, Any] = {}
        self.halved = 0

    def measure(self, examples: Sequence[int]) -> list[pd.DataFrame]:
        """Return the rows of the examples: out of memory, of each half; after any other error, of each example.

        Before a single example, the engine's checks are made again, so that its numbers do not depend on which parts
        this process has computed before.
        """
        if not examples:
            return []
        try:
            frame = self.run(examples)
        except SiteError as error:
            self.failed |= dict.fromkeys(examples, _reason(error))
            return []
        except Exception as error:
            return self._after_error(examples, error)
        if _lacks_number(frame).any():
            if len(examples) == 1:
                return [_with_reasons(frame, self.part.recipe.metric)]
            return self._one_by_one(examples)
        return [frame]

    def _after_error(self, examples: Sequence[int], error: Exception) -> list[pd.DataFrame]:
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
        return [*self.measure(examples[:half]), *self.measure(examples[half:])]

    def _one_by_one(self, examples: Sequence[int]) -> list[pd.DataFrame]:
        frames = []
        usable = [self.prompts.prompts[i] for i in self.usable]
        for i in examples:
            self.job.warm_up(self.model, usable, anew=True)
            frames += self.measure([i])
        self.job.warm_up(self.model, usable, anew=True)
        return frames

    def run(self, examples: Sequence[int]) -> pd.DataFrame:
        """Run the recipe on some examples; rows have the examples' numbers in the set, and may be NaN."""
        differ = self.job.lengths_differ(self.part, self.prompts, self.model)
        numbers, prompts, subset = prompts_of_call(self.part, self.prompts, examples, differ, self.job.shared)
        recipe, arguments = call_of(self.job.config, self.part, self.model)
        if self.recipe.prepare:  # it has recorded other texts
            self.job.warm_up(self.model, [self.prompts.prompts[i] for i in self.usable])
        effects = recipe(self.model, prompts, **arguments, subset=subset)
        self.provenance = {k: v for k, v in effects.provenance.items() if k not in ("created", "prompts", "n_prompts")}
        self.provenance |= {
            "prompts": self.job.prompt_hash(self.part, self.prompts, self.model),
            "n_prompts": len(self.usable),
        }
        frame = effects.frame()
        frame["example"] = np.asarray(numbers)[frame["example"].to_numpy(dtype=int)]
        return frame


def call_of(config: Config, part: SweepPart, model: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
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


def prompts_of_call(
    part: SweepPart,
    prompts: PromptSet,
    examples: Sequence[int],
    lengths_differ: bool,
    means: dict[Any, Any] | None = None,
) -> tuple[list[int], Any, Any]:
    """Return the numbers of the prompts that a recipe is given for some examples, the prompts, and a `Subset`.

    A recipe whose means or donors depend on all prompts is given all, and runs the examples. ``lengths_differ``: of
    all prompts of the set.
    """
    from interp.recipes.sweep_loop import Subset

    usable, whole = prompts.usable, RECIPES[part.recipe.recipe].whole_set
    index = {number: i for i, number in enumerate(usable)}
    numbers = usable if whole else list(examples)
    asked = range(index[examples[0]], index[examples[-1]] + 1) if whole else None
    task_prompts = as_task([prompts.prompts[i] for i in numbers], part.task, part.seed)
    return numbers, task_prompts, Subset(asked, keep_nan=True, means=means, lengths_differ=lengths_differ)


def _lacks_number(frame: pd.DataFrame) -> np.ndarray:
    return frame["patched"].isna().to_numpy() | frame["clean"].isna().to_numpy()


def _with_reasons(frame: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Return the frame with an ``error`` for each row without a number."""
    runs = np.where(frame["clean"].isna(), "the clean run", "the changed run")
    reasons = [
        f"the metric {metric} of {run} is NaN" if is_missing else None
        for run, is_missing in zip(runs, _lacks_number(frame), strict=True)
    ]
    return frame.assign(error=reasons)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:2000]
