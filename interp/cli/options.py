"""Options that commands share: which model and prompts, what a run may cost, and where results go."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.errors import InterpError, Interrupted
from interp.metrics import METRICS
from interp.recipes.choices import DTYPES
from interp.utils.checks import did_you_mean

if TYPE_CHECKING:
    from interp.circuits.learned.head_gates import HeadGates
    from interp.model.model import Model
    from interp.prompts.special_tokens import BosPolicy
    from interp.results.effects import Effects

ENGINES = ("auto", "fast", "naive")
ASK_FROM = 600.0  # predicted seconds from which a run is started only after asking
AT_RISK = 10.0  # predicted seconds of work that Ctrl-C loses at most, where one example takes no longer
DEFAULT_COUNT = 16  # prompts of a task


def offer(*words: str) -> Callable[[str], list[str]]:
    """Return a function that completes what is typed to one of some words, for the shell."""

    def completed(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return completed


def _offer_tasks(incomplete: str) -> list[str]:
    from interp.tasks import TASKS

    return offer(*TASKS)(incomplete)


ModelOption = Annotated[
    str, typer.Option("--model", help="smollm2 (embedded), a hub id, a local model folder or a .gguf file.")
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="Prompts of a task (interp tasks lists them), with options after a colon: needle:tokens=2048,split=test. "
        "Default: ioi; facts for trace and knock-out.",
        autocompletion=_offer_tasks,
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
CountOption = Annotated[
    int | None,
    typer.Option("--n", help="Number of prompts: of the task (default: 16), or the first of --pairs (default: all)."),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Determines everything random.")]
MetricOption = Annotated[
    str | None,
    typer.Option("--metric", help=f"{', '.join(METRICS)}. Default: the recipe's.", autocompletion=offer(*METRICS)),
]
EngineOption = Annotated[
    str,
    typer.Option("--engine", help="auto; fast; or naive: one full forward per cell.", autocompletion=offer(*ENGINES)),
]
MemoryOption = Annotated[
    str | None, typer.Option("--memory", help="Memory that the run may take besides the weights, e.g. 4GiB.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32 (the default), bfloat16, float16 or float64.",
        autocompletion=offer(*DTYPES),
    ),
]
BosOption = Annotated[
    str | None,
    typer.Option(
        "--bos",
        help="Special tokens of prompts: tokenizer (what it adds itself; the default, but of smollm2: true), true (BOS "
        "in front) or false.",
        autocompletion=offer("tokenizer", "true", "false"),
    ),
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
    n: CountOption = None
    seed: SeedOption = 0
    metric: MetricOption = None
    engine: EngineOption = "auto"
    memory: MemoryOption = None
    dtype: DtypeOption = None
    device: DeviceOption = None
    out: OutOption = None
    explain: ExplainOption = False
    yes: YesOption = False
    bos: BosOption = None

    def check(self) -> None:
        """Raise InterpError, before anything is loaded, for options that cannot be used."""
        if self.pairs is not None and self.task is not None:
            raise InterpError("give --task or --pairs, not both")
        if self.task is not None:
            from interp.tasks import task

            task(self.task)
        if self.n is not None and self.n < 1:
            raise InterpError(f"--n must be at least 1, got {self.n}")
        if self.seed < 0:
            raise InterpError(f"--seed {self.seed}: a whole number from 0 on is expected")
        check_choice("--engine", self.engine, ENGINES)
        bos_policy(self.bos)
        if self.dtype is not None:
            check_choice("--dtype", self.dtype, DTYPES)
        if self.memory is not None:
            from interp.engine.budget import as_bytes

            as_bytes(self.memory)
        if self.pairs is not None:
            _ = self._file_prompts
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

    @cached_property
    def _file_prompts(self) -> Any:
        """The prompts of the file, read once; with --n the first ones. InterpError if there are not as many."""
        from interp.prompts.files import read_prompts

        assert self.pairs is not None
        prompts = read_prompts(self.pairs)
        if self.n is not None and self.n > len(prompts):
            raise InterpError(f"--n {self.n}: {self.pairs} holds {len(prompts)} prompts")
        return prompts[: self.n]

    def load_model(self) -> Model:
        """Load the model."""
        from interp.model.load_model import load

        return load(self.model, dtype=self.dtype, device=self.device, bos=bos_policy(self.bos))

    def prompts(self, model: Model, takes_facts: bool = False) -> Any:
        """Return the prompts of the file, or of the task; with ``takes_facts``, facts unless another task is named."""
        from interp import tasks

        if self.pairs is not None:
            return self._file_prompts
        n = self.n or DEFAULT_COUNT
        if takes_facts and self.task in (None, "facts"):
            return tasks.facts(model, n=n, seed=self.seed)
        if takes_facts and str(self.task).startswith("facts:"):
            options = str(self.task).partition(":")[2]
            raise InterpError(
                f"--task {self.task}: the facts of causal tracing have no options; pairs of facts have: "
                f"fact_pairs:{options}"
            )
        return tasks.task(self.task or "ioi")(model, n, self.seed)

    def check_split(self) -> None:
        """Raise InterpError, before anything is loaded, if the prompts cannot be split into two disjoint sets."""
        if self.pairs is not None:
            if len(self._file_prompts) < 2:
                raise InterpError(f"--split: {self.pairs} holds one pair, and at least two are needed")
            return
        from interp.tasks import task

        name = self.task or "ioi"
        if "split" in task(name).options:
            raise InterpError(f"--task {name} names a split already: leave it or --split out")
        if "split" not in task(name).names:
            raise InterpError(f"--split: the task {name} has no train and test split")

    def split_prompts(self, model: Model) -> tuple[Any, Any]:
        """Return two disjoint sets: the task's train and test split, or the two halves of the file."""
        if self.pairs is not None:
            prompts = self._file_prompts
            half = (len(prompts) + 1) // 2
            return prompts[:half], prompts[half:]
        from interp.tasks import task

        make, n = task(self.task or "ioi"), self.n or DEFAULT_COUNT
        return make(model, n, self.seed, split="train"), make(model, n, self.seed, split="test")

    def run(self, recipe: Callable[..., Effects], model: Model, prompts: Any, **options: Any) -> None:
        """Explain, ask if it will take long, run, print the strongest effects and write the table.

        Ctrl-C keeps the examples that are finished.
        """
        from interp.engine import explain
        from interp.recipes.sweep_loop import Subset

        with without_repeated_messages():  # the plan gives the same warnings as the run
            plan = explain(recipe, model, prompts, **options)
            if self.explain:
                typer.echo(str(plan))
                return
            if plan.seconds > ASK_FROM and not self.yes:
                self._ask(str(plan), plan.seconds)
            together = max(1, int(len(prompts) * AT_RISK / max(plan.seconds, AT_RISK)))
            try:
                effects = recipe(model, prompts, **options, subset=Subset(together=together))
            except Interrupted as stop:
                typer.echo(f"\n{stop.effects.provenance['interrupted']}; this is their table:", err=True)
                self.finish(stop.effects)
                raise typer.Exit(130) from None
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
def exits_when_interrupted() -> Iterator[None]:
    """Say at Ctrl-C that there is no result, and exit with code 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\ninterrupted before any result was finished; nothing was written", err=True)
        raise typer.Exit(130) from None


def check_choice(flag: str, value: str, choices: Collection[str]) -> None:
    """Raise InterpError unless the value of an option is one of some words; a misspelt one is named."""
    if value not in choices:
        hint = did_you_mean(value, choices).replace("'", "")
        raise InterpError(f"{flag} {value}: {hint}one of {', '.join(choices)} expected")


def bos_policy(word: str | None) -> BosPolicy | None:
    """Return ``--bos`` as `interp.load` takes it. Raises InterpError for a word that names no policy."""
    from interp.prompts.special_tokens import bos_of_word

    try:
        return None if word is None else bos_of_word(word)
    except ValueError as error:
        raise InterpError(f"--bos {word}: {error}") from None


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
