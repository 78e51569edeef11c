"""The command line. Bad input ends with one clear message and exit code 2; heavy imports wait for the verb."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from interp.errors import InterpError

app = typer.Typer(
    help="Activation patching, causal tracing and head ablation, on attention that reports what every head did.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keep verbs as verbs even while there are few of them."""


@app.command()
def demo(
    task: Annotated[
        str,
        typer.Option(
            help="ioi: indirect object identification (who gets the drink?). induction: complete a repeated "
            "sequence. facts: recall a fact about a subject."
        ),
    ] = "ioi",
    n: Annotated[int, typer.Option(help="Prompt pairs: more give narrower intervals, and take longer.")] = 8,
    seed: Annotated[int, typer.Option(help="Everything random (names, donors, noise) follows from it.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the Parquet files and report.html.")] = Path("results/demo"),
    model: Annotated[
        str,
        typer.Option(help="smollm2 (embedded, needs no model hub), a hub id, a local model folder or a .gguf file."),
    ] = "smollm2",
    facts: Annotated[int, typer.Option(help="How many facts to trace causally.")] = 4,
    samples: Annotated[int, typer.Option(help="Noise samples per fact in causal tracing (published: 10).")] = 10,
) -> None:
    """Run the main job on a real model: behaviour, attention statistics, patching, ablation, causal tracing, report.

    Each step's result is a Parquet file in --out as soon as it is done; report.html joins them all.
    """
    from interp.demo import Demo

    job = Demo(task, n, seed, out, model, facts, samples, say=lambda line: typer.echo(line))
    try:
        path = job.run()
    except KeyboardInterrupt:
        done = ", ".join(p.name for p in job.finished) or "nothing yet"
        typer.echo(f"\ninterrupted; finished and readable in {out}: {done}", err=True)
        if job.finished:
            typer.echo(f"make a page of them with: interp report {out}", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"\nOpen {path} in a browser.")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="A folder of Parquet files written by interp, or one such file.")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Where to write; default RUN/report.html.")] = None,
) -> None:
    """Make one self-contained HTML page from a folder of results."""
    from interp.plots.report import report as make
    from interp.results import read_results

    target = out or (run if run.is_dir() else run.parent) / "report.html"
    typer.echo(f"wrote {make(read_results(run), title=run.stem).write(target)}")


@app.command()
def fetch() -> None:
    """Fetch and convert the embedded model now, so that later runs need no network."""
    from interp.zoo.embedded import embedded_model

    typer.echo(f"the embedded model is in {embedded_model()}")


def main() -> None:
    """Entry point: turns InterpError into a message and exit code 2."""
    try:
        app()
    except InterpError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
