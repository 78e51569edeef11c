"""The run directory: a frozen config, and one Parquet file for each part, whole or absent.

    run.json        the frozen config, its digest, and the version of the schema
    sweep.toml      the config as it was written, for people
    inputs/         custom prompts, by the digest of their contents
    prompts/        the prompts that tasks made for each model and seed
    parts/N.parquet     published by an exclusive link: never replaced, never written twice
    receipts/N-….json   written before the part: size, rows, failed rows and digest in the name, the rest inside
    leases/         which process works on which part
    damaged/        parts whose bytes did not match their receipt, moved aside
    drivers/        environment and log of every process that was started on the run

A part counts if a receipt names its size; `verify` and every read compare its digest too.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from interp.errors import InterpError
from interp.jobs.leases import Lease, Leases, open_leases, suitable
from interp.jobs.parquet import encode_table
from interp.utils.checks import dotted_key
from interp.utils.files import digest_of, inside, publish_file, sync_folder, temporary_name, write_file, writing
from interp.utils.provenance import now

SCHEMA_VERSION = 1
FOLDERS = ("inputs", "prompts", "parts", "receipts", "leases", "damaged", "drivers")
_RECEIPT = re.compile(r"(\d{6,})-(\d+)-(\d+)-(\d+)-([0-9a-f]{32})\.json")
_LEFTOVER = re.compile(r"\.(\d{6,})[.-].*\.tmp")
_PART = re.compile(r"(\d{6,})\.parquet")


@dataclass(frozen=True)
class Receipt:
    """Facts about a part, readable without opening it: bytes, rows, failed rows, digest."""

    part: int
    size: int
    rows: int
    failed: int
    digest: str

    @property
    def file(self) -> str:
        """Name of the receipt's file."""
        return f"{self.part:06d}-{self.size}-{self.rows}-{self.failed}-{self.digest}.json"

    @classmethod
    def parse(cls, file: str) -> Receipt | None:
        """Return the receipt with this file name; None if it is not one."""
        match = _RECEIPT.fullmatch(file)
        return None if match is None else cls(int(match[1]), int(match[2]), int(match[3]), int(match[4]), match[5])


@dataclass(frozen=True)
class Inventory:
    """The parts that exist, by names and sizes alone.

    ``present``: whole parts with their receipts. ``damaged``: parts that do not match a receipt, with the reason.
    """

    present: dict[int, Receipt]
    damaged: dict[int, str]

    @property
    def rows(self) -> int:
        """Number of rows of all parts."""
        return sum(r.rows for r in self.present.values())

    @property
    def failed(self) -> int:
        """Number of rows without a number."""
        return sum(r.failed for r in self.present.values())


class Store:
    """One run directory.

    ``kind``: what is computed in it, such as a sweep or statistics over a corpus.
    """

    def __init__(self, root: Path, header: dict[str, Any]):
        self.root, self.header = root, header
        self.kind: str = header["kind"]
        self.document: dict[str, Any] = header["config"]
        self.n_parts: int = header["n_parts"]

    # ------------------------------------------------------------ opening

    @classmethod
    def create(
        cls, root: Path, kind: str, document: dict[str, Any], n_parts: int, inputs: dict[str, bytes], text: str
    ) -> Store:
        """Create a run directory, or open it if it exists or another process is first.

        ``inputs``: contents by name. ``text``: the config as it was written.
        """
        if root.exists() and not root.is_dir():
            raise InterpError(f"{root} is not a folder: choose another one with --out")
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
            if not (root / "run.json").exists() and any(
                p.name not in FOLDERS for p in root.iterdir() if p.name[0] != "."
            ):
                raise InterpError(f"{root} is not empty, and not a run: choose another folder with --out")
            for folder in FOLDERS:
                (root / folder).mkdir(exist_ok=True)
        for name, content in inputs.items():
            write_file(inside(root, f"inputs/{name}"), content)
        header = {
            "kind": kind, "schema": SCHEMA_VERSION, "digest": _digest(document), "n_parts": n_parts, "created": now(),
            "leases": suitable(root), "config": document,
        }  # fmt: skip
        if publish_file(root / "run.json", json.dumps(header, indent=1).encode()) and text:
            write_file(root / "sweep.toml", text.encode())
        return cls.open(root)

    @classmethod
    def open(cls, root: str | Path) -> Store:
        """Open an existing run directory.

        InterpError if it is none, is damaged, or was made by a newer interp.
        """
        root = Path(root)
        try:
            header = json.loads((root / "run.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InterpError(f"{root} is not a run directory: it has no run.json") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InterpError(f"{root}/run.json cannot be read: {getattr(error, 'strerror', None) or error}") from None
        types = {"kind": str, "schema": int, "digest": str, "n_parts": int, "config": dict}
        if not isinstance(header, dict) or any(not isinstance(header.get(k), t) for k, t in types.items()):
            raise InterpError(f"{root}/run.json is not one that interp wrote")
        if header["schema"] > SCHEMA_VERSION:
            raise InterpError(
                f"{root} was made by a newer interp (schema {header['schema']}; this one reads up to "
                f"{SCHEMA_VERSION}): upgrade interp to go on with it"
            )
        if _digest(header["config"]) != header["digest"]:
            raise InterpError(f"{root}/run.json: the frozen config does not match its digest; it was edited or damaged")
        return cls(root, header)

    def leases(self) -> Leases:
        """Return the leases of the run's parts."""
        return open_leases(self.root / "leases", self.header.get("leases", "locks"))

    # ------------------------------------------------------------ parts

    def path(self, part: int) -> Path:
        """Return where a part is published."""
        return self.root / "parts" / f"{part:06d}.parquet"

    def has(self, part: int) -> bool:
        """Return whether a file of that name exists; `inventory` says whether it is whole."""
        return os.path.lexists(self.path(part))

    def inventory(self) -> Inventory:
        """Return the parts that exist, by names and sizes."""
        sizes, present, damaged = {}, {}, {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / "parts") as entries:
            for entry in entries:
                if not (match := _PART.fullmatch(entry.name)) or int(match[1]) >= self.n_parts:
                    continue
                with contextlib.suppress(FileNotFoundError):  # moved aside just now: the others still exist
                    if entry.is_file(follow_symlinks=False):
                        sizes[int(match[1])] = entry.stat(follow_symlinks=False).st_size
                    else:
                        damaged[int(match[1])] = "it is a link, or not a file"
        receipts: dict[int, list[Receipt]] = {}
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self.root / "receipts"):  # after the parts: a receipt exists before its part
                if (receipt := Receipt.parse(name)) is not None:
                    receipts.setdefault(receipt.part, []).append(receipt)
        for part, size in sizes.items():
            fitting = [r for r in receipts.get(part, ()) if r.size == size]
            if fitting:
                present[part] = fitting[0]
            elif part in receipts:
                damaged[part] = f"it has {size} bytes, its receipt says {min(r.size for r in receipts[part])}"
            else:
                damaged[part] = "it has no receipt"
        return Inventory(present, damaged)

    def commit(self, part: int, table: pa.Table, failed: int, note: dict[str, Any], about: dict[str, Any]) -> bool:
        """Publish a part: receipt, then file, synced.

        False if another process published it first; its file stays.

        ``about`` goes into the Parquet metadata, ``note`` (times, process) only into the receipt.
        """
        content = encode_table(table, f"{self.kind} part", SCHEMA_VERSION, {"part": part, **about})
        receipt = Receipt(part, len(content), table.num_rows, failed, digest_of(content))
        write_file(self.root / "receipts" / receipt.file, json.dumps(note).encode())
        return publish_file(self.path(part), content)

    def leftovers(self) -> dict[int, list[Path]]:
        """Return temporary files of processes that died while writing, by part.

        Only the holder of the part's lease may remove them.
        """
        files: dict[int, list[Path]] = {}
        for folder in ("parts", "receipts"):
            for name in os.listdir(self.root / folder):
                if match := _LEFTOVER.fullmatch(name):
                    files.setdefault(int(match[1]), []).append(self.root / folder / name)
        return files

    def content(self, part: int, receipts: Iterable[Receipt] | None = None) -> bytes:
        """Return a part's bytes, compared with its receipts.

        InterpError, naming the part, if they differ.
        """
        if receipts is None:
            names = (p.name for p in (self.root / "receipts").glob(f"{part:06d}-*.json"))
            receipts = [r for r in map(Receipt.parse, names) if r is not None]
        path = self.path(part)
        if path.is_symlink():
            raise InterpError(f"{path} is a link, and is not followed")
        content = path.read_bytes()
        if digest_of(content) not in {r.digest for r in receipts}:
            raise InterpError(
                f"{path} is damaged: its contents do not match their checksum. Resume the run to compute it anew"
            )
        return content

    def table(self, part: int) -> pa.Table:
        """Return a part's table, checked."""
        return pq.read_table(pa.BufferReader(self.content(part)))

    def about(self, part: int) -> dict[str, Any]:
        """Return a part's metadata, with its provenance."""
        metadata = pq.read_metadata(pa.BufferReader(self.content(part))).metadata
        return json.loads(metadata[b"interp"])

    def verify(self, parts: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Compare parts with their digests; yield those that differ, and how."""
        for part in parts:
            try:
                self.content(part)
            except (InterpError, OSError) as error:
                yield part, str(error)

    def put_aside(self, part: int, lease: Lease) -> Path | None:
        """Move a damaged (or failed) part aside, so that it is computed again.

        Only for the holder of its lease.
        """
        del lease  # a parameter only so that no caller forgets to take it
        folder = self.root / "damaged"
        with writing(folder):
            folder.mkdir(exist_ok=True)
            target = temporary_name(folder / f"{part:06d}.parquet").with_suffix(".parquet")
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path(part), target)
                sync_folder(self.path(part).parent)
                for receipt in (self.root / "receipts").glob(f"{part:06d}-*.json"):
                    receipt.unlink()
                return target
        return None


def _digest(document: dict[str, Any]) -> str:
    return digest_of(json.dumps(document, sort_keys=True).encode())


def read_tables(store: Store) -> Iterator[pa.Table]:
    """Yield every part's table in order, compared with its checksum.

    InterpError for a damaged one.
    """
    inventory = store.inventory()
    if inventory.damaged:
        part, why = next(iter(inventory.damaged.items()))
        raise InterpError(f"{store.path(part)} is damaged ({why}): resume the run to compute it anew")
    for part in sorted(inventory.present):
        yield store.table(part)


def differences(before: Any, after: Any) -> list[str]:
    """Return what changed from one config document to another, one line per key."""
    old, new = _by_key(before), _by_key(after)
    lines = []
    for key in dict.fromkeys((*old, *new)):
        if old.get(key) != new.get(key):
            lines.append(f"  {key}: {old.get(key, 'not there')} → {new.get(key, 'not there')}")
    return lines


def _by_key(value: Any, path: tuple[str | int, ...] = ()) -> dict[str, str]:
    """Flatten nested tables to their values as JSON, by dotted key."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None or not value:
        return {dotted_key(path): json.dumps(value)}
    return {k: v for key, inner in items for k, v in _by_key(inner, (*path, key)).items()}
