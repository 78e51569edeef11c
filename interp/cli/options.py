"""What the verbs of the command line have in common: which model and prompts, what it costs, where results go."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.errors import InterpError

if TYPE_CHECKING:
    from interp.circuits.learned.head_gates import HeadGates
    from interp.model.model import Model
    from interp.results.effects import Effects
    from interp.sites import Sites

ASK_FROM = 600.0  # predicted seconds from which a sweep is started only when told to
SITES = (
    "Comma-separated: a component (z: every head; resid_pre: layer × position; attn_out, mlp_out, q, k, v, mlp_post, "
    "…), one with a position (resid_pre@-1, mlp_out@subject, z@each, resid_pre@all), or single sites (z.L9H6, "
    "resid_pre.L3@-1, mlp_post.L9N130)."
)
GROUPS = "Sites changed together, under a name: movers=z.L9H6,z.L10H0. May be given again."
WINDOW = "Layers changed together around each layer."
LAYERS = "Layers of the components: 0-5,9. Default: all."


@dataclass
class Sweep:
    """The options that every verb has."""

    model: Annotated[str, typer.Option(help="smollm2 (embedded), a hub id, a local model folder or a .gguf file.")] = (
        "smollm2"
    )
    task: Annotated[
        str | None,
        typer.Option(
            help="Prompts of a task (interp tasks lists them), with options after a colon: "
            "needle:tokens=2048,split=test. Default: ioi; facts where one is traced."
        ),
    ] = None
    pairs: Annotated[
        Path | None,
        typer.Option(help="Prompts of your own: .csv or .jsonl with clean, corrupt, answer, foil (or prompt, subject, "
                          "answer), in place of a task."),
    ] = None  # fmt: skip
    n: Annotated[int, typer.Option(help="Prompts of the task.")] = 16
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0
    metric: Annotated[str | None, typer.Option(help="logit_diff, logprob, prob, rank or kl.")] = None
    engine: Annotated[str, typer.Option(help="auto; fast; or naive: one full forward per cell.")] = "auto"
    memory: Annotated[str | None, typer.Option(help="What the sweep may take beside the weights, e.g. 4GiB.")] = None
    dtype: Annotated[str | None, typer.Option(help="float32 (the default), bfloat16, float16 or float64.")] = None
    device: Annotated[str | None, typer.Option(help="cpu (the default), cuda, cuda:1, mps, …")] = None
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where the table goes: a .parquet file.")] = None
    explain: Annotated[bool, typer.Option("--explain", help="Print what it would cost, and run none of it.")] = False
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Start long sweeps without asking.")] = False

    def check(self) -> None:
        """Refuse, before anything is loaded, what cannot end well."""
        if self.pairs is not None and self.task is not None:
            raise InterpError("give --task or --pairs, not both")
        if self.task is not None:
            from interp.tasks import task

            task(self.task)
        if self.n < 1:
            raise InterpError(f"--n must be at least 1, got {self.n}")
        if self.seed < 0:
            raise InterpError(f"--seed {self.seed}: a whole number from 0 on is expected")
        if self.pairs is not None:
            from interp.prompts.files import read_prompts

            read_prompts(self.pairs)
        if self.metric is not None:
            from interp.metrics import as_metric

            as_metric(self.metric)
        if self.out is not None:
            if self.out.suffix != ".parquet":
                raise InterpError(f"--out {self.out}: the name of a .parquet file expected")
            existing = next(p for p in (self.out.parent, *self.out.parent.absolute().parents) if p.exists())
            if not existing.is_dir():
                raise InterpError(f"cannot write to {self.out}: {existing} is not a folder. Choose another with --out")

    def loaded(self) -> Model:
        """The model."""
        import interp

        return interp.load(self.model, dtype=self.dtype, device=self.device)

    def prompts(self, model: Model, tracing: bool = False) -> Any:
        """Pairs of the file or task; for tracing, facts of the task."""
        from interp import tasks
        from interp.prompts.files import read_prompts

        if self.pairs is not None:
            return read_prompts(self.pairs)
        if tracing and self.task in (None, "facts"):
            return tasks.facts(model, n=self.n, seed=self.seed)
        if tracing and str(self.task).startswith("facts:"):
            options = str(self.task).partition(":")[2]
            raise InterpError(f"--task {self.task}: facts to be traced have no options; of pairs: fact_pairs:{options}")
        return tasks.task(self.task or "ioi")(model, self.n, self.seed)

    def options(self, **given: Any) -> dict[str, Any]:
        """Those of ``given`` that were given, with engine, memory and metric."""
        common = {"engine": self.engine, "memory": self.memory, "metric": self.metric}
        return {k: v for k, v in {**common, **given}.items() if v is not None}

    def run(self, recipe: Callable[..., Effects], *args: Any, **options: Any) -> None:
        """Explain, ask if it will take long, run, print the strongest effects and write the table."""
        from interp.engine import explain

        with said_once():  # the plan meets what the run will meet
            plan = explain(recipe, *args, **options)
            if self.explain:
                typer.echo(str(plan))
                return
            if plan.seconds > ASK_FROM and not self.yes:
                self._ask(str(plan), plan.seconds)
            effects = recipe(*args, **options)
        self.finish(effects)

    def finish(self, effects: Effects | HeadGates) -> None:
        """Print the strongest effects (of head gates: those that facilitate most); write the table."""
        import pandas as pd

        summary: Any = effects.summary()
        shown = [c for c in summary.columns if not summary[c].isna().all()]
        with pd.option_context(
            "display.width", 160, "display.max_columns", 30, "display.float_format", "{:.4g}".format
        ):
            typer.echo(summary[shown].head(10).to_string(index=False))
        typer.echo(f"{effects!r}")
        if self.out is not None:
            typer.echo(f"wrote {effects.write(self.out)}")

    def _ask(self, plan: str, seconds: float) -> None:
        long = f"this will take about {seconds / 60:.0f} minutes"
        typer.echo(plan, err=True)
        if not sys.stdin.isatty():
            raise InterpError(f"{long}, and nobody is here to ask: start it with --yes, or take fewer prompts or sites")
        if not typer.confirm(f"{long}. Go on?", err=True):
            raise typer.Exit(1)


@contextmanager
def said_once() -> Iterator[None]:
    """Inside, the log has no line twice."""
    said: set[str] = set()

    def new(record: logging.LogRecord) -> bool:
        line = record.getMessage()
        return line not in said and not said.add(line)

    log = logging.getLogger("interp")
    log.addFilter(new)
    try:
        yield
    finally:
        log.removeFilter(new)


def with_sweep(body: Callable[..., None]) -> Callable[..., None]:
    """``body(sweep, …)`` as a command that has the options of `Sweep` beside its own."""
    own = list(inspect.signature(body, eval_str=True).parameters.values())[1:]
    common = list(inspect.signature(Sweep, eval_str=True).parameters.values())
    names = [f.name for f in fields(Sweep)]

    def command(**given: Any) -> None:
        sweep = Sweep(**{name: given.pop(name) for name in names})
        sweep.check()
        body(sweep, **given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    everything = [p.replace(kind=keyword) for p in (*own, *common)]
    command.__name__, command.__doc__ = body.__name__, body.__doc__
    command.__signature__ = inspect.Signature(everything)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in everything}
    return command


def numbers(text: str | None, what: str) -> list[int] | None:
    """``0-5,9`` as [0, 1, 2, 3, 4, 5, 9]; None stays None."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise InterpError(f"--{what} {text}: numbers and ranges like 0-5,9 expected")
        found += range(int(first), int(last if dash else first) + 1)
    return found


def place(text: str) -> int | str:
    """A position: a number, or the name of a span."""
    return int(text) if text.lstrip("-").isdigit() else text


def sites_of(model: Model, text: str, layers: str | None = None) -> Sites:
    """Sites by the grammar of --sites."""
    from interp.sites import COMPONENTS, Site, Sites

    found = Sites([])
    for item in filter(None, (part.strip() for part in text.split(","))):
        component, at, position = item.partition("@")
        if component in COMPONENTS:
            found |= model.sites(component, layers=numbers(layers, "layers"), positions=place(position) if at else None)
        else:
            found |= [Site.parse(item)]
    return found


def sites_and_groups(
    model: Model, sites: str | None, layers: str | None, group: list[str] | None
) -> tuple[Sites | None, dict[str, Sites] | None]:
    """What --sites, --layers and --group ask for; every head (z) if neither sites nor groups are named."""
    groups = groups_of(model, group)
    return sites_of(model, sites or "z", layers) if sites or not groups else None, groups


def receivers_of(model: Model, text: str) -> list[Any]:
    """``logits``, sites, or both, as `interp.path_patch` takes them."""
    words = [word.strip() for word in text.split(",")]
    return [*sites_of(model, ",".join(w for w in words if w != "logits")), *(w for w in words if w == "logits")]


def groups_of(model: Model, texts: list[str] | None) -> dict[str, Sites] | None:
    """Named groups of sites, from ``name=site,site``."""
    found: dict[str, Sites] = {}
    for text in texts or ():
        name, equals, sites = text.partition("=")
        if not equals or not name.strip():
            raise InterpError(f"--group {text}: name=site,site expected")
        if name.strip() in found:
            raise InterpError(f"--group {name.strip()} is given twice: list all its sites in one")
        found[name.strip()] = sites_of(model, sites)
    return found or None
