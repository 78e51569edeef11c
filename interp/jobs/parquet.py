"""Encode a part's table as one Parquet file; the same table gives the same bytes."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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
