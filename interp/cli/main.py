"""The command line.

Bad input ends with one clear message and exit code 2; heavy modules are imported by verbs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from interp.cli.circuits import circuit
from interp.cli.generate import generate
from interp.cli.messages import options_of, spoken
from interp.cli.options import BosOption, bos_policy
from interp.cli.recipes import register
from interp.cli.stats import stats
from interp.cli.sweep import app as sweep
from interp.cli.tasks import tasks
from interp.errors import InterpError
from interp.utils.json_text import parse_json

app = typer.Typer(
    help="Activation patching, causal tracing and head ablation, on attention that reports what every head did.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    import interp
    from interp.utils.provenance import versions

    others = ", ".join(f"{name} {number}" for name, number in versions().items() if name != "interp")
    typer.echo(f"interp {interp.__version__}\nwith {others}")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and end.")
    ] = False,
) -> None:
    """Keep verbs as subcommands, even if there is only one."""


@app.command()
def demo(
    task: Annotated[
        str,
        typer.Option(
            help="ioi: indirect object identification (who gets the drink?). induction: complete a repeated "
            "sequence. facts: recall a fact about a subject. interp tasks lists the others."
        ),
    ] = "ioi",
    n: Annotated[int, typer.Option(help="Prompt pairs: more give narrower intervals and take longer.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of everything random: names, donors, noise.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the Parquet files and report.html.")] = Path("results/demo"),
    model: Annotated[
        str,
        typer.Option(help="smollm2 (embedded, needs no model hub), a hub id, a local model folder or a .gguf file."),
    ] = "smollm2",
    facts: Annotated[int, typer.Option(help="How many facts to trace causally.")] = 3,
    samples: Annotated[int, typer.Option(help="Noise samples per fact in causal tracing (published: 10).")] = 10,
) -> None:
    """Run every main method on a real model, and write a report.

    The methods are the check of the behaviour, attention statistics, patching, ablation and causal tracing. Each
    step's result is a Parquet file in --out as soon as the step is done; report.html shows them all.
    """
    from interp.cli.demo import Demo

    job = Demo(task, n, seed, out, model, facts, samples, say=lambda line: typer.echo(line))
    try:
        path = job.run()
    except KeyboardInterrupt:
        names = ", ".join(p.name for p in job.finished) or "nothing yet"
        typer.echo(f"\ninterrupted; finished and readable in {out}: {names}", err=True)
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
    from interp.plots.read_results import read_results
    from interp.plots.report import report as make_report
    from interp.utils.files import check_suffix

    target = out or (run if run.is_dir() else run.parent) / "report.html"
    check_suffix(target, ".html", "a report is one page of HTML")
    typer.echo(f"wrote {make_report(read_results(run), title=run.stem).write(target)}")


@app.command()
def fetch() -> None:
    """Download and convert the embedded model now, so that later runs need no network."""
    from interp.model.embedded import embedded_model

    typer.echo(f"the embedded model is in {embedded_model()}")


register(app)
app.command()(stats)
app.command()(generate)
app.add_typer(sweep, name="sweep")
app.command()(tasks)
app.command()(circuit)

bench = typer.Typer(help="Measure speed and memory on this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")


def _case_names(names: list[str] | None) -> list[str]:
    """Return ``--cases a,b --cases c`` as [a, b, c]."""
    return [name.strip() for text in names or () for name in text.split(",")]


def _check_results_file(path: Path | None) -> None:
    """Raise InterpError unless results can be written to the file.

    Called before hours of measuring.
    """
    if path is None:
        return
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    try:
        previous = parse_json(path.read_bytes()) if existing == path else {}
        usable = isinstance(previous, dict) and (existing == path or existing.is_dir()) and os.access(existing, os.W_OK)
    except (OSError, ValueError):
        usable = False
    if not usable:
        raise InterpError(
            f"--json {path}: expected a new file, or one that this command has written, in a writable folder"
        )


@bench.callback()
def _bench() -> None:
    """Keep verbs as subcommands, even if there is only one."""


@bench.command()
def kernel(
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes and few runs, to check that everything works.")
    ] = False,
    cases: Annotated[
        list[str] | None, typer.Option(help="causal, prefix, costs or gpu; can be repeated. Default: all.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of torch, for cases on the CPU.")] = 2,
) -> None:
    """Compare attention with statistics to plain attention.

    Reports times, memory, and the targets.

    The same as python -m headstats.bench. Cases for a GPU run only if there is one.
    """
    from headstats.bench import run as kernel_bench

    if wrong := set(_case_names(cases)) - set(kernel_bench.KINDS):
        raise InterpError(f"--cases {' '.join(sorted(wrong))}: choose from {', '.join(kernel_bench.KINDS)}")
    _check_results_file(json)
    result = kernel_bench.run(_case_names(cases) or kernel_bench.KINDS, quick, threads, say=typer.echo)
    if json:
        kernel_bench.write(result, json)


@bench.command()
def sweeps(
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers; other cases in the file stay.")] = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(help="resid-early, z, ablation, tracing, edges, …; a wrong name lists all. Default: all."),
    ] = None,
    rounds: Annotated[int, typer.Option(help="How often each library runs each case; the median is reported.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 2,
) -> None:
    """Compare sweeps of the embedded model with those of other libraries.

    The others are TransformerLens, batched Hugging Face hooks, nnsight and pyvene; the last two only where they are
    installed. All run in turn in one process; a time counts only if all numbers
    agree within 1e-4. Everything takes half an hour.
    """
    os.environ["TQDM_DISABLE"] = "1"  # transformer_lens.patching draws a bar; tqdm reads this when it is imported
    from interp.bench import sweeps as benchmark

    _check_results_file(json)
    benchmark.run(_case_names(cases) or benchmark.NAMES, rounds, threads, json, say=typer.echo)


@bench.command("sweep-layer")
def sweep_layer(
    json: Annotated[Path | None, typer.Option(help="Where to write all numbers; other cases in the file stay.")] = None,
    cases: Annotated[
        list[str] | None,
        typer.Option(help="overhead, local, ray, rows, resume, corpus; can be repeated. Default: all."),
    ] = None,
) -> None:
    """Measure the overhead of `interp sweep`, and how it scales.

    It is measured with workers, and with many rows, parts and documents.
    """
    from interp.bench import sweep_layer as benchmark

    _check_results_file(json)
    benchmark.run(_case_names(cases) or list(benchmark.CASES), json, say=typer.echo)


@app.command()
def doctor(
    model: Annotated[str, typer.Argument(help="As for demo: smollm2, a hub id, a local folder or a .gguf file.")] = (
        "smollm2"
    ),
    context: Annotated[
        int | None, typer.Option(help="Tokens to estimate the memory for. Default: the model's context.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (the default), bfloat16, float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (the default), cuda, cuda:1, mps, …")] = None,
    bos: BosOption = None,
    architectures: Annotated[
        bool, typer.Option("--architectures", help="Check tiny random models of every architecture family instead.")
    ] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print that table as Markdown.")] = False,
) -> None:
    """Check a model as interp runs it.

    Compares logits with eager attention, and reports backends, sites, half precision and memory.

    Exit code 1 if a check fails, 2 if the model cannot be loaded.
    """
    if architectures:
        from interp.doctor.matrix import architectures as examine_families

        table = examine_families(say=lambda line: typer.echo(line, err=True))
        typer.echo(table.markdown() if markdown else str(table))
        passed = table.passed
    else:
        from interp.doctor.examination import examine

        examination = examine(model, context=context, dtype=dtype, device=device, bos=bos_policy(bos))
        typer.echo(str(examination))
        passed = examination.passed
    if not passed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: turn InterpError into a message and exit code 2."""
    try:
        app()
    except InterpError as error:
        options = options_of(typer.main.get_command(app), sys.argv[1:])
        typer.echo(f"error: {spoken(str(error), options)}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
