"""What a kind of run supplies: a job that computes one part at a time, as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa


class RunFiles(Protocol):
    """Read and freeze the run's small files, wherever the parts are computed."""

    def get(self, name: str) -> bytes | None:
        """Return the contents of a file of the run; None if it does not exist."""
        ...

    def keep(self, name: str, content: bytes) -> bytes:
        """Freeze contents under a name; return what is frozen there.

        That may come from another process.
        """
        ...

    def has_checksum(self, name: str) -> bool:
        """Return whether a file has a checksum; files of earlier versions have none."""
        ...

    def put_aside(self, name: str, why: str) -> None:
        """Move a file that cannot be trusted out of the way, with a message."""
        ...

    def recorded(self, parts: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield the metadata of those of these parts that are finished and undamaged."""
        ...

    def report(self, message: str) -> None:
        """Show a message to the user."""
        ...


@dataclass(frozen=True)
class PartResult:
    """The result of one part.

    ``failed``: number of rows without a number. ``about``: provenance, stored with the table; its key ``made_with``
    holds what may differ between the parts of a run, but is then told (versions, device). ``note``: circumstances such
    as times, stored next to it.
    """

    table: pa.Table
    failed: int
    about: dict[str, Any] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)


PartCheck = Callable[[int, Any], str | None]  # number and `interp.jobs.parquet.PartFile` of a part → what is wrong


class Job(Protocol):
    """Computes the parts of a run. Made of the run's frozen config and its `RunFiles`.

    A job may also have a static method ``part_check(document, files)``, which returns a `PartCheck`: it compares what
    determined a part's numbers with the run's frozen files.
    """

    def compute(self, part: int) -> PartResult:
        """Compute one part. Raises ModelError for a part that cannot be computed now."""
        ...


@runtime_checkable
class RemoteJob(Job, Protocol):
    """A job whose parts can be computed without access to the run directory.

    So they can be computed on another machine.
    """

    def shared_file(self, part: int) -> str:
        """Name the file that whoever computes the part first freezes for all others."""
        ...

    def shared_content(self, part: int) -> bytes | None:
        """Return what that file holds, compared with finished parts; None if it has to be made."""
        ...

    def check_new_content(self, part: int, content: bytes) -> None:
        """Raise ModelError if contents to be frozen contradict the finished parts."""
        ...
