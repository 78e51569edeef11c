"""The tables of a sweep's config (models, tasks, recipes, sites): their types, and how each is read."""

from __future__ import annotations

import hashlib
import inspect
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from interp.errors import InterpError
from interp.metrics import METRICS
from interp.prompts.special_tokens import BosPolicy
from interp.recipes.choices import DTYPES
from interp.recipes.options import RECEIVERS, SITE, SITES, Option
from interp.recipes.registry import RECIPES, Recipe
from interp.recipes.selection import layers_text, single_sites, sites_text
from interp.sweep.config_table import REQUIRED, Table
from interp.utils.arguments import is_whole
from interp.utils.checks import Check, flag, list_of, name, number, one_of, text, whole, without_none
from interp.utils.files import PICKLES

if TYPE_CHECKING:
    from interp.tasks import Task

MOST_PROMPTS = 10_000_000  # of a task: all are generated before the first is measured


@dataclass(frozen=True)
class ModelSpec:
    """One model: ``load`` is the argument of `interp.load`, ``options`` its keyword arguments."""

    name: str
    load: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TaskSpec:
    """One set of prompts: those of a task, or of a file (``pairs``, with the digest of its contents)."""

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
    """One recipe with its options; ``tasks`` and ``sites``: the names of those that it runs on."""

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


def read_model(table: Table, fresh: bool = True) -> ModelSpec:
    """Read a table of [[models]].

    ``fresh``: it is not from an existing run, which may name what is refused by now.
    """
    load = table.take("load", text)
    if load.lower().endswith(PICKLES):
        raise table.refuse(
            "load",
            f" = {load!r}: pickled weights can run code when they are read, and are refused; give a folder of "
            "safetensors, a "
            ".gguf file or a hub id",
        )
    options = {
        "dtype": table.take("dtype", one_of(*DTYPES), None),
        "device": table.take("device", text, None),
        "revision": table.take("revision", text, None),
        "backend": table.take("backend", _backend if fresh else text, None),
        "device_map": table.take("device_map", _device_map, None),
        "bos": table.take("bos", _bos, None),
    }
    label = table.take("name", name, _label(load))
    table.done()
    if options["device_map"] is not None and options["device"] is not None:
        raise table.refuse("device_map", ": device and device_map cannot both say where the model goes; leave one out")
    return ModelSpec(label, load, without_none(options))


def _backend(value: Any) -> str:
    from headstats.backends import BACKENDS

    return one_of("auto", *BACKENDS)(value)


def _bos(value: Any) -> BosPolicy:
    if value == "tokenizer" or isinstance(value, bool):
        return value
    raise ValueError('true, false or "tokenizer" expected')


def _device_map(value: Any) -> Any:
    if isinstance(value, dict) and value and all(is_whole(v) or isinstance(v, str) for v in value.values()):
        return value
    return text(value)


def read_task(table: Table, folder: Path | None) -> TaskSpec:
    """Read a table of [[tasks]]; a file of prompts is read from ``folder`` (None: it is not read again)."""
    require = table.take("require", number(0, 1), 0.8)
    if "pairs" in table and "task" in table:
        raise table.refuse("pairs", ": give task or pairs, not both")
    if "pairs" in table:
        return _own_prompts(table, folder, require)
    task = table.take("task", one_of(*makers()))
    n = table.take("n", whole(1, MOST_PROMPTS), 64)
    options = table.take("options", _options(task), {})
    label = table.take("name", name, task)
    facts = table.take("facts", flag, task == "facts")
    table.done()
    return TaskSpec(label, n, require, task, options, facts=facts)


def _own_prompts(table: Table, folder: Path | None, require: float) -> TaskSpec:
    from interp.prompts.files import read_prompts
    from interp.prompts.pairs import Fact

    file = table.take("pairs", text)
    if file.lower().endswith(PICKLES):
        raise table.refuse(
            "pairs",
            f" = {file!r}: pickled data can run code when it is read, and is refused; write the prompts as .csv "
            "or .jsonl",
        )
    label = table.take("name", name, _label(Path(file).stem))
    n, digest = table.take("n", whole(1, MOST_PROMPTS), None), table.take("pairs_digest", text, None)
    facts, _ = table.take("facts", flag, False), table.take("options", _options(None), {})
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
        n, facts = n or len(prompts), kinds.pop()
        digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    if n is None or digest is None:
        raise table.refuse("pairs", ": n and pairs_digest are missing next to it")
    return TaskSpec(label, n, require, pairs=file, pairs_digest=digest, facts=facts)


def makers() -> dict[str, Task]:
    """Return what ``task = "…"`` may name: the functions of `interp.tasks` that make prompts, and ``--task``'s names.

    ``facts`` makes single prompts, for causal tracing, and ``fact_pairs`` makes pairs of them. (On the command line
    ``facts`` means ``fact_pairs`` where two prompts are compared.)
    """
    from interp import tasks

    functions = {n: f for n in tasks.__all__ if inspect.isfunction(f := getattr(tasks, n))}
    generators = {n: f for n, f in functions.items() if {"n", "seed"} <= set(inspect.signature(f).parameters)}
    return {**tasks.TASKS, **{n: tasks.Task(f, "") for n, f in generators.items()}}


def _options(task: str | None) -> Check:
    def check(value: Any) -> dict[str, Any]:
        maker = makers()[task] if task else None
        taken_by_config = () if maker is None else ("model", "n", "seed", *maker.options)
        parameters = [] if maker is None else list(inspect.signature(maker.make).parameters)
        allowed = [p for p in parameters if p not in taken_by_config]
        if not isinstance(value, dict) or not all(map(_is_plain, value.values())):
            raise ValueError("a table of plain values expected: texts, numbers, true or false, and lists of these")
        if unknown := [k for k in value if k not in allowed]:
            raise ValueError(f"{unknown[0]!r} is no option of {task}; options: {', '.join(allowed) or 'none'}")
        return value

    return check


def _is_plain(value: Any) -> bool:
    return all(map(_is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float)


def read_sites(table: Table, fresh: bool = True) -> SitesSpec:
    """Read a table of [[sites]].

    ``fresh``: it is not from an existing run, so that components that no model has are refused at once.
    """
    sites = table.take("sites", sites_text if fresh else text, None)
    groups = table.take("groups", _groups, None)
    for group, members in (groups or {}).items() if fresh else ():
        try:
            sites_text(members)
        except ValueError as error:
            raise table.refuse("groups", f".{group} = {members!r}: {error}") from None
    if sites is None and groups is None:
        raise table.source.refuse(
            table.path, ": sites = … (a component or sites, as for --sites) or groups = … expected"
        )
    layers = table.take("layers", layers_text, None)
    if layers is not None and sites is None:
        raise table.refuse("layers", ": layers choose among sites = …, and there is none")
    if fresh and layers is not None and (single := single_sites(sites or "")):
        raise table.refuse("layers", f": {single[0]} names its layer itself, so layers = … does not apply to it")
    label = table.take("name", name, _label(sites or "groups"))
    table.done()
    return SitesSpec(label, sites, layers, groups)


def _groups(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not value or not all(isinstance(v, str) and v.strip() for v in value.values()):
        raise ValueError('a table of sites by name expected: {movers = "z.L9H6,z.L10H0"}')
    return value


def read_recipe(
    table: Table, tasks: tuple[TaskSpec, ...], sites: tuple[SitesSpec, ...], fresh: bool = True
) -> RecipeSpec:
    """Read a table of [[recipes]], which names tasks and sites of the same config."""
    kind = table.take("recipe", one_of(*RECIPES))
    recipe = RECIPES[kind]
    options = {option.name: _take_option(table, option, fresh) for option in recipe.options}
    metric = table.take("metric", one_of(*METRICS), recipe.metric)
    task_names = [t.name for t in tasks]
    on = table.take("tasks", list_of(one_of(*task_names)), task_names)
    if unfit := [t.name for t in tasks if t.name in on and t.facts and not recipe.facts]:
        raise table.refuse(
            "tasks",
            f": {kind} compares a clean and a corrupt prompt, and {unfit[0]!r} holds facts, which have none: use "
            "the task fact_pairs, or tasks = […] to leave it out here",
        )
    where = _take_sites(table, recipe, sites)
    label = table.take("name", name, kind)
    table.done()
    if conflict := recipe.conflict(options):
        option, value, other, needed = conflict
        raise table.refuse(option, ("" if value is None else f" = {value!r}") + f" needs {other} = {needed!r}")
    if metric == "logit_diff" and (bare := [t.name for t in tasks if t.facts and t.name in on]):
        raise table.refuse(
            "metric", f" = 'logit_diff' needs a foil, and facts ({bare[0]!r}) have none: use prob or logprob"
        )
    return RecipeSpec(label, kind, metric, tuple(on), tuple(where), without_none(options))


def _take_option(table: Table, option: Option, fresh: bool) -> Any:
    # sites that an earlier version wrote into a run are read by the recipe, which reports what a model does not have
    check = text if option.type in (SITES, RECEIVERS, SITE) and not fresh else option.type.check
    default = REQUIRED if option.required else option.default if option.stored else None
    return table.take(option.name, check, default)


def _take_sites(table: Table, recipe: Recipe, sites: tuple[SitesSpec, ...]) -> list[str]:
    """Take the names of the [[sites]] that a recipe sweeps over; none if it takes no sites."""
    if recipe.sites is None:
        if "sites" in table:
            own_keys = ", ".join(option.name for option in recipe.options)
            raise table.refuse("sites", f": {recipe.name} takes no [[sites]]; it has its own: {own_keys}")
        return []
    if not sites:
        raise table.source.refuse(table.path, f": {recipe.name} sweeps over sites, and there is no [[sites]]")
    labels = [s.name for s in sites]
    where = table.take("sites", list_of(one_of(*labels)), labels)
    if not recipe.sites.groups and (grouped := [s.name for s in sites if s.name in where and s.groups]):
        raise table.refuse("sites", f": {recipe.name} takes no groups of sites, and {grouped[0]!r} has some")
    return where


def _label(value: str) -> str:
    """Return a name that `checks.name` accepts, made from a text: the frozen config is read back with it."""
    plain = unicodedata.normalize("NFKD", Path(value).name or value)
    kept = "".join(
        c if c.isascii() and (c.isalnum() or c in "._+@=-") else "-" for c in plain if not unicodedata.combining(c)
    )
    return re.sub(r"\.{2,}", ".", kept).lstrip("._+@=-")[:60].rstrip("-.") or "unnamed"
