"""Every recipe as a verb of the command line; heavy imports wait for the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.options import (
    GROUPS,
    LAYERS,
    SITES,
    WINDOW,
    Sweep,
    numbers,
    place,
    receivers_of,
    sites_and_groups,
    sites_of,
    with_sweep,
)
from interp.errors import InterpError

Layers = Annotated[str | None, typer.Option(help=LAYERS)]
Window = Annotated[int, typer.Option(help=WINDOW)]
Group = Annotated[list[str] | None, typer.Option(help=GROUPS)]
SiteText = Annotated[str | None, typer.Option("--sites", help=SITES)]


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    named = {"path-patch": path_patch, "knock-out": knock_out, "leave-out": leave_out}
    plain = {f.__name__: f for f in (patch, ablate, trace, mediate, peek, steer, gates)}
    for name, body in {**plain, **named}.items():
        app.command(name)(with_sweep(body))


def patch(
    sweep: Sweep,
    sites: SiteText = None,
    mode: Annotated[str, typer.Option(help="denoise: clean into corrupt; noise: corrupt into clean.")] = "denoise",
    layers: Layers = None,
    window: Window = 1,
    group: Group = None,
) -> None:
    """Activation patching: carry an activation from one prompt's run into the other's.

    Default: every head (z).
    """
    import interp

    model = sweep.loaded()
    chosen, groups = sites_and_groups(model, sites, layers, group)
    sweep.run(
        interp.patch, model, sweep.prompts(model), chosen,
        **sweep.options(mode=mode, window=window, groups=groups),
    )  # fmt: skip


def ablate(
    sweep: Sweep,
    sites: SiteText = None,
    using: Annotated[
        str, typer.Option(help="zero; mean; position_mean; cama (context-aware mean); resample.")
    ] = "mean",
    schedule: Annotated[
        str, typer.Option(help="each; cumulative (in the order given); all-but-one (leave one out).")
    ] = "each",
    layers: Layers = None,
    window: Window = 1,
    group: Group = None,
    reference: Annotated[
        Path | None, typer.Option(help="Texts to take means over and to draw from, one a line. Default: the prompts.")
    ] = None,
) -> None:
    """Ablation: take a component's activation away from the clean run, by a stated recipe.

    Default: every head (z).
    """
    import interp
    from interp.prompts.files import read_texts

    texts = None if reference is None else read_texts(reference)
    model = sweep.loaded()
    chosen, groups = sites_and_groups(model, sites, layers, group)
    how = sweep.options(
        using=using, schedule=schedule.replace("-", " "), window=window, groups=groups, reference=texts, seed=sweep.seed
    )
    sweep.run(interp.ablate, model, sweep.prompts(model), chosen, **how)


def trace(
    sweep: Sweep,
    component: Annotated[str, typer.Option(help="resid_post, mlp_out or attn_out.")] = "resid_post",
    window: Annotated[
        int | None, typer.Option(help="Layers restored together. Default: 1 or 10, as published.")
    ] = None,
    positions: Annotated[str, typer.Option(help="each; subject; subject:last; a number; another span.")] = "each",
    layers: Layers = None,
    noise: Annotated[float | None, typer.Option(help="Of the standard deviation of subject embeddings [3].")] = None,
    samples: Annotated[int | None, typer.Option(help="Corrupted runs of each fact [10].")] = None,
    sever: Annotated[str | None, typer.Option(help="mlp or attn: keep later ones at their corrupted values.")] = None,
) -> None:
    """Causal tracing: corrupt a fact's subject, restore one state, see what comes back.

    Facts are corrupted by noise; prompt pairs (of a file, or of the other tasks) by their corrupt prompt.
    """
    import interp

    model = sweep.loaded()
    sweep.run(
        interp.trace, model, sweep.prompts(model, tracing=True), component,
        **sweep.options(
            window=window, positions=place(positions), layers=numbers(layers, "layers"), noise=noise, samples=samples,
            sever=sever, seed=sweep.seed,
        ),
    )  # fmt: skip


def mediate(
    sweep: Sweep, sites: SiteText = None, layers: Layers = None, window: Window = 1, group: Group = None
) -> None:
    """Causal mediation: total, natural direct and natural indirect effect, and interaction, of each mediator.

    Default: every head (z).
    """
    import interp

    model = sweep.loaded()
    chosen, groups = sites_and_groups(model, sites, layers, group)
    sweep.run(
        interp.mediate, model, sweep.prompts(model), chosen, **sweep.options(window=window, groups=groups)
    )  # fmt: skip


def path_patch(
    sweep: Sweep,
    senders: Annotated[str, typer.Option(help="Sites of z, attn_out or mlp_out, as for --sites of patch.")] = "z",
    receivers: Annotated[
        str, typer.Option(help="logits; sites of q, k, v or mlp_out, e.g. q,k,v for every head.")
    ] = "logits",
    mode: Annotated[str, typer.Option(help="noise (as published) or denoise.")] = "noise",
    mlps: Annotated[str, typer.Option(help="frozen, or recomputed along the path.")] = "frozen",
    using: Annotated[str, typer.Option(help="patch; zero or mean: ablate the edge.")] = "patch",
) -> None:
    """Path patching: change what one component sends along one path, and nothing else."""
    import interp

    model = sweep.loaded()
    sweep.run(
        interp.path_patch, model, sweep.prompts(model), sites_of(model, senders), receivers_of(model, receivers),
        **sweep.options(mode=mode, mlps=mlps, using=using),
    )  # fmt: skip


def knock_out(
    sweep: Sweep,
    keys: Annotated[str, typer.Option(help="What is no longer read: a span (subject) or a position.")] = "subject",
    queries: Annotated[str, typer.Option(help="Who no longer reads it: a span, a position, or all.")] = "-1",
    layers: Layers = None,
    window: Annotated[int | None, typer.Option(help="Layers cut together. Default: a fifth of the model's.")] = None,
    heads: Annotated[str | None, typer.Option(help="Query heads: 0-3,7. Default: all.")] = None,
) -> None:
    """Attention knock-out: forbid some tokens to read others, in a window of layers."""
    import interp

    model = sweep.loaded()
    sweep.run(
        interp.knock_out, model, sweep.prompts(model, tracing=True), place(keys),
        None if queries == "all" else place(queries),
        **sweep.options(layers=numbers(layers, "layers"), window=window, heads=numbers(heads, "heads")),
    )  # fmt: skip


def peek(
    sweep: Sweep,
    layers: Annotated[str | None, typer.Option(help="Layers up to which tokens wait: 0-5,9. Default: all.")] = None,
    full: Annotated[int, typer.Option(help="Layers after it in which the last token reads the others.")] = 2,
    context: Annotated[str, typer.Option(help="mean: take context away while waiting; keep: only mask.")] = "mean",
    reference: Annotated[
        Path | None,
        typer.Option(help="Texts of the template to take means over, one a line. Default: the prompts."),
    ] = None,
) -> None:
    """All for one: the last token alone, after the others waited and it peeked at them for a few layers."""
    import interp
    from interp.prompts.files import read_texts

    texts = None if reference is None else read_texts(reference)
    model = sweep.loaded()
    how = sweep.options(context=context, reference=texts)
    sweep.run(interp.peek, model, sweep.prompts(model), numbers(layers, "layers"), full, **how)


def steer(
    sweep: Sweep,
    sites: SiteText = None,
    positive: Annotated[Path | None, typer.Option(help="Texts to steer towards, one a line.")] = None,
    negative: Annotated[Path | None, typer.Option(help="Texts to steer away from, one a line.")] = None,
    at: Annotated[
        str | None, typer.Option(help="The site whose mean difference is the direction. Default: the first of --sites.")
    ] = None,
    scale: Annotated[float, typer.Option(help="How many times the direction is added.")] = 1.0,
    layers: Layers = None,
) -> None:
    """Steering: add the difference of means of two sets of texts, and see where the answer moves.

    Default: the residual stream entering each layer, at all positions (resid_pre@all).
    """
    import interp
    from interp.prompts.files import read_texts

    if positive is None or negative is None:
        raise InterpError("steer needs two files of texts, one a line: --positive FILE --negative FILE")
    texts = read_texts(positive), read_texts(negative)
    model = sweep.loaded()
    chosen = sites_of(model, sites or "resid_pre@all", layers)
    source = interp.Site.parse(at) if at else next(iter(chosen)).at(None)
    direction = interp.mean_difference(model, *texts, source)
    sweep.run(interp.steer, model, sweep.prompts(model), chosen, direction, scale, **sweep.options())


def leave_out(
    sweep: Sweep,
    spans: Annotated[
        str | None, typer.Option(help="Names of spans, comma-separated. Default: all of each prompt.")
    ] = None,
    instead: Annotated[
        list[str] | None, typer.Option(help="Words in a span's place: 'name=other words'. May be given again.")
    ] = None,
) -> None:
    """Leave-one-out: the answer without each named span of the prompt, or with other words in its place."""
    import interp

    if sweep.engine == "fast":
        raise InterpError("leave-out runs a full forward per cell (tokens move): leave --engine out")
    model = sweep.loaded()
    names = None if spans is None else [s.strip() for s in spans.split(",")]
    parts = [text.partition("=") for text in instead or ()]
    if any(not name.strip() or not equals for name, equals, _ in parts):
        raise InterpError(f"--instead {instead}: name=words expected")
    words = {name.strip(): said for name, _, said in parts} or None
    given = {"memory": sweep.memory, "metric": sweep.metric, "instead": words}
    sweep.run(interp.leave_out, model, sweep.prompts(model), names, **{k: v for k, v in given.items() if v is not None})


def gates(
    sweep: Sweep,
    steps: Annotated[int, typer.Option(help="Updates of each of the three fits (published: 500).")] = 500,
    seeds: Annotated[int, typer.Option(help="Sets of gates from different starts, fitted together.")] = 5,
    lam: Annotated[float, typer.Option(help="How hard gates are pulled towards 1, and then towards 0.")] = 0.1,
    lr: Annotated[float, typer.Option(help="Adam's step, which falls to a tenth of it.")] = 1.0,
    batch: Annotated[int, typer.Option(help="Prompts of each update.")] = 32,
    start: Annotated[
        str, typer.Option(help="Range of the gates at the start; 0.9,0.98 with a small --lr if a fit is stuck.")
    ] = "0,1",
    permute: Annotated[bool, typer.Option("--permute", help="With each other's answers: what chance finds.")] = False,
) -> None:
    """Causal head gating: a gate learned for every head tells those that help, oppose and idle.

    Reads the clean prompts and their answers; --metric, --engine and --memory do not apply.
    """
    from interp.circuits import causal_head_gating
    from interp.circuits.learned.causal_gating import settings_of

    if sweep.metric is not None:
        raise InterpError("gates are learned from the next-token loss: --metric does not apply")
    try:
        low, high = (float(x) for x in start.split(","))
    except ValueError:
        raise InterpError(f"--start {start}: two numbers expected, like 0.9,0.98") from None
    fit: Any = settings_of(steps, seeds, lam, lr, lr / 10, (low, high), batch, sweep.seed)
    model = sweep.loaded()
    prompts = sweep.prompts(model)
    if sweep.explain:
        heads = len(model.attention_layers) * model.n_heads
        typer.echo(f"{heads} gates × {seeds} seeds; {3 * steps} updates of {seeds * min(batch, len(prompts))} prompts")
        return
    sweep.finish(causal_head_gating(model, prompts, **fit, seed=sweep.seed, permute_targets=permute))
