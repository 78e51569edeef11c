"""The small files of a run, frozen when they are first needed, each with its checksum.

The checksum of ``prompts/NAME`` is the name of an empty file next to it, ``prompts/NAME.DIGEST.sum``, which is written
first. Files of earlier versions have none; what they hold can be compared with the parts that were computed from them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from interp.errors import InterpError
from interp.jobs.folders import Report, put_aside, warn
from interp.utils.files import NotAFile, digest_of, inside, publish_file, read_regular, write_file

MOST_BYTES = 2**30  # of a frozen file; the prompts of a large set have megabytes


class FrozenFiles:
    """The small files of a run, in its own folder.

    ``only_reads``: report files that cannot be trusted, but leave them where they are. ``bad``: those files, and why.
    """

    def __init__(self, root: Path, report: Report = warn, only_reads: bool = False):
        self.root, self.show, self.only_reads = root, report, only_reads
        self.bad: dict[str, str] = {}

    def report(self, message: str) -> None:
        """Show a message to the user."""
        self.show(message)

    def get(self, name: str) -> bytes | None:
        """Return the contents of a file of the run; None if it does not exist.

        A file that does not match its checksum, or is a link, is put aside with a message.
        """
        path = self._path(name)
        try:
            content = read_regular(path, MOST_BYTES)
        except FileNotFoundError:
            return None
        except NotAFile as error:
            self.put_aside(name, str(error))
            return None
        digests = self._digests(path)
        if digests and digest_of(content) not in digests:
            self.put_aside(name, "its contents do not match their checksum: it was altered or damaged")
            return None
        return content

    def keep(self, name: str, content: bytes) -> bytes:
        """Freeze contents; return what is frozen, which may come from another process."""
        path, digest = self._path(name), digest_of(content)
        mark = _mark(path, digest)
        if not os.path.lexists(mark):
            write_file(mark, b"")
        if publish_file(path, content):
            return content
        there = self.get(name)
        if there is None:  # it was damaged, and is put aside now
            return self.keep(name, content)
        if there != content:
            mark.unlink(missing_ok=True)
        return there

    def has_checksum(self, name: str) -> bool:
        """Return whether a file has a checksum; files of earlier versions have none."""
        return bool(self._digests(self._path(name)))

    def put_aside(self, name: str, why: str) -> None:
        """Move a file that cannot be trusted to ``damaged/``, with a message."""
        path = self._path(name)
        if self.only_reads:
            if name not in self.bad:
                self.report(f"{path} cannot be used: {why}")
            self.bad[name] = why
            return
        put_aside(self.root, path, why, self.report)
        for digest in self._digests(path):
            _mark(path, digest).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        """Return the path of a file of the run, whose last part is not followed if it is a link."""
        folder, _, last = name.rpartition("/")
        if last in ("", ".", ".."):
            raise InterpError(f"{self.root}: {name!r} is not the name of a file of the run")
        return inside(self.root, folder or ".") / last

    def _digests(self, path: Path) -> set[str]:
        """Return the checksums that are recorded for a file."""
        pattern = re.compile(re.escape(path.name) + r"\.([0-9a-f]{32})\.sum")
        with contextlib.suppress(FileNotFoundError):
            matches = (pattern.fullmatch(name) for name in os.listdir(path.parent))
            return {m[1] for m in matches if m is not None}
        return set()


def _mark(path: Path, digest: str) -> Path:
    return path.with_name(f"{path.name}.{digest}.sum")


class FilesInMemory:
    """The small files of a run that has no folder here, such as a planned one; no part of it is finished."""

    def __init__(self, contents: dict[str, bytes], report: Report = warn):
        self.contents, self.show = dict(contents), report

    def get(self, name: str) -> bytes | None:
        """Return the contents of a file; None if it does not exist."""
        return self.contents.get(name)

    def keep(self, name: str, content: bytes) -> bytes:
        """Freeze contents; return what is frozen."""
        return self.contents.setdefault(name, content)

    def has_checksum(self, name: str) -> bool:
        """Return True: nothing can alter what lies in memory."""
        return True

    def put_aside(self, name: str, why: str) -> None:
        """Drop a file that cannot be trusted, with a message."""
        self.contents.pop(name, None)
        self.report(f"{name} cannot be used: {why}")

    def recorded(self, parts: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Yield nothing: no part is finished here."""
        return iter(())

    def report(self, message: str) -> None:
        """Show a message to the user."""
        self.show(message)
