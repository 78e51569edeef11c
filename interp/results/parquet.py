"""Parquet files of results: written whole or not at all, with provenance in the metadata."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from interp.errors import InterpError
from interp.utils.files import check_suffix, result_file

SCHEMA_VERSION = 1


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


def read_parquet(path: str | os.PathLike[str], *, kind: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a table that `write_parquet` wrote; return it and its provenance.

    Raises InterpError for a file of another kind, a damaged one, or one of a newer interp.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise InterpError(f"{path} does not exist") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InterpError(f"{path} is not a readable Parquet file: {error}") from None
    raw = (table.schema.metadata or {}).get(b"interp")
    header = json.loads(raw) if raw else {}
    if header.get("kind") != kind:
        raise InterpError(f"{path} does not hold {kind} written by interp (found: {header.get('kind', 'no header')})")
    if header.get("schema", 0) > SCHEMA_VERSION:
        raise InterpError(f"{path} was written by a newer interp (schema {header['schema']}): upgrade to read it")
    return table.to_pandas(), header["provenance"]
