"""Data files whose bytes are compared with their checksums whenever they are read.

A run reads each of its files once when it begins, and keeps a checksum of every block of 512 KiB. Each part then reads
whole blocks and compares them before it uses any of their bytes. So the numbers of all parts are those of one version
of the file, even if the file is truncated, replaced or written to during the run.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from interp.errors import InterpError, ModelError
from interp.utils.files import digest_of
from interp.utils.progress import Advance

BLOCK = 2**19  # bytes that share a checksum
RECORD = np.dtype([("digest", "V16"), ("lines", "<u4")])  # of a block: BLAKE2b, and how many lines end in it


@dataclass(frozen=True)
class FileRecord:
    """What a run keeps about a data file.

    ``path``: with links resolved. ``blocks``: a `RECORD` of each block, as bytes.
    """

    path: str
    size: int
    blocks: bytes

    @property
    def entry(self) -> dict[str, Any]:
        """The file in the run's config; ``digest`` is the hash of ``blocks``, so it covers the whole contents."""
        return {"path": self.path, "size": self.size, "digest": digest_of(self.blocks)}


def record_file(path: Path, advance: Advance | None = None) -> FileRecord:
    """Read a file once, and return its checksums.

    ``advance`` is called with 1 after every block. Raises InterpError if the file cannot be read, or is empty.
    """
    records, size = bytearray(), 0
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                records += _record(block)
                size += len(block)
                if advance is not None:
                    advance(1)
    except OSError as error:
        raise InterpError(f"cannot read {path}: {error.strerror or error}") from None
    if size == 0:
        raise InterpError(f"{path} is empty")
    return FileRecord(str(path.resolve()), size, bytes(records))


def _record(block: bytes) -> bytes:
    digest = hashlib.blake2b(block, digest_size=16).digest()
    return digest + block.count(b"\n").to_bytes(4, "little")


class CheckedFile:
    """The bytes of a file as they were when its `FileRecord` was made.

    Every method raises ModelError if the file is gone, or differs in the blocks that are read. Holds one block in
    memory. To be used in a ``with`` statement:

        with CheckedFile(path, record.size, record.blocks) as file:
            file.seek(100)
            line = file.readline(2**18)
    """

    def __init__(self, path: Path, size: int, blocks: bytes):
        self.path, self.size = path, size
        self._records = np.frombuffer(blocks, RECORD)
        self._at = 0
        self._block: tuple[int, bytes] = (-1, b"")
        try:
            self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror or error}") from None

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._handle)

    def _load(self, number: int) -> bytes:
        """Return a block, compared with its checksum."""
        if self._block[0] != number:
            start = number * BLOCK
            try:
                same = os.fstat(self._handle).st_size == self.size
                block = self._read(start, min(BLOCK, self.size - start)) if same else b""
            except OSError as error:
                raise ModelError(f"cannot read {self.path}: {error.strerror or error}") from None
            if not same or _record(block)[:16] != self._records[number]["digest"].tobytes():
                raise ModelError(
                    f"{self.path} is not the file that this run began with: it was changed, truncated or replaced. "
                    "Put the same file back and resume, or make a new run"
                )
            self._block = number, block
        return self._block[1]

    def _read(self, start: int, n_bytes: int) -> bytes:
        os.lseek(self._handle, start, os.SEEK_SET)
        pieces = []
        while n_bytes > 0 and (piece := os.read(self._handle, n_bytes)):
            pieces.append(piece)
            n_bytes -= len(piece)
        return b"".join(pieces)

    def read(self, start: int, stop: int) -> bytes:
        """Return the bytes [start, stop), up to the end of the file."""
        stop = min(stop, self.size)
        pieces = []
        while start < stop:
            number, offset = divmod(start, BLOCK)
            pieces.append(self._load(number)[offset : offset + stop - start])
            start += len(pieces[-1])
        return b"".join(pieces)

    def seek(self, at: int) -> None:
        """Set the position of `readline`."""
        self._at = at

    def tell(self) -> int:
        """Return the position of `readline`."""
        return self._at

    def readline(self, limit: int) -> bytes:
        """Return the bytes up to and with the next line end, at most ``limit``; empty at the end of the file."""
        pieces, n_bytes = [], 0
        while n_bytes < limit and self._at < self.size:
            number, offset = divmod(self._at, BLOCK)
            block = self._load(number)
            end = block.find(b"\n", offset, offset + limit - n_bytes) + 1
            piece = block[offset : end or offset + limit - n_bytes]
            pieces.append(piece)
            n_bytes += len(piece)
            self._at += len(piece)
            if end:
                break
        return b"".join(pieces)

    def line_number(self, at: int) -> int:
        """Return the number of the line that holds byte ``at``; the first line is 1."""
        number, offset = divmod(at, BLOCK)
        before = int(self._records["lines"][:number].sum(dtype=np.int64))
        return 1 + before + (self._load(number).count(b"\n", 0, offset) if at < self.size else 0)
