"""A sweep's config: models × tasks × recipes × sites × seeds, typed, from TOML, with errors that name key and line.

What decides results is in here, and in the config's digest. How a sweep is carried out (executor, workers, folders) is
not: that is said when it is started, and may differ from one start to the next.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from interp.errors import InterpError
from interp.sweep import fields
from interp.sweep.fields import REQUIRED, Source, Table, list_of, name, one_of, spelled, text, whole
from interp.sweep.recipe_fields import METRICS, RECIPES, ranges
from interp.sweep.toml_lines import key_lines

VERSION = 1
MOST_BYTES = 2**20  # of a config: a page of text has 3,000
MOST_PARTS = 1_000_000
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz")
DTYPES = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelSpec:
    """One model: ``load`` is what `interp.load` takes, the rest its options."""

    name: str
    load: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSpec:
    """One set of prompts: a task's, or those of a file (``pairs``, with the digest of its contents)."""

    name: str
    n: int
    require: float
    task: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    pairs: str | None = None
    pairs_digest: str | None = None
    facts: bool = False


@dataclass(frozen=True)
class RecipeSpec:
    """One recipe with its options; ``tasks`` and ``sites``: the names of those it is run on."""

    name: str
    recipe: str
    metric: str
    tasks: tuple[str, ...]
    sites: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SitesSpec:
    """Sites by the grammar of ``--sites``, or groups of them."""

    name: str
    sites: str | None = None
    layers: str | None = None
    groups: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Part:
    """The smallest piece of a sweep that is computed and stored as one: some examples of one combination."""

    number: int
    model: ModelSpec
    task: TaskSpec
    recipe: RecipeSpec
    sites: SitesSpec | None
    seed: int
    examples: range

    @property
    def combination(self) -> tuple[str, str, str, str, int]:
        """What its rows have in common."""
        return self.model.name, self.task.name, self.recipe.name, self.sites.name if self.sites else "", self.seed

    def __str__(self) -> str:
        *names, seed = self.combination
        words = " × ".join(n for n in names if n)
        return f"part {self.number} ({words}, seed {seed}, examples {self.examples.start}–{self.examples.stop - 1})"


@dataclass(frozen=True)
class Config:
    """A whole sweep. ``document`` is what it was made of, with every default spelled out: the frozen form."""

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
        """The config as plain tables, every default spelled out; `parse` reads it back."""
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
        return _without_none(shown)

    @property
    def digest(self) -> str:
        """A hash of everything that decides results."""
        return hashlib.blake2b(json.dumps(self.document, sort_keys=True).encode(), digest_size=16).hexdigest()

    @cached_property
    def parts(self) -> list[Part]:
        """All parts, in order: the parts of one model stand together."""
        return list(self._parts())

    def _parts(self) -> Iterator[Part]:
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
                                chosen = sites[label] if label is not None else None
                                yield Part(number, model, tasks[task.name], recipe, chosen, seed, examples)
                                number += 1

    def file_of(self, task: TaskSpec) -> Path:
        """Where the prompts of a task of one's own were read."""
        assert task.pairs is not None
        return (self.folder or Path()) / task.pairs


def read_config(path: str | Path) -> Config:
    """Read and check a TOML file. InterpError, naming file, line and key, for whatever is wrong with it."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise InterpError(
                f"{path} has {size / 1e6:.0f} MB, and a config at most {MOST_BYTES / 1e6:.0f} MB: is it the "
                "right file? Prompts belong in a .csv or .jsonl file of their own (pairs = …)"
            )
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InterpError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    return parse_toml(content, str(path), path.parent)


def parse_toml(content: str, file: str = "the config", folder: Path | None = None) -> Config:
    """The config that a TOML text says."""
    try:
        document = tomllib.loads(content)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InterpError(f"{file} is not valid TOML: {error}") from None
    return parse(document, Source(file, key_lines(content)), folder or Path())


def parse(document: Any, source: Source | None = None, folder: Path | None = None) -> Config:
    """The config that plain tables say. ``folder``: against which files are read; None: they are not read again."""
    source = source or Source("the config", {})
    top = Table(source, (), document)
    version = top.take("version", whole(1), VERSION)
    if version > VERSION:
        raise top.refuse("version", f" = {version}: written for a newer interp; this one reads version {VERSION}")
    label = top.take("name", name)
    seeds = top.take("seeds", list_of(whole(0, 2**31 - 1)), [0])
    size = top.take("examples_per_part", whole(1), 8)
    engine = top.take("engine", one_of("auto", "fast", "naive"), "auto")
    memory = top.take("memory", text, None)
    raw = {
        key: top.take(key, _tables, [] if key == "sites" else REQUIRED)
        for key in ("models", "tasks", "recipes", "sites")
    }
    top.done()
    read = {key: [Table(source, (key, i), t) for i, t in enumerate(listed)] for key, listed in raw.items()}
    models = tuple(_model(t) for t in read["models"])
    tasks = tuple(_task(t, folder) for t in read["tasks"])
    sites = tuple(_sites(t) for t in read["sites"])
    recipes = tuple(_recipe(t, tasks, sites) for t in read["recipes"])
    for key, listed in (("models", models), ("tasks", tasks), ("recipes", recipes), ("sites", sites)):
        names = [item.name for item in listed]
        twice = next((i for i, n in enumerate(names) if n in names[:i]), None)
        if twice is not None:
            raise source.refuse((key, twice), f": a second one named {names[twice]!r}; give each its own name = …")
    config = Config(label, tuple(seeds), size, engine, memory, models, tasks, recipes, sites, folder)
    _check_product(config, source)
    return config


def _tables(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError("one or more tables expected, written [[…]]")
    return value


def _model(table: Table) -> ModelSpec:
    load = table.take("load", text)
    if load.lower().endswith(PICKLES):
        raise table.refuse(
            "load",
            f" = {load!r}: pickled weights can run code when they are read, and are refused; give a folder of "
            "safetensors, "
            "a .gguf file or a hub id",
        )
    options = {
        "dtype": table.take("dtype", one_of(*DTYPES), None),
        "device": table.take("device", text, None),
        "revision": table.take("revision", text, None),
        "backend": table.take("backend", one_of("auto", "reference", "blocked", "triton", "cpu"), None),
        "device_map": table.take("device_map", _device_map, None),
    }
    label = table.take("name", name, _label(load))
    table.done()
    if options["device_map"] is not None and options["device"] is not None:
        raise table.refuse("device_map", ": device and device_map cannot both say where the model goes; leave one out")
    return ModelSpec(label, load, _without_none(options))


def _device_map(value: Any) -> Any:
    if isinstance(value, dict) and value and all(isinstance(v, int | str) for v in value.values()):
        return value
    return text(value)


def _task(table: Table, folder: Path | None) -> TaskSpec:
    require = table.take("require", fields.number(0, 1), 0.8)
    if "pairs" in table and "task" in table:
        raise table.refuse("pairs", ": give task or pairs, not both")
    if "pairs" in table:
        return _own_prompts(table, folder, require)
    task = table.take("task", one_of(*task_names()))
    n = table.take("n", whole(1), 64)
    options = table.take("options", _options(task), {})
    label = table.take("name", name, task)
    facts = table.take("facts", fields.flag, task == "facts")
    table.done()
    return TaskSpec(label, n, require, task, options, facts=facts)


def _own_prompts(table: Table, folder: Path | None, require: float) -> TaskSpec:
    from interp.prompt_files import read_prompts
    from interp.prompts import Fact

    file = table.take("pairs", text)
    if file.lower().endswith(PICKLES):
        raise table.refuse(
            "pairs",
            f" = {file!r}: pickled data can run code when it is read, and is refused; write the prompts as .csv or "
            ".jsonl",
        )
    label = table.take("name", name, _label(Path(file).stem))
    n, digest = table.take("n", whole(1), None), table.take("pairs_digest", text, None)
    facts, _ = table.take("facts", fields.flag, False), table.take("options", _options(None), {})
    table.done()
    if folder is not None:
        try:
            prompts = read_prompts(folder / file)
            content = (folder / file).read_bytes()
        except InterpError as error:
            raise table.refuse("pairs", f": {error}") from None
        kinds = {isinstance(p, Fact) for p in prompts}
        if len(kinds) > 1:
            raise table.refuse("pairs", f": {file} holds both pairs and facts; give each a file of its own")
        if n is not None and n > len(prompts):
            raise table.refuse("n", f" = {n}, but {file} holds {len(prompts)} prompts")
        found = hashlib.blake2b(content, digest_size=16).hexdigest()
        n, digest, facts = n or len(prompts), found, kinds.pop()
    if n is None or digest is None:
        raise table.refuse("pairs", ": n and pairs_digest are missing beside it")
    return TaskSpec(label, n, require, pairs=file, pairs_digest=digest, facts=facts)


def task_names() -> list[str]:
    """The tasks of `interp.tasks`: its functions that make ``n`` prompts for a model from a seed."""
    return [n for n, parameters in _task_parameters().items() if {"n", "seed"} <= set(parameters)]


def _task_parameters() -> dict[str, Mapping[str, inspect.Parameter]]:
    from interp import tasks

    functions = {n: getattr(tasks, n) for n in tasks.__all__}
    return {n: inspect.signature(f).parameters for n, f in functions.items() if inspect.isfunction(f)}


def _options(task: str | None) -> fields.Check:
    def check(value: Any) -> dict[str, Any]:
        known = [p for p in (_task_parameters()[task] if task else ()) if p not in ("model", "n", "seed")]
        if not isinstance(value, dict) or any(
            not isinstance(v, str | int | float | bool | list) for v in value.values()
        ):
            raise ValueError("a table of plain values expected")
        if unknown := [k for k in value if k not in known]:
            raise ValueError(f"{unknown[0]!r} is no option of {task}; options: {', '.join(known) or 'none'}")
        return value

    return check


def _sites(table: Table) -> SitesSpec:
    chosen, groups = table.take("sites", text, None), table.take("groups", _groups, None)
    if chosen is None and groups is None:
        raise table.source.refuse(
            table.path, ": sites = … (a component or sites, as for --sites) or groups = … expected"
        )
    layers = table.take("layers", ranges, None)
    if layers is not None and chosen is None:
        raise table.refuse("layers", ": layers choose among sites = …, and there is none")
    label = table.take("name", name, _label(chosen or "groups"))
    table.done()
    return SitesSpec(label, chosen, layers, groups)


def _groups(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value or not all(isinstance(v, str) and v.strip() for v in value.values()):
        raise ValueError('a table of sites by name expected: {movers = "z.L9H6,z.L10H0"}')
    return value


def _recipe(table: Table, tasks: tuple[TaskSpec, ...], sites: tuple[SitesSpec, ...]) -> RecipeSpec:
    kind = table.take("recipe", one_of(*RECIPES))
    known = RECIPES[kind]
    options = {key: table.take(key, check, None) for key, check in known.keys.items()}
    metric = table.take("metric", one_of(*METRICS), known.metric)
    names = [t.name for t in tasks]
    fitting = [t.name for t in tasks if known.facts or not t.facts]
    on = table.take("tasks", list_of(one_of(*names)), names)
    if unfit := [n for n in on if n not in fitting]:
        raise table.refuse(
            "tasks",
            f": {kind} compares a clean and a corrupt prompt, and {unfit[0]!r} holds facts, which have none: use the "
            "task "
            "fact_pairs, or tasks = […] to leave it out here",
        )
    labels = [s.name for s in sites]
    if known.sites and not sites:
        raise table.source.refuse(table.path, f": {kind} sweeps over sites, and there is no [[sites]]")
    if "sites" in table and not known.sites:
        raise table.refuse("sites", f": {kind} takes no [[sites]]; it has its own: {', '.join(known.keys)}")
    where = table.take("sites", list_of(one_of(*labels)), labels) if known.sites else []
    label = table.take("name", name, kind)
    table.done()
    if kind == "path_patch" and options["senders"] is None:
        options["senders"] = "z"
    if kind == "trace" and options["sever"] is not None and (options["component"] or "resid_post") != "resid_post":
        raise table.refuse("sever", " needs component = 'resid_post'")
    if kind == "path_patch" and options["using"] == "zero" and options["mode"] == "denoise":
        raise table.refuse("using", " = 'zero' needs mode = 'noise'")
    if metric == "logit_diff" and (bare := [t.name for t in tasks if t.facts and t.name in on]):
        raise table.refuse(
            "metric", f" = 'logit_diff' needs a foil, and facts ({bare[0]!r}) have none: use prob or logprob"
        )
    return RecipeSpec(label, kind, metric, tuple(on), tuple(where), _without_none(options))


def _check_product(config: Config, source: Source) -> None:
    """Refuse what would run nothing, the same thing twice, or for ever."""
    used = {s for r in config.recipes for s in r.sites}
    for i, site in enumerate(config.sites):
        if site.name not in used:
            raise source.refuse(("sites", i), f": no recipe sweeps over {site.name!r}")
    for i, task in enumerate(config.tasks):
        if not any(task.name in r.tasks for r in config.recipes):
            raise source.refuse(("tasks", i), f": no recipe takes {task.name!r}")
    for i, recipe in enumerate(config.recipes):
        random = RECIPES[recipe.recipe].seeded and (
            recipe.recipe != "ablate" or recipe.options.get("using") == "resample"
        )
        fixed = [t.name for t in config.tasks if t.pairs and t.name in recipe.tasks]
        if len(config.seeds) > 1 and fixed and not random:
            raise source.refuse(
                ("recipes", i),
                f": {recipe.recipe} on {fixed[0]!r} has nothing random in it, so that {len(config.seeds)} seeds "
                "would count "
                "the same numbers several times; give seeds = [0], or other tasks",
            )
    n = sum(
        -(-t.n // config.examples_per_part) * max(1, len(r.sites)) * len(config.seeds) * len(config.models)
        for r in config.recipes for t in config.tasks if t.name in r.tasks
    )  # fmt: skip
    if n > MOST_PARTS:
        raise source.refuse(
            ("examples_per_part",),
            f": {n} parts, and at most {MOST_PARTS} can be kept apart; take more examples in a part",
        )


def _label(value: str) -> str:
    """A name made of what there is."""
    kept = "".join(c if c.isalnum() or c in "._+@=-" else "-" for c in Path(value).name or value)
    return kept.strip("-. ")[:60] or "unnamed"


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def differences(before: Any, after: Any) -> list[str]:
    """What changed from one document to another, one line a key."""
    old, new = _flat(before), _flat(after)
    lines = []
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            lines.append(f"  {key}: {old.get(key, 'not there')} → {new.get(key, 'not there')}")
    return lines


def _flat(value: Any, path: tuple[str | int, ...] = ()) -> dict[str, str]:
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {spelled(path): json.dumps(value)}
    return {k: v for key, inner in items for k, v in _flat(inner, (*path, key)).items()}


def closest(word: str, known: list[str]) -> str:
    """``did you mean …?``, or what there is."""
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}"
