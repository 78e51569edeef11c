"""What a kind of run supplies: a job that computes one part at a time, as a table."""

from __future__ import annotations

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


@dataclass(frozen=True)
class PartResult:
    """The result of one part.

    ``failed``: number of rows without a number. ``about``: provenance, stored with the table. ``note``: circumstances
    such as times, stored next to it.
    """

    table: pa.Table
    failed: int
    about: dict[str, Any] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)


class Job(Protocol):
    """Computes the parts of a run. Made of the run's frozen config and its `RunFiles`."""

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
