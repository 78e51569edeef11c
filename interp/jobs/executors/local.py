"""Compute parts in processes on this machine, which share them by leases.

Each process has its own model and threads.

A worker that dies is replaced. A part that kills its workers repeatedly is left, but not marked as failed: whether the
part or the machine is at fault is unknown.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from interp.errors import InterpError
from interp.jobs.folders import put_aside
from interp.jobs.store import Store
from interp.jobs.work import Emit
from interp.utils.files import NotAFile, StorageError, open_regular, read_regular, writing

COMMAND = (sys.executable, "-m", "interp.jobs.worker")
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
MOST_DEATHS = 5  # of workers on one part, in one start of the run
LAST_LINES = 2000  # characters of a dead worker's log that are shown


@dataclass
class _Worker:
    number: int
    process: subprocess.Popen[bytes]
    log: Any
    part: int | None = None
    buffer: bytes = b""
    stopping: bool = False


@dataclass
class Pool:
    """The worker processes of one driver."""

    store: Store
    parts: range
    emit: Emit
    stopped: Callable[[], bool]
    workers: int
    threads: int
    devices: list[str] = field(default_factory=list)
    command: tuple[str, ...] = COMMAND
    left: dict[int, str] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)
    idle_deaths: int = 0
    living: dict[int, _Worker] = field(default_factory=dict)
    selector: selectors.DefaultSelector = field(default_factory=selectors.DefaultSelector)
    fatal: str | None = None

    def run(self) -> dict[int, str]:
        """Work until every part is published or left; return the parts left.

        Returns earlier if the run is stopped.
        """
        try:
            for number in range(min(self.workers, len(self.parts))):
                self._start(number)
            while self.living:
                self._read_events()
                if self.stopped() or self.fatal:
                    self._ask_to_stop()
        except BaseException:
            self._kill_all()
            raise
        finally:
            self.selector.close()
        if self.fatal:
            raise StorageError(self.fatal)
        return self.left

    def _start(self, number: int) -> None:
        """Start a worker process."""
        options = {
            "parts": [self.parts.start, self.parts.stop, self.parts.step],
            "left": list(self.left),
        }
        variables: dict[str, str] = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        if self.devices:  # each worker sees its own GPU, or group of GPUs
            variables["CUDA_VISIBLE_DEVICES"] = self.devices[number % len(self.devices)]
        log = self._open_log(self._log_path(number))
        process = subprocess.Popen(
            [*self.command, str(self.store.root), json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, env={**os.environ, **variables}, start_new_session=True,
        )  # fmt: skip
        worker = _Worker(number, process, log)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self.selector.register(process.stdout, selectors.EVENT_READ, worker)
        self.living[number] = worker
        self.emit({"event": "worker", "worker": number, "pid": process.pid})

    def _log_path(self, number: int) -> Path:
        return self.store.root / "drivers" / f"{os.getpid()}-worker-{number}.log"

    def _open_log(self, path: Path) -> BinaryIO:
        """Open a worker's log to append to it; whatever else has its name is put aside."""
        for _ in range(2):
            try:
                with writing(path):
                    return open(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab")
            except NotAFile as error:
                put_aside(self.store.root, path, str(error), self.store.report)
        raise StorageError(f"cannot write {path}")

    def _read_events(self) -> None:
        """Read what workers report, and notice those that ended."""
        for key, _ in self.selector.select(timeout=0.2):
            worker: _Worker = key.data
            output = os.read(key.fd, 1 << 16)
            if not output:
                self._handle_end(worker)
                continue
            *lines, worker.buffer = (worker.buffer + output).split(b"\n")
            for line in lines:
                self._handle_event(worker, json.loads(line))

    def _handle_event(self, worker: _Worker, event: dict[str, Any]) -> None:
        """Record an event of a worker, and pass it on."""
        kind = event["event"]
        if kind == "started":
            worker.part = event["part"]
        elif kind in ("done", "left"):
            worker.part = None
            self.idle_deaths = 0
        if kind == "left":
            self.left[event["part"]] = event["reason"]
        if kind == "fatal":
            self.fatal = event["reason"]
            return
        self.emit({**event, "worker": worker.number})

    def _handle_end(self, worker: _Worker) -> None:
        """Handle a worker that finished or died.

        Start another one if it died and parts are left.
        """
        assert worker.process.stdout is not None
        self.selector.unregister(worker.process.stdout)
        code = worker.process.wait()
        worker.log.close()
        del self.living[worker.number]
        if code == 0 or self.fatal or worker.stopping:
            return
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        self.emit({"event": "died", "worker": worker.number, "part": worker.part, "reason": how})
        if worker.part is None:
            self.idle_deaths += 1
            if self.idle_deaths >= MOST_DEATHS * self.workers:
                raise InterpError(
                    f"workers die before they start ({how}); the log of the last one ends with:\n"
                    f"{self._last_lines(worker)}"
                )
        else:
            self.deaths[worker.part] += 1
            if self.deaths[worker.part] >= MOST_DEATHS:
                reason = f"{self.deaths[worker.part]} workers died while they computed it; the last one {how}"
                self.left[worker.part] = reason
                self.emit({"event": "left", "part": worker.part, "reason": reason})
        if not self.stopped() and any(p not in self.left and not self.store.has(p) for p in self.parts):
            self._start(worker.number)

    def _last_lines(self, worker: _Worker) -> str:
        """Return the end of a worker's log."""
        with contextlib.suppress(OSError, NotAFile):
            return read_regular(self._log_path(worker.number))[-LAST_LINES:].decode(errors="replace")
        return ""

    def _ask_to_stop(self) -> None:
        """Tell every worker to stop after its current part."""
        for worker in self.living.values():
            if not worker.stopping:
                worker.stopping = True
                assert worker.process.stdin is not None
                with contextlib.suppress(OSError):
                    worker.process.stdin.write(b"stop\n")
                    worker.process.stdin.flush()

    def _kill_all(self) -> None:
        """Kill all workers; their leases end with them."""
        for worker in self.living.values():
            worker.process.kill()
        deadline = time.monotonic() + 5
        for worker in self.living.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(max(0.1, deadline - time.monotonic()))
            worker.log.close()


def run(
    store: Store, parts: range, emit: Emit, stopped: Callable[[], bool], *, workers: int, threads: int = 1,
    devices: Sequence[str] = (), command: tuple[str, ...] | None = None, **_: Any,
) -> dict[int, str]:  # fmt: skip
    """Compute the parts in worker processes; return those left, and why.

    There are ``workers`` processes of ``threads`` threads each.
    """
    return Pool(store, parts, emit, stopped, workers, threads, list(devices), command or COMMAND).run()
