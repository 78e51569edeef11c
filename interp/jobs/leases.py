"""Leases: of several processes that share a run, one at a time works on a part.

What the safety of the table rests on is not here: a part is published by an exclusive hard link, so that it cannot be
written twice whatever happens to leases. Leases keep two processes from *computing* the same part, and free the part of
a process that died. No clock is compared with another one, and no file's time is read.

``locks`` (the rule): an advisory lock (flock) on ``leases/N``, held by the living process. The kernel, or the file
server, lets go of it when the process ends, however it ends. Assumed: the filesystem's locks hold between all hosts
that share the run (true of local disks, NFS 4 and 3 with its lock daemon, GPFS, Lustre mounted with ``flock``, CephFS).

``heartbeats``: for filesystems without such locks (sshfs and other FUSE, 9p, NFS with ``nolock`` or ``local_lock``).
The lease is the newest of the files ``leases/N.0``, ``N.1``, …, each created exclusively; its holder writes a growing
number into it. Whoever has watched that number stand still for a minute of their own monotonic clock creates the next
file, and so takes over. Assumed: creation with O_EXCL is atomic between hosts, writes reach other hosts well within the
minute, and a holder that is suspended for longer (a laptop's lid) may then compute a part that somebody else took over,
in vain.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from interp.errors import InterpError
from interp.utils.files import writing

BEAT = 5.0  # seconds between heartbeats
STILL = 60.0  # seconds without one, as watched by the process that wants the part, after which it is taken over
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def holder() -> dict[str, Any]:
    """Who holds a lease, for people to read."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot": boot_id()}


def boot_id() -> str:
    """Tells one boot of a machine from the next; empty where there is none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def suitable(folder: Path) -> str:
    """``"locks"`` if locks in this folder can be relied on between hosts, else ``"heartbeats"``."""
    try:
        import fcntl
    except ImportError:
        return "heartbeats"
    kind, options = _mount(folder)
    if kind.startswith(("fuse", "9p", "virtiofs", "vboxsf")) or re.search(
        r"\b(nolock|localflock|local_lock=(flock|all))\b", options
    ):
        return "heartbeats"
    probe = folder / f".probe.{uuid.uuid4().hex[:8]}"
    with writing(folder):
        handle = os.open(probe, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "locks"
    except OSError as error:
        if error.errno in LOCKLESS:
            return "heartbeats"
        raise
    finally:
        os.close(handle)
        probe.unlink()


def _mount(folder: Path) -> tuple[str, str]:
    """Type and options of the mount that a folder is on, where the system tells."""
    best, found = "", ("", "")
    with contextlib.suppress(OSError):
        where = str(folder.resolve())
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, kind, options, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            if (where == point or where.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
                best, found = point, (kind, options)
    return found


class Lease:
    """The right to work on one part, until `release` or the end of the process."""

    def release(self) -> None:
        """Lets others have it."""
        raise NotImplementedError


class Leases:
    """The leases of one run. ``take`` gives None if somebody else has the part."""

    def __init__(self, folder: Path):
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def take(self, number: int) -> Lease | None:
        """The part's lease, or None."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends what runs beside."""


def holders(folder: Path) -> dict[int, dict[str, Any]]:
    """Who says that they hold which part: for people; the dead say so too. Only reads."""
    found = {}
    for path in sorted(folder.glob("[0-9]*")):
        if match := re.fullmatch(r"(\d+)(?:\.\d+)?", path.name):
            with contextlib.suppress(OSError, ValueError):
                said = json.loads(path.read_text() or "{}")
                found[int(match[1])] = said if isinstance(said, dict) else {}
    return found


def open_leases(folder: Path, kind: str) -> Leases:
    """Leases of a kind that `suitable` named."""
    if kind == "locks":
        if suitable(folder.parent) != "locks":
            raise InterpError(
                f"{folder.parent}: this run is shared by file locks, which do not work on the filesystem "
                "that it is seen through here. Start from a host with a filesystem that locks, or make the run anew "
                "from here"
            )
        return LockLeases(folder)
    return HeartbeatLeases(folder)


class LockLeases(Leases):
    """Leases by advisory locks, one file a part."""

    def take(self, number: int) -> Lease | None:
        """The part's lease, or None."""
        import fcntl

        path = self.folder / f"{number:06d}"
        while True:
            with writing(path):
                handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            # its last holder removes the file: a lock on one that is gone is worth nothing
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    break
            os.close(handle)
        with contextlib.suppress(OSError):  # on a full disk too, a lease can be had: it is the lock, not the text
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(holder()).encode(), 0)
        return _Lock(handle, path)


class _Lock(Lease):
    def __init__(self, handle: int, path: Path):
        self.handle, self.path = handle, path

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self.handle)


class HeartbeatLeases(Leases):
    """Leases by a number that grows while the holder lives."""

    def __init__(self, folder: Path, beat: float = BEAT, still: float = STILL, clock: Any = time.monotonic):
        super().__init__(folder)
        self.beat, self.still, self.clock = beat, still, clock
        self.seen: dict[int, tuple[str, float]] = {}  # what each part's lease said, and since when
        self.held: dict[Path, int] = {}
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.thread: threading.Thread | None = None

    def take(self, number: int) -> Lease | None:
        """The part's lease, or None: also while it is not known yet whether its holder lives."""
        generation, text = self._newest(number)
        if text is not None:
            said = json.loads(text) if text.startswith("{") else {}
            known, since = self.seen.get(number, (None, 0.0))
            if known != f"{generation} {text}":
                self.seen[number] = (f"{generation} {text}", self.clock())
                since = self.clock()
            free = said.get("count") == -1 or self._gone(said)
            if not free and self.clock() - since < self.still:
                return None
        path = self.folder / f"{number:06d}.{generation + 1}"
        with writing(path):
            try:
                handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            except FileExistsError:
                return None
            os.close(handle)
        self.seen.pop(number, None)
        with self.lock:
            self.held[path] = 0
        self._write(path, 0)
        if self.thread is None:
            self.thread = threading.Thread(target=self._beat, daemon=True)
            self.thread.start()
        return _Heartbeat(self, path)

    def _newest(self, number: int) -> tuple[int, str | None]:
        """The newest generation of a part's lease and what it says; (−1, None) if there is none."""
        found = [int(p.name.rpartition(".")[2]) for p in self.folder.glob(f"{number:06d}.*") if p.suffix[1:].isdigit()]
        if not found:
            return -1, None
        try:
            return max(found), (self.folder / f"{number:06d}.{max(found)}").read_text()
        except OSError:
            return max(found), ""

    def _gone(self, said: dict[str, Any]) -> bool:
        """Whether its holder ran on this very boot of this machine and does no longer: no need to watch it then."""
        me = holder()
        if not me["boot"] or said.get("boot") != me["boot"] or said.get("pids") != pid_namespace():
            return False
        try:
            os.kill(int(said["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, KeyError, ValueError):
            return False
        return False

    def _write(self, path: Path, count: int) -> None:
        with contextlib.suppress(OSError):  # a missed beat; many are allowed
            path.write_text(json.dumps({**holder(), "pids": pid_namespace(), "count": count}))

    def _beat(self) -> None:
        while not self.ended.wait(self.beat):
            with self.lock:
                for path in self.held:
                    self.held[path] += 1
                    self._write(path, self.held[path])

    def close(self) -> None:
        """Stops the heartbeat."""
        self.ended.set()


class _Heartbeat(Lease):
    def __init__(self, leases: HeartbeatLeases, path: Path):
        self.leases, self.path = leases, path

    def release(self) -> None:
        with self.leases.lock:
            if self.leases.held.pop(self.path, None) is not None:
                self.leases._write(self.path, -1)


def pid_namespace() -> str:
    """Process ids mean the same only within it."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
