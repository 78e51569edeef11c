"""Compute parts with Ray actors, each of which holds one model.

The driver holds the leases and writes the results, so that nodes need no shared disk.

What an actor needs of the run (custom prompts, frozen prompts) is sent through the object store, once per node. Base
runs are not: an activation of a prompt takes longer to send than to compute. Each actor has two parts: one that it
computes and one that waits. An actor that dies, with its worker or its node (a spot instance that is reclaimed), is
started again as soon as a node has room; its parts go to living actors at once. interp must be installed on every node.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from interp.errors import InterpError, ModelError
from interp.jobs.executors.local import MOST_DEATHS, THREAD_VARIABLES
from interp.jobs.frozen import FilesInMemory
from interp.jobs.job import RemoteJob
from interp.jobs.leases import Lease, holder
from interp.jobs.parquet import arrow_copy
from interp.jobs.store import Store
from interp.jobs.work import POLL, Emit, StoreFiles, job_class, job_of, memory
from interp.utils.threads import limit_threads

SILENCE = 30.0  # seconds; after 60, Ray itself ends the process, without a message about the run
IN_FLIGHT = 2  # parts of each actor


class _ActorFiles(FilesInMemory):
    """The run's small files on an actor, as the driver sent them.

    ``new``: to send back.
    """

    def __init__(self, sent: dict[str, bytes]):
        super().__init__(sent)
        self.new: dict[str, bytes] = {}

    def keep(self, name: str, content: bytes) -> bytes:
        """Freeze contents, to be compared by the driver; return what is frozen here."""
        self.new[name] = content
        return super().keep(name, content)


class Actor:
    """Compute parts on a node."""

    def __init__(self, kind: str, document: dict[str, Any], files: dict[str, bytes], threads: int):
        self.kind, self.document, self.files, self.threads = kind, document, _ActorFiles(files), threads
        self.job: Any = None

    def pid(self) -> int:
        """Return the id of the actor's process."""
        return os.getpid()

    def compute(self, part: int, name: str, frozen: bytes | None) -> dict[str, Any]:
        """Compute a part; return its table as Arrow bytes, with notes.

        ``frozen``: its prompts, if the run has them.
        """
        if self.job is None or (frozen is not None and self.files.get(name) not in (None, frozen)):
            self.job = job_class(self.kind)(self.document, self.files)
        if frozen is not None:
            self.files.contents[name] = frozen
        start = time.perf_counter()
        try:
            with limit_threads(self.threads):
                result = self.job.compute(part)
        except ModelError as error:
            return {"left": str(error)}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, result.table.schema) as writer:
            writer.write_table(result.table)
        note = {**result.note, "seconds": round(time.perf_counter() - start, 3), "by": holder()}
        new, self.files.new = self.files.new, {}
        return {
            "table": sink.getvalue().to_pybytes(), "failed": result.failed, "about": result.about, "note": note,
            "new": new, "memory": memory(),
        }  # fmt: skip


@dataclass
class _Submission:
    """A part that an actor has."""

    actor: int
    part: int
    lease: Lease


@dataclass
class Cluster:
    """The actors of one driver, and what they compute."""

    ray: Any
    store: Store
    emit: Emit
    stopped: Callable[[], bool]
    threads: int
    gpus: float
    actors: dict[int, Any] = field(default_factory=dict)
    starting: dict[Any, int] = field(default_factory=dict)  # actors that wait for room on a node, by their future
    sent: dict[Any, _Submission] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)
    idle_deaths: int = 0
    left: dict[int, str] = field(default_factory=dict)
    frozen: dict[str, Any] = field(default_factory=dict)
    silent: float | None = None  # since when the cluster does not answer

    def run(self, parts: range, workers: int) -> dict[int, str]:
        """Work until every part is published or left; return the parts left.

        Returns earlier if the run is stopped.
        """
        self.job = remote_job(self.store)
        self.files, self.leases = StoreFiles(self.store), self.store.leases()
        names = [f"inputs/{name}" for name in sorted(os.listdir(self.store.root / "inputs"))]
        inputs = {name: content for name in names if (content := self.files.get(name)) is not None}
        self.inputs = self.ray.put(inputs)
        todo = deque(p for p in parts if not self.store.has(p))
        try:
            for number in range(min(workers, len(todo))):
                self._start(number)
            while (todo or self.sent) and not (self.stopped() and not self.sent):
                self._check_cluster()
                n_submitted = self._hand_out(todo)
                if self.sent or self.starting:
                    ready, _ = self.ray.wait([*self.sent, *self.starting], timeout=POLL)
                    for reference in ready:
                        if reference in self.starting:
                            self._handle_start(reference)
                        elif reference in self.sent:  # not lost meanwhile with another part of its actor
                            self._handle_result(reference, todo)
                elif todo and not n_submitted:
                    time.sleep(POLL)  # other drivers have all parts that are left
        finally:
            for actor in self.actors.values():
                with contextlib.suppress(Exception):
                    self.ray.kill(actor)
            for sent in self.sent.values():
                sent.lease.release()
            self.leases.close()
        return self.left

    def _check_cluster(self) -> None:
        """Raise InterpError if actors are starting and the cluster is silent too long."""
        if not self.starting:
            self.silent = None
            return
        address = str(getattr(self.ray.get_runtime_context(), "gcs_address", ""))
        if not (failure := _connection_failure(address)):
            self.silent = None
            return
        self.silent = self.silent or time.monotonic()
        if time.monotonic() - self.silent > SILENCE:
            raise InterpError(
                f"the Ray cluster at {address} is gone ({failure}); what is finished is kept: resume when it is back, "
                "or with another executor"
            )

    def _start(self, number: int) -> None:
        """Start an actor."""
        variables = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        remote = self.ray.remote(num_cpus=self.threads, num_gpus=self.gpus, runtime_env={"env_vars": variables})(Actor)
        self.actors[number] = remote.remote(self.store.kind, self.store.document, self.inputs, self.threads)
        self.starting[self.actors[number].pid.remote()] = number

    def _handle_start(self, reference: Any) -> None:
        """Handle an actor that has started on a node, or died there."""
        number = self.starting.pop(reference)
        try:
            pid = self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self.idle_deaths += 1
            if self.idle_deaths >= MOST_DEATHS * len(self.actors):
                raise InterpError(f"Ray's workers die before they start: {error}") from None
            self._start(number)
            return
        self.idle_deaths = 0
        self.emit({"event": "worker", "worker": number, "pid": pid})

    def _hand_out(self, todo: deque[int]) -> int:
        """Give waiting parts to actors that have room; return how many."""
        busy = Counter(s.actor for s in self.sent.values())
        n_submitted, skipped = 0, []
        ready = [n for n in self.actors if n not in self.starting.values()]
        room = [n for more in range(IN_FLIGHT) for n in ready if busy[n] + more < IN_FLIGHT]
        while todo and room and not self.stopped():
            part = todo.popleft()
            if self.store.has(part) or part in self.left:
                continue
            lease = self.leases.take(part)
            if lease is None:
                skipped.append(part)
                continue
            if self.store.has(part):
                lease.release()
                continue
            self._submit(room.pop(0), part, lease)
            n_submitted += 1
        todo.extend(skipped)
        return n_submitted

    def _submit(self, actor: int, part: int, lease: Lease) -> None:
        """Send a part to an actor, with its prompts if the run has them."""
        name = self.job.shared_file(part)
        if name not in self.frozen and (content := self.job.shared_content(part)) is not None:
            self.frozen[name] = self.ray.put(content)
        reference = self.actors[actor].compute.remote(part, name, self.frozen.get(name))
        self.sent[reference] = _Submission(actor, part, lease)
        self.emit({"event": "started", "part": part, "worker": actor})

    def _handle_result(self, reference: Any, todo: deque[int]) -> None:
        """Publish a part that an actor returned, or handle the actor's failure."""
        sent = self.sent.pop(reference)
        try:
            result = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            sent.lease.release()
            raise InterpError(f"part {sent.part} could not be computed: {error.cause!r}") from None
        except self.ray.exceptions.RayError as error:
            self._handle_death(sent, type(error).__name__, todo)
            return
        try:
            self._publish(sent, result, todo)
        finally:
            sent.lease.release()

    def _publish(self, sent: _Submission, result: dict[str, Any], todo: deque[int]) -> None:
        """Publish a part's table, or record why it was left."""
        if "left" in result:
            self._leave(sent, result["left"])
            return
        for name, content in result["new"].items():
            if name == self.job.shared_file(sent.part):
                try:
                    self.job.check_new_content(sent.part, content)
                except ModelError as error:
                    self._leave(sent, str(error))
                    return
            if self.files.keep(name, content) != content:  # another process froze another set first: that one counts
                todo.append(sent.part)
                return
        table = pa.ipc.open_stream(arrow_copy(result["table"])).read_all()
        if self.store.commit(sent.part, table, result["failed"], result["note"], result["about"]):
            done = {"event": "done", "part": sent.part, "rows": table.num_rows, "failed": result["failed"]}
            self.emit({**done, "seconds": result["note"]["seconds"], "memory": result["memory"], "worker": sent.actor})

    def _leave(self, sent: _Submission, reason: str) -> None:
        """Record that a part cannot be computed now."""
        self.left[sent.part] = reason
        self.emit({"event": "left", "part": sent.part, "reason": reason, "worker": sent.actor})

    def _handle_death(self, sent: _Submission, how: str, todo: deque[int]) -> None:
        """Put the parts of a dead actor back, and start another actor."""
        lost_parts = [sent, *(self.sent.pop(r) for r, s in list(self.sent.items()) if s.actor == sent.actor)]
        for lost in lost_parts:
            lost.lease.release()
            todo.appendleft(lost.part)
        self.deaths[sent.part] += 1
        where = {"worker": sent.actor, "part": sent.part}
        self.emit({"event": "died", "reason": f"was lost ({how})", **where})
        if self.deaths[sent.part] >= MOST_DEATHS:
            reason = f"{MOST_DEATHS} actors were lost while they computed it ({how})"
            self.left[sent.part] = reason
            self.emit({"event": "left", "reason": reason, **where})
        with contextlib.suppress(Exception):
            self.ray.kill(self.actors[sent.actor])
        self._start(sent.actor)


def _join(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Join a running cluster. InterpError if that fails."""
    if failure := _connection_failure(address):
        raise InterpError(
            f"no Ray cluster answers at {address} ({failure}). `ray start --head` prints the address of the one "
            "that it starts"
        )
    try:
        ray.init(address=address, **options)
    except Exception as error:
        raise InterpError(
            f"cannot join the Ray cluster at {address}: {error}. Does `ray status --address {address}` show it, with "
            f"this Ray ({ray.__version__}) and this Python? A cluster that was started with a token needs it from "
            "every driver: export RAY_AUTH_MODE=token"
        ) from None


def _connection_failure(address: str) -> str | None:
    """Return why nothing answers at host:port; None if something does.

    None also if the address has another form.

    Checked here because Ray itself keeps trying for minutes.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def remote_job(store: Store) -> RemoteJob:
    """Return the run's job.

    InterpError if its parts cannot be computed on another machine.
    """
    job = job_of(store)
    if not isinstance(job, RemoteJob):
        raise InterpError(
            f"executor 'ray' runs sweeps; a run of kind {store.kind!r} is computed in-process or by 'local'"
        )
    return job


def run(
    store: Store, parts: range, emit: Emit, stopped: Callable[[], bool], *, workers: int, threads: int = 1,
    address: str | None = None, gpus: float = 0, **_: Any,
) -> dict[int, str]:  # fmt: skip
    """Compute the parts with Ray actors; return those left, and why.

    ``workers`` 0: as many as fit.
    """
    remote_job(store)
    try:
        import ray
    except ImportError:
        raise InterpError("executor 'ray' needs Ray: pip install 'interp[ray]'") from None
    starts_ray = not ray.is_initialized()
    if starts_ray:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        local: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(workers * threads, os.cpu_count() or 1)}
        if address is None:
            ray.init(address="local", **quiet, **local)
        else:
            _join(ray, address, quiet)
    try:
        resources = ray.cluster_resources()
        fits = int(resources.get("GPU", 0) // gpus) if gpus else int(resources.get("CPU", 1) // threads)
        if fits < 1:
            raise InterpError(
                f"the cluster has {resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs: no worker fits"
            )
        return Cluster(ray, store, emit, stopped, threads, gpus).run(parts, min(workers, fits) if workers else fits)
    finally:
        if starts_ray:
            ray.shutdown()
