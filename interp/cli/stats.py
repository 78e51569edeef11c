"""`interp stats`: attention statistics over a corpus. Heavy imports wait for the verb."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interp.cli.sweep import Executor, Show, Threads, Workers, finish, shard_number
from interp.cli.sweep import Shard as ShardText
from interp.errors import InterpError


def stats(
    model: Annotated[str, typer.Argument(help="smollm2 (embedded), a hub id, a local model folder or a .gguf file.")],
    data: Annotated[
        list[Path],
        typer.Option(help="Text (a document a line), .jsonl (key text) or .npy token ids. May be given again."),
    ],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Run directory. Default: runs/stats-….")] = None,
    context: Annotated[
        int, typer.Option(help="Tokens that see each other; documents are cut to windows of so many.")
    ] = 512,
    statistics: Annotated[
        str | None, typer.Option(help="Of headstats.StatSpec: entropy,sink=4,previous. Default: its default.")
    ] = None,
    bytes_per_part: Annotated[int, typer.Option(help="Bytes of a file that are computed and stored together.")] = 2**19,
    dtype: Annotated[str | None, typer.Option(help="float32 (the default), bfloat16, float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu (the default), cuda, cuda:1, mps, …")] = None,
    executor: Executor = "auto",
    workers: Workers = None,
    threads: Threads = 1,
    shard: ShardText = None,
    show: Show = "auto",
) -> None:
    """Attention statistics of every head over a corpus of any length, streamed; resumed by the same command.

    Writes statistics.csv (count, mean, variance, quantiles by layer and head) into the run directory.
    """
    from interp.corpus import statistics as measure
    from interp.utils.files import result_file

    try:
        found = measure(
            model, data, out, context=context, statistics=chosen(statistics), bytes_per_part=bytes_per_part,
            dtype=dtype, device=device, executor=executor, workers=workers, threads=threads,
            shard=shard_number(shard), show=show,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo("\ninterrupted; what is finished is kept. The same command goes on with it", err=True)
        raise typer.Exit(130) from None
    target = found.root / "statistics.csv"
    with result_file(target) as file:
        file.write(found.frame().to_csv(index=False).encode())
    typer.echo(f"{found.documents:,} documents, {found.tokens:,} tokens; wrote {target}", err=show == "json")
    for error in dict.fromkeys(found.errors):
        typer.echo(f"  left out: {error}", err=True)
    assert found.outcome is not None
    finish(found.outcome, found.root, show, "the same command")


def chosen(text: str | None) -> dict[str, Any] | None:
    """``entropy,sink=4`` as fields of a StatSpec."""
    if text is None:
        return None
    found: dict[str, Any] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if equals and not value.isdigit():
            raise InterpError(f"--statistics {item}: a whole number expected after =")
        found[name] = int(value) if equals else True
    return found
