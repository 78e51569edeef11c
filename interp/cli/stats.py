"""`interp stats`: attention statistics over a corpus.

Heavy modules are imported by the verb.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.options import BosOption, bos_policy
from interp.cli.sweep import Executor, Show, Threads, Workers, finish, shard_number
from interp.cli.sweep import Shard as ShardText
from interp.errors import InterpError

MOST_SHOWN = 20  # documents that were left out


def stats(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a hub id, a local model folder or a .gguf file.")],
    data: Annotated[
        list[Path],
        typer.Option(
            help="Text (one document per line), .jsonl (key text) or .npy token ids. Can be repeated. With --by: "
            "prompts, as for --pairs of other commands, or text."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", help="Run directory. Default: runs/stats-…. With --by: a .parquet or .csv file."),
    ] = None,
    by: Annotated[
        str,
        typer.Option(help="token; span or sentence: what each span of a prompt reads of each, in one table."),
    ] = "token",
    spans: Annotated[
        str | None, typer.Option(help="Names of the spans that divide the prompts, comma-separated. Default: all.")
    ] = None,
    context: Annotated[int, typer.Option(help="Documents are cut to windows of this many tokens.")] = 512,
    statistics: Annotated[
        str | None, typer.Option(help="Fields of headstats.StatSpec: entropy,sink=4,previous. Default: StatSpec().")
    ] = None,
    bytes_per_part: Annotated[int, typer.Option(help="Bytes of a file that are computed and stored together.")] = 2**19,
    dtype: Annotated[str | None, typer.Option(help="float32 (the default), bfloat16, float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (the default), cuda, cuda:1, mps, …")] = None,
    bos: BosOption = None,
    executor: Executor = "auto",
    workers: Workers = None,
    threads: Threads = 1,
    shard: ShardText = None,
    show: Show = "auto",
) -> None:
    """Collect attention statistics of every head over a corpus.

    The corpus can have any length; it is streamed. The same command resumes.

    A document that cannot be read is left out, counted and named; the exit code is then 3. It is 4 if a file changed
    during the run.

    Writes statistics.csv (count, mean, variance, quantiles by layer and head) into the run directory.

    With --by span or --by sentence it measures a few prompts instead, and writes one table: a row for each prompt,
    layer, head, query span and key span.
    """
    if by != "token" or spans is not None:
        from interp.cli.span_stats import write_by_span

        if by == "token":
            raise InterpError("--spans goes with --by span")
        given = {"--context": context != 512, "--bytes-per-part": bytes_per_part != 2**19, "--workers": bool(workers),
                 "--executor": executor != "auto", "--threads": threads != 1, "--shard": shard is not None,
                 "--show": show != "auto"}  # fmt: skip
        fields = parse_statistics(statistics)
        write_by_span(
            model, data, out, by, spans, fields, dtype=dtype, device=device, bos=bos, of_corpora=given,
        )  # fmt: skip
        return
    from interp.corpus import statistics as measure
    from interp.utils.files import result_file

    try:
        result = measure(
            model, data, out, context=context, statistics=parse_statistics(statistics), bytes_per_part=bytes_per_part,
            dtype=dtype, device=device, bos=bos_policy(bos), executor=executor, workers=workers, threads=threads,
            shard=shard_number(shard), show=show,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; what is finished is kept. The same command resumes it", err=True)
        raise typer.Exit(130) from None
    target = result.root / "statistics.csv"
    with result_file(target) as file:
        file.write(result.frame().to_csv(index=False).encode())
    left_out = f"; {result.left_out:,} left out" if result.left_out else ""
    typer.echo(
        f"{result.documents:,} documents{left_out}, {result.tokens:,} tokens; wrote {target}", err=show == "json"
    )
    for error in result.errors[:MOST_SHOWN]:
        typer.echo(f"  left out: {error}", err=True)
    if result.left_out > MOST_SHOWN:
        typer.echo(f"  … and {result.left_out - MOST_SHOWN:,} more", err=True)
    assert result.outcome is not None
    finish(result.outcome, result.root, show, "the same command")


def parse_statistics(text: str | None) -> dict[str, Any] | None:
    """Return ``entropy,sink=4`` as fields of a StatSpec."""
    if text is None:
        return None
    fields: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if equals and not value.isdigit():
            raise InterpError(f"--statistics {item}: a whole number expected after =")
        fields[name] = int(value) if equals else True
    return fields
