"""A run's table as one file: CSV, Parquet or an HTML report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from interp.errors import InterpError
from interp.jobs.audit import Audit
from interp.jobs.store import SCHEMA_VERSION, Store
from interp.results.effects import COLUMNS, Effects
from interp.sweep.table import LABELS, as_frame
from interp.utils.files import result_file

FORMATS = {".parquet": "parquet", ".csv": "csv", ".html": "html"}
MOST_ON_A_PAGE = 2_000_000  # cells


def export(store: Store, target: Path, format: str | None = None) -> Path:
    """Write the whole table to one file, whole or not at all.

    Its ending decides: .parquet, .csv or .html.
    """
    kind = format or FORMATS.get(target.suffix.lower())
    if kind is None or kind not in FORMATS.values():
        raise InterpError(f"{target}: a name that ends with .parquet, .csv or .html, or --format, is expected")
    if kind == "html":
        return _page(store, target)
    with result_file(target) as file:
        if not _write(store, file, kind):
            raise InterpError(f"{store.root} has no finished part yet")
    return target


def _write(store: Store, file: BinaryIO, kind: str) -> int:
    """Write the tables, one part in memory at a time; return the number of rows."""
    writer: Any = None
    rows = 0
    audit = Audit(store)
    try:
        for _, part in audit.all():
            table = part.table()
            writer = writer or _writer(store, file, kind, table.schema)
            writer.write_table(table)
            rows += table.num_rows
    finally:  # a writer left open writes to the closed file later, and says so on stderr
        if writer is not None:
            writer.close()
    for line in audit.notes():
        store.report(line)
    return rows


def _writer(store: Store, file: BinaryIO, kind: str, schema: pa.Schema) -> Any:
    """Return an open writer of tables with these columns; a Parquet file says which run it holds."""
    if kind == "csv":
        return pc.CSVWriter(file, schema)
    writer = pq.ParquetWriter(file, schema, compression="zstd", store_schema=False)
    about = {"kind": f"{store.kind} table", "schema": SCHEMA_VERSION, "config": store.document}
    about |= {"parts": store.n_parts, "parts_present": len(store.inventory().present)}
    writer.add_key_value_metadata({"interp": json.dumps(about)})
    return writer


def effects_by_combination(store: Store) -> dict[str, Effects]:
    """Return the finished cells as Effects, over all seeds.

    There is one for each model × task × recipe × sites.

    Examples of further seeds are numbered after those of the first, so that no two examples share a number.
    """
    by_title: dict[str, list[tuple[pa.Table, dict[str, Any]]]] = {}
    audit = Audit(store)
    for _, part in audit.all():
        table = part.table()
        labels = [str(table[name][0]) for name in ("model", "task", "recipe", "sites")] if table.num_rows else []
        by_title.setdefault(" · ".join(x for x in labels if x), []).append((table, part.about))
    for line in audit.notes():
        store.report(line)
    sizes = {t["name"]: t["n"] for t in store.document.get("tasks", ())}
    seeds = {seed: i for i, seed in enumerate(store.document.get("seeds", [0]))}
    out = {}
    for title, parts in by_title.items():
        whole = pa.concat_tables([t for t, _ in parts])
        frame: Any = as_frame(whole.filter(whole["error"].is_null()))
        if frame.empty:
            continue
        offset = frame["seed"].map(seeds).to_numpy() * frame["task"].map(sizes).to_numpy()
        frame["example"] = frame["example"].to_numpy() + offset
        provenance = dict(next((p for _, about in parts if "weights" in (p := about.get("provenance", {}))), {}))
        provenance |= {"sweep": store.header["digest"], "seeds": list(seeds), "failed": whole.num_rows - len(frame)}
        frame = frame.drop(columns=[*LABELS, "error"])  # the model and the task are in the provenance
        out[title] = Effects(frame[[c for c in COLUMNS if c in frame]], provenance)
        if gaps := out[title].small_gaps():
            store.report(f"{title}: {gaps}")
    return out


def _page(store: Store, target: Path) -> Path:
    """Write the finished cells as an HTML report."""
    from interp.plots.report import report

    inventory = store.inventory()
    if inventory.rows > MOST_ON_A_PAGE:
        raise InterpError(
            f"{inventory.rows:,} cells are too many for one page (at most {MOST_ON_A_PAGE:,}): export .parquet"
        )
    effects = effects_by_combination(store)
    if not effects:
        raise InterpError(f"{store.root} has no finished cell yet")
    title, n_present = str(store.document.get("name", store.root.name)), len(inventory.present)
    if n_present < store.n_parts:
        title += f" (unfinished: {n_present:,} of {store.n_parts:,} parts)"
    return report(effects, title=title).write(target)
