"""A sweep's config: models × tasks × recipes × sites × seeds, from TOML.

Values are typed; errors name key and line.

The config, and its digest, contain everything that decides results. How a sweep is carried out (executor, workers,
folders) is not part of it: that is given at each start, and may differ from one start to the next.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from interp.errors import InterpError
from interp.recipes.registry import RECIPES
from interp.sweep.config_sections import (
    ModelSpec,
    RecipeSpec,
    SitesSpec,
    TaskSpec,
    read_model,
    read_recipe,
    read_sites,
    read_task,
)
from interp.sweep.config_table import REQUIRED, Source, Table
from interp.sweep.toml_lines import key_lines
from interp.utils.checks import list_of, name, one_of, text, whole, without_none

VERSION = 1
MOST_BYTES = 2**20  # of a config; a page of text has 3,000
MOST_DOTS = 200  # of a line
MOST_PARTS = 1_000_000
MOST_EXAMPLES = 100_000  # of a part, which is held in memory


@dataclass(frozen=True)
class SweepPart:
    """The unit that is computed and stored together: some examples of one combination."""

    number: int
    model: ModelSpec
    task: TaskSpec
    recipe: RecipeSpec
    sites: SitesSpec | None
    seed: int
    examples: range

    @property
    def combination(self) -> tuple[str, str, str, str, int]:
        """Names of model, task, recipe and sites, and the seed, that all rows of the part share."""
        return self.model.name, self.task.name, self.recipe.name, self.sites.name if self.sites else "", self.seed

    def __str__(self) -> str:
        *names, seed = self.combination
        words = " × ".join(n for n in names if n)
        return f"part {self.number} ({words}, seed {seed}, examples {self.examples.start}–{self.examples.stop - 1})"


@dataclass(frozen=True)
class Config:
    """A whole sweep.

    ``document`` is its frozen form: plain tables with every default written out.
    """

    name: str
    seeds: tuple[int, ...]
    examples_per_part: int
    engine: Any  # as an EngineKind
    memory: str | None
    models: tuple[ModelSpec, ...]
    tasks: tuple[TaskSpec, ...]
    recipes: tuple[RecipeSpec, ...]
    sites: tuple[SitesSpec, ...]
    folder: Path | None = field(default=None, compare=False)

    @cached_property
    def document(self) -> dict[str, Any]:
        """The config as plain tables with every default written out; `parse` reads it back."""
        shown: dict[str, Any] = {
            "version": VERSION, "name": self.name, "seeds": list(self.seeds),
            "examples_per_part": self.examples_per_part, "engine": self.engine, "memory": self.memory,
            "models": [{"name": m.name, "load": m.load, **m.options} for m in self.models],
            "tasks": [
                {"name": t.name, "n": t.n, "require": t.require, "task": t.task, "pairs": t.pairs,
                 "pairs_digest": t.pairs_digest, "facts": t.facts or None, "options": dict(t.options)}
                for t in self.tasks
            ],
            "recipes": [
                {"name": r.name, "recipe": r.recipe, "metric": r.metric, "tasks": list(r.tasks),
                 "sites": list(r.sites) or None, **r.options}
                for r in self.recipes
            ],
            "sites": [
                {"name": s.name, "sites": s.sites, "layers": s.layers, "groups": s.groups and dict(s.groups)}
                for s in self.sites
            ] or None,
        }  # fmt: skip
        return without_none(shown)

    @property
    def digest(self) -> str:
        """Hash of everything that decides results."""
        return hashlib.blake2b(json.dumps(self.document, sort_keys=True).encode(), digest_size=16).hexdigest()

    @cached_property
    def parts(self) -> list[SweepPart]:
        """All parts, in order; the parts of one model are consecutive."""
        return list(self._parts())

    def _parts(self) -> Iterator[SweepPart]:
        tasks, sites = {t.name: t for t in self.tasks}, {s.name: s for s in self.sites}
        number = 0
        for model in self.models:
            for task in self.tasks:
                for seed in self.seeds:
                    for recipe in self.recipes:
                        if task.name not in recipe.tasks:
                            continue
                        for label in recipe.sites or (None,):
                            for start in range(0, task.n, self.examples_per_part):
                                examples = range(start, min(start + self.examples_per_part, task.n))
                                swept = sites[label] if label is not None else None
                                yield SweepPart(number, model, tasks[task.name], recipe, swept, seed, examples)
                                number += 1

    def file_of(self, task: TaskSpec) -> Path:
        """Return the file of a task with custom prompts."""
        assert task.pairs is not None
        return (self.folder or Path()) / task.pairs


def read_config(path: str | Path) -> Config:
    """Read and check a TOML file.

    Raises InterpError with file, line and key for anything wrong.
    """
    return parse_toml(config_text(path), str(path), Path(path).parent)


def config_text(path: str | Path) -> str:
    """Return the text of a config file, which may be a pipe.

    InterpError if it cannot be read, or is too long.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_BYTES + 1)
        decoded = content.decode("utf-8-sig", errors="strict" if len(content) <= MOST_BYTES else "replace")
    except (OSError, ValueError) as error:
        raise InterpError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > MOST_BYTES:
        raise InterpError(
            f"{path} is longer than a config may be, {MOST_BYTES / 1e6:.0f} MB: is it the right file? Prompts belong "
            "in a separate .csv or .jsonl file (pairs = …)"
        )
    return decoded.replace("\r\n", "\n")


def parse_toml(content: str, file: str = "the config", folder: Path | None = None) -> Config:
    """Return the config of a TOML text."""
    deep = next((i for i, line in enumerate(content.split("\n"), 1) if line.count(".") > MOST_DOTS), None)
    if deep is not None:  # tomllib takes a time that grows with the square of a key's length
        raise InterpError(f"{file}, line {deep}: more than {MOST_DOTS} dots in one line, which no config needs")
    try:
        document, lines = tomllib.loads(content), key_lines(content)
    except RecursionError:
        raise InterpError(f"{file} is not valid TOML: it is nested too deeply") from None
    except (ValueError, MemoryError) as error:  # TOMLDecodeError, or a number of thousands of digits
        raise InterpError(f"{file} is not valid TOML: {error}") from None
    return parse(document, Source(file, lines), folder or Path())


def parse(document: Any, source: Source | None = None, folder: Path | None = None) -> Config:
    """Return the config of plain tables.

    ``folder``: files are read relative to it. None: of a run that exists already, whose files are not read again.
    """
    source = source or Source("the config", {})
    top = Table(source, (), document)
    version = top.take("version", whole(1), VERSION)
    if version > VERSION:
        raise top.refuse("version", f" = {version}: written for a newer interp; this one reads version {VERSION}")
    label = top.take("name", name)
    seeds = top.take("seeds", list_of(whole(0, 2**31 - 1)), [0])
    size = top.take("examples_per_part", whole(1, MOST_EXAMPLES), 8)
    engine = top.take("engine", one_of("auto", "fast", "naive"), "auto")
    memory = top.take("memory", _memory if folder is not None else text, None)
    raw = {
        key: top.take(key, _tables, [] if key == "sites" else REQUIRED)
        for key in ("models", "tasks", "recipes", "sites")
    }
    top.done()
    read = {key: [Table(source, (key, i), t) for i, t in enumerate(tables)] for key, tables in raw.items()}
    models = tuple(read_model(t, folder is not None) for t in read["models"])
    tasks = tuple(read_task(t, folder) for t in read["tasks"])
    sites = tuple(read_sites(t, folder is not None) for t in read["sites"])
    recipes = tuple(read_recipe(t, tasks, sites, folder is not None) for t in read["recipes"])
    for key, specs in (("models", models), ("tasks", tasks), ("recipes", recipes), ("sites", sites)):
        names = [spec.name for spec in specs]
        twice = next((i for i, n in enumerate(names) if n in names[:i]), None)
        if twice is not None:
            raise source.refuse((key, twice), f": a second one named {names[twice]!r}; give each a different name = …")
    config = Config(label, tuple(seeds), size, engine, memory, models, tasks, recipes, sites, folder)
    _check_product(config, source)
    return config


def _memory(value: Any) -> str:
    """A number of bytes with a unit, such as 4GiB."""
    from interp.engine.budget import as_bytes

    try:
        as_bytes(text(value))
    except InterpError as error:
        raise ValueError(str(error).partition(": ")[2]) from None
    return value


def _tables(value: Any) -> list[Any]:
    """One or more tables."""
    if not isinstance(value, list) or not value:
        raise ValueError("one or more tables expected, written [[…]]")
    return value


def _check_product(config: Config, source: Source) -> None:
    """Raise InterpError for a config with unused tables, repeated results or too many parts."""
    used = {s for r in config.recipes for s in r.sites}
    for i, site in enumerate(config.sites):
        if site.name not in used:
            raise source.refuse(("sites", i), f": no recipe sweeps over {site.name!r}")
    for i, task in enumerate(config.tasks):
        if not any(task.name in r.tasks for r in config.recipes):
            raise source.refuse(("tasks", i), f": no recipe takes {task.name!r}")
    for i, recipe in enumerate(config.recipes):
        random = RECIPES[recipe.recipe].is_random(recipe.options)
        fixed = [t.name for t in config.tasks if t.pairs and t.name in recipe.tasks]
        if len(config.seeds) > 1 and fixed and not random:
            raise source.refuse(
                ("recipes", i),
                f": {recipe.recipe} on {fixed[0]!r} has nothing random in it, so that {len(config.seeds)} seeds "
                "would count the same numbers several times; use seeds = [0], or other tasks",
            )
    n = sum(
        -(-t.n // config.examples_per_part) * max(1, len(r.sites)) * len(config.seeds) * len(config.models)
        for r in config.recipes for t in config.tasks if t.name in r.tasks
    )  # fmt: skip
    if n > MOST_PARTS:
        raise source.refuse(
            ("examples_per_part",),
            f": {n} parts, and a run has at most {MOST_PARTS}; put more examples in a part",
        )
