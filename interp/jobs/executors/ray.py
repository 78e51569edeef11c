"""Ray: one actor holds one model; the driver holds the leases and writes, so that nodes need no shared disk.

What an actor needs of the run (prompts of one's own, frozen prompts) goes to it through the object store, once a node.
Base runs do not: an activation of a prompt takes longer to move than to compute. In flight are two parts an actor: one
being computed, one waiting. An actor that dies, with its worker or its node (a spot instance taken back), is started
anew as soon as there is room; its parts are handed out again at once, to those that live. interp must be installed on
every node.
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
from interp.jobs.job import RemoteJob
from interp.jobs.leases import Lease, holder
from interp.jobs.store import Store
from interp.jobs.work import POLL, Emit, StoreFiles, job_class, job_of, memory
from interp.utils.threads import limit_threads

SILENCE = 30.0  # seconds; Ray itself ends the process, without a word of the run, after 60
IN_FLIGHT = 2  # parts of each actor


class _Blobs:
    """The run's small files on an actor: what the driver sent, and what was made here and is to be sent back."""

    def __init__(self, sent: dict[str, bytes]):
        self.sent, self.made = dict(sent), {}

    def get(self, name: str) -> bytes | None:
        return self.sent.get(name)

    def keep(self, name: str, content: bytes) -> bytes:
        self.made[name] = content
        return self.sent.setdefault(name, content)


class Actor:
    """Computes parts on a node."""

    def __init__(self, kind: str, document: dict[str, Any], blobs: dict[str, bytes], threads: int):
        self.kind, self.document, self.blobs, self.threads = kind, document, _Blobs(blobs), threads
        self.job: Any = None

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def compute(self, part: int, name: str, frozen: bytes | None) -> dict[str, Any]:
        """One part's table as Arrow bytes, with what belongs to it. ``frozen``: its prompts, if the run has them."""
        if self.job is None or (frozen is not None and self.blobs.get(name) not in (None, frozen)):
            self.job = job_class(self.kind)(self.document, self.blobs)
        if frozen is not None:
            self.blobs.sent[name] = frozen
        start = time.perf_counter()
        try:
            with limit_threads(self.threads):
                found = self.job.compute(part)
        except ModelError as error:
            return {"left": str(error)}
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, found.table.schema) as writer:
            writer.write_table(found.table)
        note = {**found.note, "seconds": round(time.perf_counter() - start, 3), "by": holder()}
        made, self.blobs.made = self.blobs.made, {}
        return {
            "table": sink.getvalue().to_pybytes(), "failed": found.failed, "about": found.about, "note": note,
            "made": made, "memory": memory(),
        }  # fmt: skip


@dataclass
class _Sent:
    actor: int
    part: int
    lease: Lease


@dataclass
class Cluster:
    """One driver's actors and what they are computing."""

    ray: Any
    store: Store
    emit: Emit
    stopped: Callable[[], bool]
    threads: int
    gpus: float
    actors: dict[int, Any] = field(default_factory=dict)
    starting: dict[Any, int] = field(default_factory=dict)  # actors that wait for room on a node, by what they answer
    sent: dict[Any, _Sent] = field(default_factory=dict)
    deaths: Counter[int] = field(default_factory=Counter)
    idle_deaths: int = 0
    left: dict[int, str] = field(default_factory=dict)
    frozen: dict[str, Any] = field(default_factory=dict)
    silent: float | None = None  # since when the cluster has not answered

    def run(self, parts: range, workers: int) -> dict[int, str]:
        """Until every part is published or left, or the sweep is stopped; returns those left."""
        self.job = remote_job(self.store)
        self.files, self.leases = StoreFiles(self.store), self.store.leases()
        inputs = {f"inputs/{p.name}": p.read_bytes() for p in (self.store.root / "inputs").iterdir()}
        self.inputs = self.ray.put(inputs)
        todo = deque(p for p in parts if not self.store.has(p))
        try:
            for number in range(min(workers, len(todo))):
                self._start(number)
            while (todo or self.sent) and not (self.stopped() and not self.sent):
                self._check_cluster()
                handed = self._hand_out(todo)
                if self.sent or self.starting:
                    ready, _ = self.ray.wait([*self.sent, *self.starting], timeout=POLL)
                    for reference in ready:
                        if reference in self.starting:
                            self._started(reference)
                        elif reference in self.sent:  # not lost meanwhile with another part of its actor
                            self._back(reference, todo)
                elif todo and not handed:
                    time.sleep(POLL)  # all that is left is in other drivers' hands
        finally:
            for actor in self.actors.values():
                with contextlib.suppress(Exception):
                    self.ray.kill(actor)
            for sent in self.sent.values():
                sent.lease.release()
            self.leases.close()
        return self.left

    def _check_cluster(self) -> None:
        """With actors lost or awaited: InterpError if nobody has answered for them for a while."""
        if not self.starting:
            self.silent = None
            return
        address = str(getattr(self.ray.get_runtime_context(), "gcs_address", ""))
        if not (unheard := _unheard(address)):
            self.silent = None
            return
        self.silent = self.silent or time.monotonic()
        if time.monotonic() - self.silent > SILENCE:
            raise InterpError(
                f"the Ray cluster at {address} is gone ({unheard}); what is finished is kept: resume when it is there "
                "again, or with another executor"
            )

    def _start(self, number: int) -> None:
        variables = dict.fromkeys(THREAD_VARIABLES, str(self.threads))
        remote = self.ray.remote(num_cpus=self.threads, num_gpus=self.gpus, runtime_env={"env_vars": variables})(Actor)
        self.actors[number] = remote.remote(self.store.kind, self.store.document, self.inputs, self.threads)
        self.starting[self.actors[number].pid.remote()] = number

    def _started(self, reference: Any) -> None:
        """An actor has room and is there; or it died of what it found there."""
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
        """Gives waiting parts to actors that have room; returns how many."""
        busy = Counter(s.actor for s in self.sent.values())
        handed, skipped = 0, []
        there = [n for n in self.actors if n not in self.starting.values()]
        room = [n for more in range(IN_FLIGHT) for n in there if busy[n] + more < IN_FLIGHT]
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
            handed += 1
        todo.extend(skipped)
        return handed

    def _submit(self, actor: int, part: int, lease: Lease) -> None:
        name = self.job.shared_file(part)
        if name not in self.frozen and (content := self.files.get(name)) is not None:
            self.frozen[name] = self.ray.put(content)
        reference = self.actors[actor].compute.remote(part, name, self.frozen.get(name))
        self.sent[reference] = _Sent(actor, part, lease)
        self.emit({"event": "started", "part": part, "worker": actor})

    def _back(self, reference: Any, todo: deque[int]) -> None:
        sent = self.sent.pop(reference)
        try:
            found = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            sent.lease.release()
            raise InterpError(f"part {sent.part} could not be computed: {error.cause!r}") from None
        except self.ray.exceptions.RayError as error:
            self._lost(sent, type(error).__name__, todo)
            return
        try:
            self._publish(sent, found, todo)
        finally:
            sent.lease.release()

    def _publish(self, sent: _Sent, found: dict[str, Any], todo: deque[int]) -> None:
        if "left" in found:
            self.left[sent.part] = found["left"]
            self.emit({"event": "left", "part": sent.part, "reason": found["left"], "worker": sent.actor})
            return
        for name, content in found["made"].items():
            if self.files.keep(name, content) != content:  # others froze another set first: theirs counts
                todo.append(sent.part)
                return
        table = pa.ipc.open_stream(found["table"]).read_all()
        if self.store.commit(sent.part, table, found["failed"], found["note"], found["about"]):
            done = {"event": "done", "part": sent.part, "rows": table.num_rows, "failed": found["failed"]}
            self.emit({**done, "seconds": found["note"]["seconds"], "memory": found["memory"], "worker": sent.actor})

    def _lost(self, sent: _Sent, how: str, todo: deque[int]) -> None:
        """An actor died: all that it had goes back, and another one is started."""
        lost = [sent, *(self.sent.pop(r) for r, s in list(self.sent.items()) if s.actor == sent.actor)]
        for one in lost:
            one.lease.release()
            todo.appendleft(one.part)
        self.deaths[sent.part] += 1
        said = {"worker": sent.actor, "part": sent.part}
        self.emit({"event": "died", "reason": f"was lost ({how})", **said})
        if self.deaths[sent.part] >= MOST_DEATHS:
            reason = f"{MOST_DEATHS} actors were lost while they computed it ({how})"
            self.left[sent.part] = reason
            self.emit({"event": "left", "reason": reason, **said})
        with contextlib.suppress(Exception):
            self.ray.kill(self.actors[sent.actor])
        self._start(sent.actor)


def _join(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Become a driver of a cluster that runs. InterpError if it cannot be."""
    if unheard := _unheard(address):
        raise InterpError(
            f"no Ray cluster answers at {address} ({unheard}). `ray start --head` says the address of the one it starts"
        )
    try:
        ray.init(address=address, **options)
    except Exception as error:
        raise InterpError(
            f"cannot join the Ray cluster at {address}: {error}. Does `ray status --address {address}` show it, with "
            f"this Ray ({ray.__version__}) and this Python? One that was started with a token wants it of every "
            "driver: export RAY_AUTH_MODE=token"
        ) from None


def _unheard(address: str) -> str | None:
    """Why nobody answers at host:port; None if somebody does, or it is no such address. (Ray tries for minutes.)"""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def remote_job(store: Store) -> RemoteJob:
    """Return the run's job. InterpError if its parts cannot be computed on another machine."""
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
    """Work through the parts with Ray actors; returns those left, and why. ``workers`` 0: as many as fit."""
    remote_job(store)
    try:
        import ray
    except ImportError:
        raise InterpError("executor 'ray' needs Ray: pip install 'interp[ray]'") from None
    mine = not ray.is_initialized()
    if mine:
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        local: dict[str, Any] = {"include_dashboard": False, "num_cpus": max(workers * threads, os.cpu_count() or 1)}
        if address is None:
            ray.init(address="local", **quiet, **local)
        else:
            _join(ray, address, quiet)
    try:
        whole = ray.cluster_resources()
        fits = int(whole.get("GPU", 0) // gpus) if gpus else int(whole.get("CPU", 1) // threads)
        if fits < 1:
            raise InterpError(
                f"the cluster has {whole.get('CPU', 0):g} CPUs and {whole.get('GPU', 0):g} GPUs: no worker fits"
            )
        return Cluster(ray, store, emit, stopped, threads, gpus).run(parts, min(workers, fits) if workers else fits)
    finally:
        if mine:
            ray.shutdown()
