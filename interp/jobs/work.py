"""The loop of a worker: take a part, compute it, publish it, until none is left."""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from interp.errors import InterpError, ModelError
from interp.jobs.job import Job
from interp.jobs.leases import Leases, holder
from interp.jobs.store import Store
from interp.utils.files import inside, publish_file

log = logging.getLogger("interp")

JOBS = {"sweep": "interp.sweep.effects_job:EffectsJob", "corpus": "interp.corpus.job:CorpusJob"}
POLL = 0.5  # seconds between checks of parts that other processes hold

Event = dict[str, Any]
Emit = Callable[[Event], None]


class StoreFiles:
    """The small files of a run, in its own folder."""

    def __init__(self, store: Store):
        self.store = store

    def get(self, name: str) -> bytes | None:
        """Return the contents of a file of the run; None if it does not exist."""
        path = inside(self.store.root, name)
        return path.read_bytes() if path.exists() else None

    def keep(self, name: str, content: bytes) -> bytes:
        """Freeze contents; return what is frozen, which may come from another process."""
        path = inside(self.store.root, name)
        publish_file(path, content)
        return path.read_bytes()


def job_of(store: Store, **options: Any) -> Job:
    """Return the job that computes the run's parts in this process."""
    return job_class(store.kind)(store.document, StoreFiles(store), **options)


def job_class(kind: str) -> Callable[..., Job]:
    """Return the class that computes a kind of run."""
    if kind not in JOBS:
        raise InterpError(f"this run is of a kind that this interp does not know: {kind!r}")
    module, _, name = JOBS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


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
