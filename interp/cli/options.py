"""Options that commands share: which model and prompts, what a run may cost, and where results go."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.errors import InterpError
from interp.metrics import METRICS

if TYPE_CHECKING:
    from interp.circuits.learned.head_gates import HeadGates
    from interp.model.model import Model
    from interp.results.effects import Effects

ENGINES = ("auto", "fast", "naive")
ASK_FROM = 600.0  # predicted seconds from which a run is started only after asking

ModelOption = Annotated[
    str, typer.Option("--model", help="smollm2 (embedded), a hub id, a local model folder or a .gguf file.")
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Prompts of a task (interp tasks lists them), with options after a colon: needle:tokens=2048,split=test. "
        "Default: ioi; facts for trace and knock-out.",
    ),
]
PairsOption = Annotated[
    Path | None,
    typer.Option(
        "--pairs",
        help="Your own prompts instead of a task: .csv or .jsonl with clean, corrupt, answer, foil (or prompt, "
        "subject, answer).",
    ),
]
CountOption = Annotated[int, typer.Option("--n", help="Number of prompts of the task.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Determines everything random.")]
MetricOption = Annotated[str | None, typer.Option("--metric", help=f"{', '.join(METRICS)}. Default: the recipe's.")]
EngineOption = Annotated[str, typer.Option("--engine", help="auto; fast; or naive: one full forward per cell.")]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Memory that the run may take besides the weights, e.g. 4GiB.")
]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32 (the default), bfloat16, float16 or float64.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu (the default), cuda, cuda:1, mps, …")]
OutOption = Annotated[Path | None, typer.Option("-o", "--out", help="File for the table: a .parquet file.")]
ExplainOption = Annotated[bool, typer.Option("--explain", help="Print what the run would cost, and do not run it.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Start long runs without asking.")]


@dataclass
class RunOptions:
    """The options that every recipe's command has."""

    model: ModelOption = "smollm2"
    task: TaskOption = None
    pairs: PairsOption = None
    n: CountOption = 16
    seed: SeedOption = 0
    metric: MetricOption = None
    engine: EngineOption = "auto"
    memory: MemoryOption = None
    dtype: DtypeOption = None
    device: DeviceOption = None
    out: OutOption = None
    explain: ExplainOption = False
    yes: YesOption = False

    def check(self) -> None:
        """Raise InterpError, before anything is loaded, for options that cannot be used."""
        if self.pairs is not None and self.task is not None:
            raise InterpError("give --task or --pairs, not both")
        if self.task is not None:
            from interp.tasks import task

            task(self.task)
        if self.n < 1:
            raise InterpError(f"--n must be at least 1, got {self.n}")
        if self.seed < 0:
            raise InterpError(f"--seed {self.seed}: a whole number from 0 on is expected")
        if self.engine not in ENGINES:
            raise InterpError(f"--engine {self.engine}: one of {', '.join(ENGINES)} expected")
        if self.pairs is not None:
            from interp.prompts.files import read_prompts

            read_prompts(self.pairs)
        if self.metric is not None:
            from interp.metrics import as_metric

            as_metric(self.metric)
        if self.out is not None:
            if self.out.suffix != ".parquet":
                raise InterpError(f"--out {self.out}: the name of a .parquet file expected")
            if self.out.is_dir():
                raise InterpError(f"--out {self.out} is a folder: name a file in it")
            existing = next(p for p in (self.out.parent, *self.out.parent.absolute().parents) if p.exists())
            if not existing.is_dir():
                raise InterpError(f"cannot write to {self.out}: {existing} is not a folder. Choose another with --out")

    def load_model(self) -> Model:
        """Load the model."""
        from interp.model.model import load

        return load(self.model, dtype=self.dtype, device=self.device)

    def prompts(self, model: Model, takes_facts: bool = False) -> Any:
        """Return the prompts of the file, or of the task; with ``takes_facts``, facts unless another task is named."""
        from interp import tasks
        from interp.prompts.files import read_prompts

        if self.pairs is not None:
            return read_prompts(self.pairs)
        if takes_facts and self.task in (None, "facts"):
            return tasks.facts(model, n=self.n, seed=self.seed)
        if takes_facts and str(self.task).startswith("facts:"):
            options = str(self.task).partition(":")[2]
            raise InterpError(
                f"--task {self.task}: the facts of causal tracing have no options; pairs of facts have: "
                f"fact_pairs:{options}"
            )
        return tasks.task(self.task or "ioi")(model, self.n, self.seed)

    def run(self, recipe: Callable[..., Effects], *args: Any, **options: Any) -> None:
        """Explain, ask if it will take long, run, print the strongest effects and write the table."""
        from interp.engine import explain

        with without_repeated_messages():  # the plan gives the same warnings as the run
            plan = explain(recipe, *args, **options)
            if self.explain:
                typer.echo(str(plan))
                return
            if plan.seconds > ASK_FROM and not self.yes:
                self._ask(str(plan), plan.seconds)
            effects = recipe(*args, **options)
        self.finish(effects)

    def finish(self, effects: Effects | HeadGates) -> None:
        """Print the strongest effects (of head gates: the most facilitating heads); write the table."""
        import pandas as pd

        summary: Any = effects.summary()
        columns = [c for c in summary.columns if not summary[c].isna().all()]
        with pd.option_context(
            "display.width", 160, "display.max_columns", 30, "display.float_format", "{:.4g}".format
        ):
            typer.echo(summary[columns].head(10).to_string(index=False))
        typer.echo(f"{effects!r}")
        if self.out is not None:
            typer.echo(f"wrote {effects.write(self.out)}")

    def _ask(self, plan: str, seconds: float) -> None:
        duration = f"this will take about {seconds / 60:.0f} minutes"
        typer.echo(plan, err=True)
        if not sys.stdin.isatty():
            raise InterpError(
                f"{duration}, and there is no terminal to confirm it: start it with --yes, or take fewer prompts or "
                "sites"
            )
        if not typer.confirm(f"{duration}. Go on?", err=True):
            raise typer.Exit(1)


@contextmanager
def without_repeated_messages() -> Iterator[None]:
    """Log every message at most once inside the block."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        line = record.getMessage()
        if line in seen:
            return False
        seen.add(line)
        return True

    log = logging.getLogger("interp")
    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)
