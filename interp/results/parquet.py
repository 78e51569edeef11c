"""Parquet files of results: written whole or not at all, with provenance in the metadata."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from interp.errors import InterpError
from interp.utils.damage import Budget, reading
from interp.utils.files import check_suffix, result_file
from interp.utils.json_text import parse_json

SCHEMA_VERSION = 1
TIMES = 512  # a table may take this many times the size of its file in memory
WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8}  # bytes in memory; of a text: its pointer


def write_parquet(table: Any, path: str | os.PathLike[str], *, kind: str, provenance: dict[str, Any]) -> Path:
    """Write a pyarrow table, whole or not at all; return its path.

    Raises InterpError for a name of another suffix than .parquet, or if it cannot be written.

    ``kind``: what the table holds, which `read_parquet` checks.
    """
    import pyarrow.parquet as pq

    rows_alone = "" if kind == "attention_patterns" else ". For the rows alone: .frame().to_csv(…)"
    check_suffix(path, ".parquet", f"Parquet keeps the provenance{rows_alone}")

    header = {"interp": json.dumps({"kind": kind, "schema": SCHEMA_VERSION, "provenance": provenance})}
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **header})
    with result_file(path) as file:
        pq.write_table(table, file)
    return Path(path)


def kind_of_parquet(path: str | os.PathLike[str]) -> str:
    """Return what a file that `write_parquet` wrote holds; "" if it was not written by interp.

    Raises InterpError if it is not a Parquet file.
    """
    import pyarrow.parquet as pq

    with _readable(path):
        return str(_header(pq.read_schema(path).metadata).get("kind", ""))


def read_parquet(
    path: str | os.PathLike[str], *, kind: str, max_bytes: int | None = None
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a table that `write_parquet` wrote; return it and its provenance.

    Raises InterpError for a file of another kind, a damaged one, one of a newer interp, or one whose table would take
    more than ``max_bytes`` in memory (default: 128 MiB and 512 times the size of the file).
    """
    import pyarrow.parquet as pq

    with _readable(path):
        with pq.ParquetFile(path) as file:
            header = _header(file.schema_arrow.metadata)
            if header.get("kind") != kind:
                what = header.get("kind", "no header")
                raise InterpError(f"{path} does not hold {kind} written by interp (found: {what!s:.60})")
            if header["schema"] > SCHEMA_VERSION:
                raise InterpError(
                    f"{path} was written by a newer interp (schema {header['schema']}): upgrade to read it"
                )
        return _read_bounded(path, max_bytes).to_pandas(), dict(header["provenance"])


@contextlib.contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Name the file in any error: not a Parquet file, or a damaged one."""
    import pyarrow as pa

    with reading(path):
        try:
            yield
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise InterpError(f"{path} is not a readable Parquet file: {error!s:.300}") from None


def _header(metadata: dict[bytes, bytes] | None) -> dict[str, Any]:
    """Return what `write_parquet` put into the metadata."""
    raw = (metadata or {}).get(b"interp")
    return dict(parse_json(raw)) if raw else {}


def _read_bounded(path: str | os.PathLike[str], max_bytes: int | None) -> Any:
    """Return the table of a file, whose size in memory is compared with a budget before it is allocated.

    Texts are read as indices into their distinct values, since a file of one MB can repeat a long text a million times.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    budget = Budget(path, os.path.getsize(path), TIMES, max_bytes)
    with pq.ParquetFile(path) as file:
        types = {field.name: field.type for field in file.schema_arrow}
        if len(types) < len(file.schema_arrow):
            raise InterpError(f"{path} is damaged: it has two columns of one name")
        leaves = [file.schema.column(i) for i in range(len(file.schema))]
        for group in range(file.metadata.num_row_groups):
            chunks = [file.metadata.row_group(group).column(i) for i in range(len(leaves))]
            for chunk in chunks:
                budget.take(max(chunk.total_uncompressed_size, WIDTHS.get(chunk.physical_type, 16) * chunk.num_values))
    texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    with pq.ParquetFile(path, read_dictionary=texts) as file:
        table = file.read()
    columns = []
    for name, column in zip(table.column_names, table.columns, strict=True):
        for chunk in column.chunks:
            budget.take(_text_bytes(chunk))
        columns.append(column.cast(types[name]))
    return pa.table(columns, names=table.column_names, metadata=table.schema.metadata)


def _text_bytes(array: Any) -> int:
    """Return the bytes of an array's texts when each is written out; 0 for numbers."""
    import pyarrow as pa
    import pyarrow.compute

    pc: Any = pyarrow.compute
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _text_bytes(array.flatten())
    if not pa.types.is_dictionary(array.type):
        return 0
    return pc.sum(pc.take(pc.binary_length(array.dictionary), array.indices)).as_py() or 0
