"""`interp sweep …`: write, plan, run, watch, join and export sweeps. Heavy imports wait for the verb."""

from __future__ import annotations

import atexit
import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interp.errors import InterpError

if TYPE_CHECKING:
    from interp.jobs.driver import Outcome

app = typer.Typer(
    help="Scripted sweeps that can be killed, moved and resumed: models × tasks × recipes × sites × seeds. Exit codes "
    "of run and resume: 0 complete, 3 complete with failed cells, 4 incomplete, 2 refused, 130 interrupted.",
    no_args_is_help=True,
)

ConfigFile = Annotated[Path, typer.Argument(help="A sweep.toml; `interp sweep init` writes one.")]
RunFolder = Annotated[Path, typer.Argument(help="A run directory.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Run directory. Default: runs/NAME beside the config.")]
Executor = Annotated[
    str,
    typer.Option(help="in-process; local: processes on this machine; ray; auto: local if there is more than a core."),
]
Workers = Annotated[int | None, typer.Option(help="Processes or actors. Default: one for each core (or device).")]
Threads = Annotated[int, typer.Option(help="Threads of each worker. The same number gives the same bits.")]
Shard = Annotated[
    str | None,
    typer.Option(help="i/n, from 0: only every n-th part from the i-th, as for a Slurm array. Default: all."),
]
Devices = Annotated[
    str | None,
    typer.Option(help="GPUs for local workers, groups apart by semicolons: '0;1' or '0,1;2,3'. One worker each."),
]
Address = Annotated[str | None, typer.Option(help="Of a running Ray cluster. Default: Ray is started here.")]
Gpus = Annotated[float, typer.Option(help="GPUs of each Ray worker.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Compute parts with failed cells anew.")]
Show = Annotated[str, typer.Option("--log", help="auto, live, plain, json (lines on stdout) or none.")]


@app.command()
def init(path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("sweep.toml")) -> None:
    """Write a commented sweep.toml to start from."""
    from interp.sweep.template import sweep_template
    from interp.utils.files import publish_file

    if not path.parent.is_dir():
        raise InterpError(f"{path.parent} is no folder: make it first, or give another name")
    if not publish_file(path, sweep_template().encode()):
        raise InterpError(f"{path} exists, and is left as it is: give another name")
    typer.echo(f"wrote {path}; what it costs: interp sweep plan {path}")


@app.command()
def plan(config: ConfigFile, workers: Workers = None) -> None:
    """Say what a sweep costs (cells, FLOPs, time, disk, memory); runs no cell."""
    from interp.sweep.config import read_config
    from interp.sweep.plan import plan as planned

    typer.echo(str(planned(read_config(config), workers or _cores())))


@app.command()
def run(
    config: ConfigFile,
    out: Out = None,
    executor: Executor = "auto",
    workers: Workers = None,
    threads: Threads = 1,
    shard: Shard = None,
    devices: Devices = None,
    address: Address = None,
    gpus: Gpus = 0,
    retry_failed: RetryFailed = False,
    show: Show = "auto",
) -> None:
    """Run a sweep, or go on with it. An edited config is refused, with the difference."""
    from interp.sweep import Sweep

    sweep = Sweep(config, out)
    _run(sweep, executor, workers, threads, shard, devices, address, gpus, retry_failed, show)


@app.command()
def resume(
    folder: RunFolder,
    executor: Executor = "auto",
    workers: Workers = None,
    threads: Threads = 1,
    shard: Shard = None,
    devices: Devices = None,
    address: Address = None,
    gpus: Gpus = 0,
    retry_failed: RetryFailed = False,
    show: Show = "auto",
) -> None:
    """Go on with a run directory, wherever it has been moved; needs no config beside it."""
    from interp.sweep import Sweep

    _run(Sweep.open(folder), executor, workers, threads, shard, devices, address, gpus, retry_failed, show)


def _run(
    sweep: Any, executor: str, workers: int | None, threads: int, shard: str | None, devices: str | None,
    address: str | None, gpus: float, retry_failed: bool, show: str,
) -> None:  # fmt: skip
    if show not in ("auto", "live", "plain", "json", "none"):
        raise InterpError(f"--log {show}: auto, live, plain, json or none expected")
    groups = tuple(g.strip() for g in devices.split(";") if g.strip()) if devices else ()
    try:
        outcome = sweep.run(
            executor=executor, workers=workers, threads=threads, shard=shard_number(shard), devices=groups,
            address=address, gpus=gpus, retry_failed=retry_failed, show=show,
        )  # fmt: skip
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted; what is finished is kept. Go on with: interp sweep resume {sweep.root}", err=True)
        raise typer.Exit(130) from None
    finish(outcome, sweep.root, show, f"interp sweep resume {sweep.root}")


def finish(outcome: Outcome, root: Path, show: str, again: str) -> None:
    """Say how it ended, and how to go on (``again``); exit with the outcome's code."""
    if outcome.interrupted:  # a second ctrl-C that comes too late drops nothing, and is no error of the exit
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    if show == "json":
        said = {
            "event": "end",
            "run": str(root),
            "code": outcome.code,
            "parts": outcome.parts,
            "present": outcome.present,
        }
        said |= {"cells": outcome.rows, "failed_cells": outcome.failed, "left": len(outcome.left)}
        typer.echo(json.dumps(said | {"damaged": len(outcome.damaged)}))
    else:
        typer.echo(f"{root}: {outcome}", err=outcome.code != 0)
        if outcome.code in (4, 130):
            typer.echo(f"go on with: {again}", err=True)
    if outcome.code:
        raise typer.Exit(outcome.code)


def shard_number(text: str | None) -> tuple[int, int] | None:
    """``2/8`` as (2, 8)."""
    if text is None:
        return None
    i, slash, n = text.partition("/")
    if not slash or not i.isdigit() or not n.isdigit():
        raise InterpError(f"--shard {text}: i/n expected, e.g. 0/4 for the first of four")
    return int(i), int(n)


@app.command()
def status(
    folder: RunFolder,
    verify: Annotated[bool, typer.Option("--verify", help="Read every part and compare it with its checksum.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Say how far a run is, who works on it, and what is damaged. Exit code 1 if something is."""
    from interp.jobs.leases import holders
    from interp.jobs.store import Store

    store = Store.open(folder)
    found = store.inventory()
    damaged = dict(found.damaged)
    if verify:
        damaged |= dict(store.verify(sorted(found.present)))
    held = {p: h for p, h in holders(store.root / "leases").items() if p not in found.present}
    if as_json:
        counts = {
            "parts": store.n_parts,
            "present": len(found.present),
            "cells": found.rows,
            "failed_cells": found.failed,
        }
        typer.echo(json.dumps({**counts, "damaged": damaged, "held": held}))
    else:
        typer.echo(
            f"{folder}: {len(found.present):,} of {store.n_parts:,} parts, {found.rows:,} cells, {found.failed:,} "
            "failed"
        )
        for part, holder in sorted(held.items()):
            typer.echo(f"  part {part} was taken by process {holder.get('pid')} on {holder.get('host')}")
        for part, why in sorted(damaged.items()):
            typer.echo(f"  part {part} is damaged: {why}")
    if damaged:
        raise typer.Exit(1)


@app.command()
def merge(
    folder: RunFolder, others: Annotated[list[Path], typer.Argument(help="Run directories of the same config.")]
) -> None:
    """Take over the parts that other copies of a run have, each checked; none is counted twice."""
    from interp.sweep import Sweep

    counts = Sweep.open(folder).merge(*others)
    typer.echo(
        f"{folder}: {counts['taken']} parts taken over, {counts['there']} were there, {counts['missing']} are missing"
    )


@app.command()
def export(
    folder: RunFolder,
    out: Annotated[Path, typer.Argument(help="A .parquet, .csv or .html file.")],
    format: Annotated[str | None, typer.Option(help="parquet, csv or html. Default: by the file's ending.")] = None,
) -> None:
    """Write the whole table as one file; .html makes a page of it."""
    from interp.sweep import Sweep

    sweep = Sweep.open(folder)
    typer.echo(f"wrote {sweep.export(out, format)}")
    parts, there = sweep.store.n_parts, len(sweep.status().present)
    if there < parts:
        typer.echo(f"the run is unfinished: {there:,} of {parts:,} parts are in it", err=True)


def _cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
