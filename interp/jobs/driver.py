"""The driver: complete a run, whatever state it is in."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from interp.errors import InterpError
from interp.jobs.audit import Audit
from interp.jobs.folders import make_folders, put_aside
from interp.jobs.leases import Leases, holder
from interp.jobs.receipts import Inventory, part_name
from interp.jobs.status import Tally, display, duration
from interp.jobs.store import Store
from interp.jobs.work import Emit, Event, shard_of
from interp.utils.arguments import is_whole
from interp.utils.files import write_file
from interp.utils.provenance import now, versions

EXECUTORS = ("auto", "in-process", "local", "ray")
ROUNDS = 3  # of recomputing damaged parts at the end
COMPLETE, FAILED_CELLS, INCOMPLETE, INTERRUPTED = 0, 3, 4, 130


@dataclass(frozen=True)
class Options:
    """How a run is carried out. No option changes which results it gives.

    ``workers``: default one per core. ``threads``: of each worker; the same number gives the same bits. ``shard``: (i,
    n), only every n-th part, starting with the i-th. ``devices``: values of CUDA_VISIBLE_DEVICES, assigned to workers
    in turn. ``address``: of a Ray cluster. ``gpus``: of each Ray worker.
    """

    executor: str = "auto"
    workers: int | None = None
    threads: int = 1
    shard: tuple[int, int] | None = None
    devices: tuple[str, ...] = ()
    address: str | None = None
    gpus: float = 0
    retry_failed: bool = False
    show: str = "auto"
    models: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """State of the run when a driver ends.

    ``left``: parts that were not computed, with the reason. ``damaged``: parts that were computed again, with the
    damage. ``elsewhere``: how many parts belong to other shards. ``code``: 0 complete, 3 with failed cells, 4
    incomplete, 130 interrupted.
    """

    parts: int
    present: int
    rows: int
    failed: int
    left: dict[int, str]
    damaged: dict[int, str]
    interrupted: bool
    elsewhere: int
    why: str = ""  # the most common reason in the first part with failed cells
    notes: tuple[str, ...] = ()  # what was put aside, could not be compared, or differs between parts

    @property
    def code(self) -> int:
        """Return the exit code of the command."""
        if self.interrupted:
            return INTERRUPTED
        if self.present < self.parts - self.elsewhere:
            return INCOMPLETE
        return FAILED_CELLS if self.failed else COMPLETE

    def __str__(self) -> str:
        lines = [f"{self.present:,} of {self.parts:,} parts, {self.rows:,} cells"]
        if self.failed:
            why = f": {self.why[:300]}" if self.why else ""
            lines.append(f"{self.failed:,} of these failed; the column `error` says why{why}")
        if self.damaged:
            parts = _first_few(self.damaged)
            lines.append(f"{len(self.damaged)} part(s) were found damaged and computed anew: {parts}")
        for reason in dict.fromkeys(self.left.values()):
            lines.append(f"{sum(r == reason for r in self.left.values())} part(s) left undone: {reason}")
        lines += self.notes
        if self.elsewhere and self.present < self.parts:
            lines.append(f"{self.elsewhere:,} parts belong to other shards")
        return "\n".join(lines)


def drive(store: Store, options: Options | None = None) -> Outcome:
    """Compute the missing parts, check the others, and compute damaged ones again.

    Raises StorageError if the run directory cannot be written, InterpError if the run cannot be started this way.
    """
    options = options or Options()
    execute, workers = select_executor(options)
    shard_parts = shard_of(store.n_parts, options.shard)
    here = set(shard_parts)
    notes: list[str] = []
    store.report = notes.append
    _record_start(store, options, workers)
    leases = store.leases()
    repairs = _Repairs(store, leases)
    left: dict[int, str] = {}
    inventory = store.inventory()
    tally = Tally(len(shard_parts), *_count(inventory, here))
    title = store.document.get("name", store.root.name)
    with display(options.show, tally, title) as show, handle_interrupt(show) as stop:
        emit = _Notes(show, notes)
        store.report = emit.report
        repairs.emit = emit
        if options.retry_failed:
            repairs.retry_failed(p for p, r in inventory.present.items() if r.failed and p in here)
        repairs.remove_leftovers()
        repairs.remove_strays(inventory)
        repairs.put_aside({p: why for p, why in inventory.damaged.items() if p in here})
        before = set(inventory.present) & here
        check = _Check(store, before)
        parts = range(*_bounds(store, options))
        settings = {k: getattr(options, k) for k in ("threads", "devices", "models", "address", "gpus")} | options.extra
        for _ in range(ROUNDS):
            if any(not store.has(p) for p in shard_parts):
                left = execute(store, parts, emit, stop.is_set, workers=workers, **settings)
            if stop.is_set():
                break
            latest = store.inventory()
            damaged = {p: why for p, why in latest.damaged.items() if p in here}
            damaged |= check.failures(set(latest.present) & here)
            if not damaged:
                break
            repairs.put_aside(damaged)
        for line in check.audit.notes():
            store.report(line)
    leases.close()
    last = store.inventory()
    _, rows, failed = _count(last, here)
    left = {p: why for p, why in left.items() if p not in last.present}
    present, elsewhere = len(set(last.present) & here), store.n_parts - len(shard_parts)
    return Outcome(
        store.n_parts, present, rows, failed, left, repairs.done, stop.is_set(), elsewhere, _why(store, last, here),
        tuple(dict.fromkeys(notes)),
    )  # fmt: skip


class _Notes:
    """Passes events on, and collects the messages among them for the outcome."""

    def __init__(self, show: Emit, notes: list[str]):
        self.show, self.notes = show, notes
        for note in dict.fromkeys(notes):  # of before there was a display
            show({"event": "note", "reason": note})

    def __call__(self, event: Event) -> None:
        """Show an event; each message once."""
        if event["event"] == "note":
            if event["reason"] in self.notes:
                return
            self.notes.append(event["reason"])
        self.show(event)

    def report(self, message: str) -> None:
        """Show a message."""
        self({"event": "note", "reason": message})


class _Check:
    """Checks the parts that were finished before this start, once, and one that it computed, to compare with them."""

    def __init__(self, store: Store, before: set[int]):
        self.audit, self.before = Audit(store, only_reads=False), before
        self.checked: set[int] = set()

    def failures(self, present: set[int]) -> dict[int, str]:
        """Return the parts that do not belong to the run, and why."""
        parts = sorted((self.before & present) - self.checked)
        self.checked |= self.before
        return dict(self.audit.failures([*parts, *sorted(present - self.before)[:1]]))


def _bounds(store: Store, options: Options) -> tuple[int, int, int]:
    """Return start, stop and step of the parts of this shard."""
    i, n = options.shard or (0, 1)
    return i, store.n_parts, n


def _count(inventory: Inventory, here: set[int]) -> tuple[int, int, int]:
    """Count this shard's finished parts, their rows, and the failed rows."""
    own = [r for p, r in inventory.present.items() if p in here]
    return len(own), sum(r.rows for r in own), sum(r.failed for r in own)


def _why(store: Store, inventory: Inventory, here: set[int]) -> str:
    """Return the most common error of the first part with failed cells."""
    part = next((p for p, r in sorted(inventory.present.items()) if r.failed and p in here), None)
    if part is None:
        return ""
    try:
        return Counter(store.table(part)["error"].drop_null().to_pylist()).most_common(1)[0][0]
    except (InterpError, OSError, IndexError):  # damaged meanwhile: the next start reports it
        return ""


def select_executor(options: Options) -> tuple[Callable[..., dict[int, str]], int]:
    """Return the executor's function and its number of workers.

    Raises InterpError for options that exclude each other.
    """
    if options.executor not in EXECUTORS:
        raise InterpError(f"unknown executor {options.executor!r}: choose one of {', '.join(EXECUTORS)}")
    if not is_whole(options.threads, 1) or not (options.workers is None or is_whole(options.workers, 1)):
        raise InterpError(f"workers and threads must be at least 1, got {options.workers} and {options.threads}")
    if options.shard is not None and not 0 <= options.shard[0] < options.shard[1]:
        i, n = options.shard
        limit = f"counted from 0, so at most {n - 1}" if n > 0 else "there must be at least 1"
        raise InterpError(f"shard {i}/{n}: {limit}")
    if options.address is not None and options.executor != "ray":
        raise InterpError("an address belongs to executor 'ray'")
    if options.models and options.executor not in ("auto", "in-process"):
        raise InterpError("model objects can be used in this process only: save them to a folder for workers to load")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = options.workers or (len(options.devices) or max(1, cores // options.threads))
    kind = options.executor
    if kind == "auto":
        kind = "in-process" if options.models or workers == 1 else "local"
    if kind == "ray":
        from interp.jobs.executors import ray as executor

        return executor.run, workers if options.workers else 0
    if kind == "local":
        from interp.jobs.executors import local as executor

        return executor.run, workers
    from interp.jobs.executors import inprocess as executor

    return executor.run, 1


class _Repairs:
    """Move damaged parts aside, each under its lease, and remove files whose writer died."""

    def __init__(self, store: Store, leases: Leases):
        self.store, self.leases = store, leases
        self.emit: Emit = lambda event: None
        self.done: dict[int, str] = {}

    def put_aside(self, damaged: dict[int, str]) -> None:
        """Move damaged parts aside, and report them."""
        for part, why in damaged.items():
            if self._move(part):
                self.done[part] = why
                self.emit({"event": "damaged", "part": part, "reason": why})

    def retry_failed(self, parts: Iterable[int]) -> None:
        """Move parts with failed cells aside, so that they are computed again."""
        for part in parts:
            if self._move(part):
                self.emit({"event": "retried", "part": part})

    def _move(self, part: int) -> bool:
        """Move a part aside; False if another process works on it."""
        lease = self.leases.take(part)
        if lease is None:
            return False
        try:
            return self.store.put_aside(part, lease) is not None
        finally:
            lease.release()

    def remove_leftovers(self) -> None:
        """Remove temporary files of parts that nobody is writing."""
        for part, files in self.store.leftovers().items():
            lease = self.leases.take(part)
            if lease is not None:
                for file in files:
                    if file.is_dir() and not file.is_symlink():
                        put_aside(self.store.root, file, "it is a folder", self.store.report)
                    else:
                        file.unlink(missing_ok=True)
                lease.release()

    def remove_strays(self, inventory: Inventory) -> None:
        """Move Parquet files that belong to no part aside: whoever reads ``parts/*.parquet`` would count them."""
        for name in inventory.strays:
            why = f"it is the file of no part; parts are called {part_name(0)} to {part_name(self.store.n_parts - 1)}"
            put_aside(self.store.root, self.store.root / "parts" / name, why, self.store.report)


def _record_start(store: Store, options: Options, workers: int) -> None:
    """Record this driver and its environment in the run.

    Makes folders that a copy of the run may lack.
    """
    make_folders(store.root)
    store.mend_header()
    me = holder()
    host = re.sub(r"[^A-Za-z0-9.-]", "-", str(me["host"]))
    number = len(list((store.root / "drivers").glob("*.json")))
    note = {
        **me, "started": now(), "platform": platform.platform(), "versions": versions(), "executor": options.executor,
        "workers": workers, "threads": options.threads, "shard": options.shard, "command": sys.argv[:1],
        "run": store.header,
    }  # fmt: skip
    write_file(store.root / "drivers" / f"{number:04d}-{host}-{me['pid']}.json", json.dumps(note, indent=1).encode())


@contextmanager
def handle_interrupt(emit: Emit) -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C sets; the second raises KeyboardInterrupt at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        emit({"event": "stopping"})

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _first_few(parts: dict[int, str]) -> str:
    first = sorted(parts)[:5]
    return ", ".join(map(str, first)) + (", …" if len(parts) > 5 else "")


__all__ = ["EXECUTORS", "Options", "Outcome", "drive", "duration", "select_executor"]
