"""One command for every recipe, made from its row of `interp.recipes.registry`, and the command for head gates.

Heavy imports wait for the command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.options import (
    BosOption,
    CountOption,
    DeviceOption,
    DtypeOption,
    ExplainOption,
    MetricOption,
    ModelOption,
    OutOption,
    PairsOption,
    RunOptions,
    SeedOption,
    TaskOption,
    exits_when_interrupted,
    offer,
)
from interp.errors import InterpError
from interp.recipes.options import LAYERS, SITES, Option
from interp.recipes.registry import RECIPES, Recipe
from interp.recipes.selection import group_members, group_texts, single_sites

SITES_HELP = (
    "Comma-separated: a component (z: every head; resid_pre: layer × position; attn_out, mlp_out, q, k, v, mlp_post, "
    "…), one with a position (resid_pre@-1, mlp_out@subject, z@each, resid_pre@all), or single sites (z.L9H6, "
    "resid_pre.L3@-1, mlp_post.L9N130)."
)
GROUP_HELP = "Sites changed together, under a name: movers=z.L9H6,z.L10H0. May be repeated."
SITE_LAYERS = Option("layers", LAYERS, "Layers of the components: 0-5,9. Default: all.")
SITE_TEXT = Option("sites", SITES, SITES_HELP)
GROUP_TEXT = Option("group", replace(SITES, check=group_members), GROUP_HELP)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for recipe in RECIPES.values():
        app.command(recipe.verb)(command_of(recipe))
    app.command("gates")(gates)


def command_of(recipe: Recipe) -> Callable[..., None]:
    """Return the command of a recipe: the options of its row, and those that every recipe has."""

    def command(**typed: Any) -> None:
        options = RunOptions(**{f.name: typed.pop(f.name) for f in fields(RunOptions)})
        options.check()
        with exits_when_interrupted():
            run_recipe(recipe, options, typed)

    parameters = [_parameter(option) for option in recipe.options]
    doc = recipe.summary
    if recipe.sites is not None:
        parameters += _site_parameters(recipe.sites.groups)
        doc += f"\n\nDefault sites: {recipe.sites.default}."
    parameters += inspect.signature(RunOptions, eval_str=True).parameters.values()
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    command.__name__, command.__doc__ = recipe.name, doc
    command.__signature__ = inspect.Signature(keyword_only)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in keyword_only}
    return command


def _parameter(option: Option) -> inspect.Parameter:
    kind = option.type.command_line
    has_default = option.default is not None and kind is not list[str]
    words = offer(*option.type.words) if option.type.words else None
    typed = typer.Option(option.flag, help=option.help, autocompletion=words)
    annotation = Annotated[kind if has_default else kind | None, typed]
    default = option.default if has_default else None
    if has_default and kind is str:
        default = str(default)
    return inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _site_parameters(takes_groups: bool) -> list[inspect.Parameter]:
    kind = inspect.Parameter.KEYWORD_ONLY
    sites = Annotated[str | None, typer.Option("--sites", help=SITES_HELP)]
    group = Annotated[list[str] | None, typer.Option("--group", help=GROUP_HELP)]
    parameters = [inspect.Parameter("sites", kind, default=None, annotation=sites), _parameter(SITE_LAYERS)]
    if takes_groups:
        parameters.append(inspect.Parameter("group", kind, default=None, annotation=group))
    return parameters


def run_recipe(recipe: Recipe, run: RunOptions, typed: dict[str, Any]) -> None:
    """Check what was typed, load the model, and run the recipe."""
    required = [o for o in recipe.options if o.required and typed[o.name] in (None, [])]
    if missing := [f"{o.flag} {'FILE' if o.type.command_line is Path else 'TEXT'}" for o in required]:
        raise InterpError(f"{recipe.verb} needs {' '.join(missing)}")
    if run.engine == "fast" and not recipe.takes("engine"):
        raise InterpError(f"{recipe.verb} runs a full forward per cell: leave --engine out")
    options = {o.name: o.checked(typed[o.name]) for o in recipe.options if typed[o.name] not in (None, [])}
    if conflict := recipe.conflict(options):
        option, value, other, needed = conflict
        raise InterpError(f"--{option}{'' if value is None else f' {value}'} needs --{other} {needed}")
    sites, layers, groups = None, None, None
    if recipe.sites is not None:
        groups = group_texts(typed.get("group"))
        sites = typed["sites"] or (None if groups else recipe.sites.default)
        layers = None if typed["layers"] is None else SITE_LAYERS.checked(typed["layers"])
        check_sites(typed["sites"], layers, groups)
    model = run.load_model()
    arguments = recipe.arguments(model, options)
    if recipe.sites is not None:
        arguments |= recipe.site_arguments(model, sites, layers, groups)
    common = {"engine": run.engine, "memory": run.memory, "metric": run.metric, "seed": run.seed}
    arguments |= {k: v for k, v in common.items() if v is not None and recipe.takes(k)}
    prompts = run.prompts(model, takes_facts=recipe.traces_facts)
    run.run(recipe.load(), model, prompts, **recipe.prepared(model, arguments))


def check_sites(sites: str | None, layers: str | None, groups: dict[str, str]) -> None:
    """Raise InterpError, before a model is loaded, for sites that no model has, and for layers that do not apply."""
    if sites is not None:
        SITE_TEXT.checked(sites)
    for name, members in groups.items():
        GROUP_TEXT.checked(f"{name}={members}")
    if layers is None:
        return
    if sites is None and groups:
        raise InterpError("--layers chooses among the components of --sites, and there is only --group")
    if single := single_sites(sites or ""):
        raise InterpError(
            f"--layers does not apply to {single[0]}, which names its layer itself: leave one of them out"
        )


def gates(
    steps: Annotated[int, typer.Option(help="Updates of each of the three fits (published: 500).")] = 500,
    seeds: Annotated[int, typer.Option(help="Sets of gates from different starts, fitted together.")] = 5,
    lam: Annotated[float, typer.Option(help="Strength of the pull of gates towards 1, and then towards 0.")] = 0.1,
    lr: Annotated[float, typer.Option(help="Adam's step size, which falls to a tenth of it.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Prompts per update.")] = 32,
    start: Annotated[
        str, typer.Option(help="Range of the gates at the start; 0.9,0.98 with a small --lr if a fit does not move.")
    ] = "0,1",
    permute: Annotated[bool, typer.Option("--permute", help="Exchange the answers among prompts: the null.")] = False,
    model: ModelOption = "smollm2",
    task: TaskOption = None,
    pairs: PairsOption = None,
    n: CountOption = None,
    seed: SeedOption = 0,
    metric: MetricOption = None,
    engine: Annotated[str, typer.Option(help="Does not apply.", hidden=True)] = "auto",
    memory: Annotated[str | None, typer.Option(help="Does not apply.", hidden=True)] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    out: OutOption = None,
    explain: ExplainOption = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Does not apply.", hidden=True)] = False,
    bos: BosOption = None,
) -> None:
    """Causal head gating: learn a gate for every head; it shows which heads facilitate, interfere, or do nothing.

    Reads the clean prompts and their answers; --metric, --engine and --memory do not apply.
    """
    run = RunOptions(model, task, pairs, n, seed, metric, engine, memory, dtype, device, out, explain, yes, bos)
    run.check()
    from interp.circuits import causal_head_gating
    from interp.circuits.learned.causal_gating import settings_of

    if metric is not None:
        raise InterpError("gates are learned from the next-token loss: --metric does not apply")
    try:
        low, high = (float(x) for x in start.split(","))
    except ValueError:
        raise InterpError(f"--start {start}: two numbers expected, like 0.9,0.98") from None
    fit: Any = settings_of(steps, seeds, lam, lr, lr / 10, (low, high), batch, seed)
    with exits_when_interrupted():
        loaded = run.load_model()
        prompts = run.prompts(loaded)
        if not explain:
            run.finish(causal_head_gating(loaded, prompts, **fit, seed=seed, permute_targets=permute))
            return
    heads = len(loaded.attention_layers) * loaded.n_heads
    typer.echo(f"{heads} gates × {seeds} seeds; {3 * steps} updates of {seeds * min(batch, len(prompts))} prompts")
