"""The loop of a worker: take a part, compute it, publish it, until none is left."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.errors import InterpError, ModelError
from interp.jobs.frozen import FrozenFiles
from interp.jobs.job import Job
from interp.jobs.kinds import JOBS, job_class
from interp.jobs.leases import Leases, holder
from interp.jobs.store import Store

__all__ = ["JOBS", "POLL", "Emit", "Event", "StoreFiles", "Work", "job_class", "job_of", "memory", "shard_of"]

POLL = 0.5  # seconds between checks of parts that other processes hold

Event = dict[str, Any]
Emit = Callable[[Event], None]


class StoreFiles(FrozenFiles):
    """The small files of a run in its own folder, and what its parts say about them."""

    def __init__(self, store: Store, only_reads: bool = False):
        super().__init__(store.root, lambda message: store.report(message), only_reads)
        self.store = store

    def recorded(self, parts: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the metadata of those of these parts that are finished and undamaged."""
        for part in parts:
            if self.store.has(part):
                with contextlib.suppress(InterpError):  # damaged: computed anew at the end of the run
                    yield self.store.about(part)


def job_of(store: Store, **options: Any) -> Job:
    """Return the job that computes the run's parts in this process."""
    return job_class(store.kind)(store.document, StoreFiles(store), **options)


@dataclass
class Work:
    """Compute parts of a run, and share them with other processes.

    ``emit`` receives an event when a part is started, done or left. ``stopped()``: whether to take no further part.
    ``wait``: whether to wait for parts that other processes hold, and to take them over if those processes die.
    ``left``: parts that cannot be computed now, with the reason.
    """

    store: Store
    job: Job
    leases: Leases
    emit: Emit
    stopped: Callable[[], bool]
    wait: bool = True
    left: dict[int, str] = field(default_factory=dict)

    def compute_parts(self, parts: Iterable[int]) -> None:
        """Return when all parts are published or left, or when stopped."""
        todo = [p for p in parts if not self.store.has(p)]
        while todo and not self.stopped():
            n_taken = sum(self._take(part) for part in todo if not self.stopped())
            todo = [p for p in todo if p not in self.left and not self.store.has(p)]
            if todo and not n_taken:
                if not self.wait:
                    return
                time.sleep(POLL)

    def _take(self, part: int) -> bool:
        """Compute a part if no other process holds it; return whether this process took it."""
        if part in self.left or self.store.has(part):
            return False
        lease = self.leases.take(part)
        if lease is None:
            return False
        try:
            if not self.store.has(part):  # not published meanwhile
                self._compute(part)
            return True
        finally:
            lease.release()

    def _compute(self, part: int) -> None:
        self.emit({"event": "started", "part": part})
        start = time.perf_counter()
        try:
            result = self.job.compute(part)
        except ModelError as error:
            self.left[part] = str(error)
            self.emit({"event": "left", "part": part, "reason": str(error)})
            return
        seconds = time.perf_counter() - start
        note = {**result.note, "seconds": round(seconds, 3), "by": holder()}
        if self.store.commit(part, result.table, result.failed, note, result.about):
            done = {"event": "done", "part": part, "rows": result.table.num_rows, "failed": result.failed}
            self.emit({**done, "seconds": seconds, "memory": memory()})


def memory() -> int:
    """Return the resident memory of this process in bytes."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def shard_of(n_parts: int, shard: tuple[int, int] | None) -> list[int]:
    """Return the parts of shard (i, n): every n-th, starting with the i-th.

    None: all parts.
    """
    return list(range(n_parts)) if shard is None else list(range(shard[0], n_parts, shard[1]))
