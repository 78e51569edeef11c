"""`interp sweep …`: write, plan, run, watch, merge and export sweeps.

Heavy modules are imported by the verbs.
"""

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
    from interp.jobs.receipts import Inventory
    from interp.jobs.store import Store

app = typer.Typer(
    help="Scripted sweeps that can be killed, moved and resumed: models × tasks × recipes × sites × seeds. Exit codes "
    "of run and resume: 0 complete, 3 complete with failed cells, 4 incomplete, 2 refused, 130 interrupted.",
    no_args_is_help=True,
)

ConfigFile = Annotated[Path, typer.Argument(help="A sweep.toml; `interp sweep init` writes one.")]
RunFolder = Annotated[Path, typer.Argument(help="A run directory.")]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="Run directory. Default: runs/NAME next to the config.")]
Executor = Annotated[
    str,
    typer.Option(help="in-process; local: processes on this machine; ray; auto: local with more than one core."),
]
Workers = Annotated[int | None, typer.Option(help="Processes or actors. Default: one for each core (or device).")]
Threads = Annotated[int, typer.Option(help="Threads of each worker. The same number gives the same bits.")]
Shard = Annotated[
    str | None,
    typer.Option(help="i/n, from 0: only every n-th part from the i-th on, as for a Slurm array. Default: all."),
]
Devices = Annotated[
    str | None,
    typer.Option(help="GPUs for local workers, groups separated by semicolons: '0;1' or '0,1;2,3'. One worker each."),
]
Address = Annotated[
    str | None, typer.Option(help="Address of a running Ray cluster. Default: Ray is started on this machine.")
]
Gpus = Annotated[float, typer.Option(help="GPUs of each Ray worker.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Compute parts with failed cells again.")]
Show = Annotated[
    str, typer.Option("--log", help="How progress is shown: auto, live, plain, json (lines on stdout) or none.")
]


@app.command()
def init(path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("sweep.toml")) -> None:
    """Write a commented sweep.toml to start from."""
    from interp.sweep.template import sweep_template
    from interp.utils.files import publish_file

    if not path.parent.is_dir():
        raise InterpError(f"{path.parent} is not a folder: make it first, or give another name")
    if not publish_file(path, sweep_template().encode()):
        raise InterpError(f"{path} exists, and is left as it is: give another name")
    typer.echo(f"wrote {path}; to see what it costs: interp sweep plan {path}")


@app.command()
def plan(config: ConfigFile, workers: Workers = None) -> None:
    """Print what a sweep costs (cells, FLOPs, time, disk, memory); runs no cell."""
    from interp.sweep.config import read_config
    from interp.sweep.plan import plan as make_plan

    typer.echo(str(make_plan(read_config(config), workers or _cores())))


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
    """Run or resume a sweep. An edited config is refused, with the difference."""
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
    """Resume a run directory, wherever it has been moved; needs no config file."""
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
        typer.echo(f"\ninterrupted; what is finished is kept. Resume with: interp sweep resume {sweep.root}", err=True)
        raise typer.Exit(130) from None
    finish(outcome, sweep.root, show, f"interp sweep resume {sweep.root}")


def finish(outcome: Outcome, root: Path, show: str, resume_command: str) -> None:
    """Print the outcome and how to resume; exit with the outcome's code."""
    if outcome.interrupted:  # a second Ctrl-C that comes too late must not turn the exit into an error
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
    if show == "json":
        event = {
            "event": "end",
            "run": str(root),
            "code": outcome.code,
            "parts": outcome.parts,
            "present": outcome.present,
        }
        event |= {"cells": outcome.rows, "failed_cells": outcome.failed, "left": len(outcome.left)}
        typer.echo(json.dumps(event | {"damaged": len(outcome.damaged)}))
    else:
        typer.echo(f"{root}: {outcome}", err=outcome.code != 0)
        if outcome.code in (4, 130):
            typer.echo(f"resume with: {resume_command}", err=True)
    if outcome.code:
        raise typer.Exit(outcome.code)


def shard_number(text: str | None) -> tuple[int, int] | None:
    """Return ``2/8`` as (2, 8)."""
    if text is None:
        return None
    i, slash, n = text.partition("/")
    if not slash or not i.isdigit() or not n.isdigit():
        raise InterpError(f"--shard {text}: i/n expected, e.g. 0/4 for the first of four")
    return int(i), int(n)


@app.command()
def status(
    folder: RunFolder,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every part; compare checksum, config, weights, prompts.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
) -> None:
    """Print the progress of a run, its workers, and damaged parts.

    Exit code 1 if a part is damaged, does not belong to the run, or a file of the run was altered.
    """
    from interp.jobs.leases import holders
    from interp.jobs.store import Store

    store = Store.open(folder)
    inventory = store.inventory()
    damaged, bad_files, notes = dict(inventory.damaged), {}, []
    if verify:
        more, bad_files, notes = _verify(store, inventory)
        damaged |= more
    bad_files |= {f"parts/{name}": "it is the file of no part" for name in inventory.strays}
    held = {p: h for p, h in holders(store.root / "leases").items() if p not in inventory.present}
    if as_json:
        counts = {
            "parts": store.n_parts,
            "present": len(inventory.present),
            "cells": inventory.rows,
            "failed_cells": inventory.failed,
        }
        more = {"files": bad_files, "notes": notes}
        typer.echo(json.dumps({**counts, "damaged": damaged, "held": held, **more}))
    else:
        n_present = f"{len(inventory.present):,} of {store.n_parts:,} parts"
        typer.echo(f"{folder}: {n_present}, {inventory.rows:,} cells, {inventory.failed:,} failed")
        for part, holder in sorted(held.items()):
            typer.echo(f"  part {part} was taken by process {holder.get('pid')} on {holder.get('host')}")
        for part, why in sorted(damaged.items()):
            typer.echo(f"  part {part} is damaged: {why}")
        for name, why in sorted(bad_files.items()):
            typer.echo(f"  {name} cannot be used: {why}")
        for note in notes:
            typer.echo(f"  {note}")
    if damaged or bad_files:
        raise typer.Exit(1)


def _verify(store: Store, inventory: Inventory) -> tuple[dict[int, str], dict[str, str], list[str]]:
    """Read every part; return damaged parts and bad frozen files, with the reasons, and what else to know."""
    from interp.jobs.audit import Audit

    store.report = (messages := []).append
    audit = Audit(store)
    damaged = dict(audit.failures(sorted(inventory.present)))
    told = [m for m in messages if not any(name in m for name in audit.bad_files)]
    return damaged, dict(audit.bad_files), [*told, *audit.notes()]


@app.command()
def merge(
    folder: RunFolder, others: Annotated[list[Path], typer.Argument(help="Run directories of the same config.")]
) -> None:
    """Copy the parts that other copies of a run have, each checked; none is counted twice.

    Parts computed with other weights, another dtype or other prompts are refused before anything is copied.
    """
    from interp.sweep import Sweep

    counts = Sweep.open(folder).merge(*others)
    typer.echo(
        f"{folder}: {counts['taken']} parts copied, {counts['there']} existed already, {counts['missing']} are missing"
    )


@app.command()
def export(
    folder: RunFolder,
    out: Annotated[Path, typer.Argument(help="A .parquet, .csv or .html file.")],
    format: Annotated[str | None, typer.Option(help="parquet, csv or html. Default: by the file's ending.")] = None,
) -> None:
    """Write the whole table as one file; .html makes a report page."""
    from interp.sweep import Sweep

    sweep = Sweep.open(folder)
    typer.echo(f"wrote {sweep.export(out, format)}")
    n_parts, n_present = sweep.store.n_parts, len(sweep.status().present)
    if n_present < n_parts:
        typer.echo(f"the run is unfinished: it has {n_present:,} of {n_parts:,} parts", err=True)


def _cores() -> int:
    """Return the number of cores that this process may use."""
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
