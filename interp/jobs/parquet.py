"""Encode a part's table as one Parquet file, and read it; the same table gives the same bytes.

What is read lies in memory that Arrow owns, and is decoded in the calling thread. Were it a Python object, one of
Arrow's threads might free it while Python shuts down, which aborts the process.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from interp.errors import InterpError
from interp.utils.files import open_regular

REPEATED = ("clean", "corrupt")  # the same for all cells of an example


def encode_table(table: pa.Table, kind: str, schema_version: int, about: dict[str, Any]) -> bytes:
    """Return the bytes of one Parquet file with a table; ``about`` goes into its metadata."""
    header = {"interp": json.dumps({"kind": kind, "schema": schema_version, **about}, sort_keys=True)}
    floats = [f.name for f in table.schema if pa.types.is_floating(f.type) and f.name not in REPEATED]
    others = [f.name for f in table.schema if f.name not in floats and not pa.types.is_binary(f.type)]
    sink = pa.BufferOutputStream()
    packing: dict[str, Any] = {
        "compression": "zstd", "compression_level": 3, "use_dictionary": others, "use_byte_stream_split": floats,
        "store_schema": False, "write_page_checksum": True,
    }  # fmt: skip
    with pq.ParquetWriter(sink, table.schema, **packing) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata(header)
    return sink.getvalue().to_pybytes()


def arrow_copy(content: bytes) -> pa.Buffer:
    """Return a copy of bytes in memory that Arrow owns."""
    buffer = pa.allocate_buffer(len(content))
    memoryview(buffer).cast("B")[:] = memoryview(content)
    return buffer


def read_buffer(path: Path) -> pa.Buffer:
    """Return the contents of a regular file in memory that Arrow owns.

    Raises NotAFile for a link, a pipe or a device, and OSError if it cannot be read.
    """
    with open(open_regular(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        buffer = pa.allocate_buffer(size)
        rest = memoryview(buffer)
        while len(rest) and (n := file.readinto(rest)):
            rest = rest[n:]
        return buffer if not len(rest) else buffer.slice(0, size - len(rest))


@dataclass(frozen=True)
class PartFile:
    """The bytes of one part, whose checksum was compared."""

    path: Path
    buffer: pa.Buffer

    @cached_property
    def _parquet(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(pa.BufferReader(self.buffer), pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            raise InterpError(f"{self.path} is not a readable Parquet file: {error}") from None

    @property
    def file_metadata(self) -> pq.FileMetaData:
        """Schema, row groups and statistics of the file."""
        return self._parquet.metadata

    @cached_property
    def about(self) -> dict[str, Any]:
        """What was stored with the table: kind, schema, the part's number, and its provenance."""
        try:
            about = json.loads((self.file_metadata.metadata or {})[b"interp"])
        except (KeyError, ValueError, RecursionError):
            about = None
        if not isinstance(about, dict):
            raise InterpError(f"{self.path} was not written by interp: its metadata is missing")
        return about

    def table(self) -> pa.Table:
        """Return the table."""
        try:
            return self._parquet.read(use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise InterpError(f"{self.path} is not a readable Parquet file: {error}") from None
