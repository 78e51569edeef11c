"""Leases: only one of the processes that share a run works on a part at a time.

The safety of the table does not rest on leases: a part is published by an exclusive hard link, so that it cannot be
written twice whatever happens to leases. Leases keep two processes from *computing* the same part, and free the part of
a process that died. No clock is compared with another one, and no file time is read.

``locks`` (the usual kind): an advisory lock (flock) on ``leases/N``, held by the living process. The kernel, or the
file server, releases it when the process ends, however it ends. Assumption: the filesystem's locks hold between all
hosts that share the run (true of local disks, NFS 4 and 3 with its lock daemon, GPFS, Lustre mounted with ``flock``,
CephFS).

``heartbeats``: for filesystems without such locks (sshfs and other FUSE, 9p, NFS with ``nolock`` or ``local_lock``).
The lease is the newest of the files ``leases/N.0``, ``N.1``, …, each created exclusively; its holder writes a growing
number into it. A process that has seen no change of that number for a minute of its own monotonic clock takes over by
creating the next file. Assumptions: creation with O_EXCL is atomic between hosts, and writes reach other hosts well
within the minute. A holder that is suspended for longer (a closed laptop) may compute a part in vain that another
process took over. A lease that holds no number, because its writer died, counts as lost after three heartbeats.

No lease is followed out of the run directory: what is no regular file, or has a second name elsewhere, is put aside.
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
from interp.jobs.folders import Report, parsed_object, put_aside, read_note, warn
from interp.utils.files import NotAFile, check_folder, open_regular, read_regular, temporary_name, writing

BEAT = 5.0  # seconds between heartbeats
STILL = 60.0  # seconds without a heartbeat, as seen by another process, after which that process takes over
TORN = 3  # heartbeats after which a lease that holds no number counts as lost
MOST_LEASE_BYTES = 2**16
LOCKLESS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def holder() -> dict[str, Any]:
    """Describe this process as the holder of a lease, for people to read."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot": boot_id()}


def boot_id() -> str:
    """Return an identifier of the current boot; empty where the system has none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def suitable(folder: Path) -> str:
    """Return "locks" if locks in this folder are reliable between hosts, else "heartbeats"."""
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
        handle = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
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
    """Return type and options of the mount that a folder is on.

    Empty where the system does not report them.
    """
    longest, mount = "", ("", "")
    with contextlib.suppress(OSError):
        path = str(folder.resolve())
        for line in Path("/proc/self/mounts").read_text().splitlines():
            _, point, kind, options, *_ = line.split(" ")
            point = point.replace("\\040", " ")
            if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(longest):
                longest, mount = point, (kind, options)
    return mount


class Lease:
    """The right to work on one part, until `release` or the end of the process."""

    def release(self) -> None:
        """Release the part for other processes."""
        raise NotImplementedError


class Leases:
    """The leases of one run.

    ``report`` receives a message about each file among the leases that is put aside, or taken over because it is torn.
    """

    def __init__(self, folder: Path, report: Report = warn):
        self.folder, self.report = folder, report
        check_folder(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def take(self, number: int) -> Lease | None:
        """Return the part's lease; None if another process has it."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop what runs in the background."""


def holders(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the recorded holder of each part, for people to read.

    Dead processes are included. Only reads.
    """
    recorded = {}
    for path in sorted(folder.glob("[0-9]*")):
        if match := re.fullmatch(r"([0-9]{1,18})(?:\.[0-9]{1,18})?", path.name):
            with contextlib.suppress(OSError, NotAFile):
                recorded[int(match[1])] = read_note(path) or {}
    return recorded


def open_leases(folder: Path, kind: str, report: Report = warn) -> Leases:
    """Open the leases of a run. ``kind``: "locks" or "heartbeats"; see `suitable`."""
    if kind == "locks":
        if suitable(folder.parent) != "locks":
            raise InterpError(
                f"{folder.parent}: this run is shared by file locks, which do not work on the filesystem "
                "that this host sees it through. Start from a host whose filesystem has locks, or make a new run "
                "on this host"
            )
        return LockLeases(folder, report)
    return HeartbeatLeases(folder, report=report)


class LockLeases(Leases):
    """Leases by advisory locks, one file per part."""

    def take(self, number: int) -> Lease | None:
        """Return the part's lease; None if another process has it."""
        import fcntl

        path = self.folder / f"{number:06d}"
        while True:
            try:
                with writing(path):
                    handle = open_regular(path, os.O_CREAT | os.O_RDWR)
            except NotAFile as error:
                put_aside(self.folder.parent, path, str(error), self.report)
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                return None
            except BaseException:
                os.close(handle)
                raise
            # the last holder removes the file: a lock on a removed file protects nothing
            with contextlib.suppress(FileNotFoundError):
                if os.lstat(path).st_ino == os.fstat(handle).st_ino:
                    break
            os.close(handle)
        with contextlib.suppress(OSError):  # works on a full disk too: the lease is the lock, not the text
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
    """Leases by a number that grows as long as the holder lives."""

    def __init__(
        self, folder: Path, beat: float = BEAT, still: float = STILL, clock: Any = time.monotonic, report: Report = warn
    ):
        super().__init__(folder, report)
        self.beat, self.still, self.clock = beat, still, clock
        self.seen: dict[int, tuple[str, float]] = {}  # text of each part's lease, and since when
        self.held: dict[Path, int] = {}
        self.lock, self.ended = threading.Lock(), threading.Event()
        self.thread: threading.Thread | None = None

    def take(self, number: int) -> Lease | None:
        """Return the part's lease; None if another process has it, or may still be alive."""
        generation, text = self._newest(number)
        if text is not None:
            note = parsed_object(text.encode())
            previous, since = self.seen.get(number, (None, 0.0))
            if previous != f"{generation} {text}":
                self.seen[number] = (f"{generation} {text}", self.clock())
                since = self.clock()
            free = note is not None and (note.get("count") == -1 or self._is_dead(note))
            patience = self.still if note is not None else min(self.still, TORN * self.beat)
            if not free and self.clock() - since < patience:
                return None
            if note is None:
                self.report(
                    f"the lease {number:06d}.{generation} is torn, and unchanged for {patience:g} s: taken over"
                )
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
        """Return the newest generation of a part's lease, and its text.

        (−1, None) without a lease.
        """
        newest = -1
        while os.path.lexists(self.folder / f"{number:06d}.{newest + 1}"):
            newest += 1
        if newest < 0:
            return -1, None
        path = self.folder / f"{number:06d}.{newest}"
        try:
            return newest, read_regular(path, MOST_LEASE_BYTES).decode(errors="replace")
        except NotAFile as error:
            put_aside(self.folder.parent, path, str(error), self.report)
            return self._newest(number)
        except OSError:
            return newest, ""

    def _is_dead(self, note: dict[str, Any]) -> bool:
        """Return whether the holder ran in this boot of this machine and has ended.

        There is no need to watch it then.
        """
        me = holder()
        if not me["boot"] or note.get("boot") != me["boot"] or note.get("pids") != pid_namespace():
            return False
        try:
            os.kill(int(note["pid"]), 0)
        except ProcessLookupError:
            return True
        except (OSError, KeyError, ValueError, TypeError, OverflowError):
            return False
        return False

    def _write(self, path: Path, count: int) -> None:
        note = json.dumps({**holder(), "pids": pid_namespace(), "count": count})
        temporary = temporary_name(path)
        with contextlib.suppress(OSError):  # one missed heartbeat does no harm
            try:
                with open(temporary, "x") as file:
                    file.write(note)
                os.replace(temporary, path)  # so that others read all of it or nothing, and no link is followed
            except OSError:
                temporary.unlink(missing_ok=True)
                raise

    def _beat(self) -> None:
        while not self.ended.wait(self.beat):
            with self.lock:
                for path in self.held:
                    self.held[path] += 1
                    self._write(path, self.held[path])

    def close(self) -> None:
        """Stop the heartbeat."""
        self.ended.set()


class _Heartbeat(Lease):
    def __init__(self, leases: HeartbeatLeases, path: Path):
        self.leases, self.path = leases, path

    def release(self) -> None:
        with self.leases.lock:
            if self.leases.held.pop(self.path, None) is not None:
                self.leases._write(self.path, -1)


def pid_namespace() -> str:
    """Return this process's PID namespace: process ids are comparable only within one."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""
