"""The run directory: a frozen config, and one Parquet file for each part, whole or absent.

    run.json        the frozen config, its digest, and the version of the schema
    sweep.toml      the config as it was written, for people
    inputs/         custom prompts, by the digest of their contents
    prompts/        the prompts that tasks made for each model and seed, with their checksums
    parts/N.parquet     published by an exclusive link: never replaced, never written twice
    receipts/N-….json   written before the part: size, rows, failed rows and digest in the name, the rest inside
    leases/         which process works on which part
    damaged/        files that did not match their checksum, or were none of the run's, moved aside
    drivers/        environment and log of every process that was started on the run

A part counts if a receipt names its size. `verify` and every read compare its digest, and what the file says about
itself: its own number, and the digest of the config that it was computed from. Where its kind of run has more to
compare (weights, prompts), `interp.jobs.audit` does so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from interp.errors import InterpError
from interp.jobs.folders import FOLDERS, Report, check_folders, make_folders, parsed_object, put_aside, read_note, warn
from interp.jobs.leases import Lease, Leases, open_leases, suitable
from interp.jobs.parquet import PartFile, encode_table, read_buffer
from interp.jobs.receipts import Inventory, Receipt, all_receipts, part_name, take_inventory
from interp.utils.checks import dotted_key
from interp.utils.files import NotAFile, digest_of, inside, publish_file, read_regular, write_file, writing
from interp.utils.provenance import now

SCHEMA_VERSION = 1
MOST_HEADER_BYTES = 2**26  # of run.json
_LEFTOVER = re.compile(r"\.([0-9]{6,18})[.-].*\.tmp")


class Store:
    """One run directory.

    ``kind``: what is computed in it, such as a sweep or statistics over a corpus. ``report`` receives messages about
    files that are put aside, or cannot be compared.
    """

    def __init__(self, root: Path, header: dict[str, Any]):
        self.root, self.header = root, header
        self.kind: str = header["kind"]
        self.document: dict[str, Any] = header["config"]
        self.n_parts: int = header["n_parts"]
        self.report: Report = warn
        self._receipts: dict[int, list[Receipt]] | None = None  # as last listed

    # ------------------------------------------------------------ opening

    @classmethod
    def create(
        cls, root: Path, kind: str, document: dict[str, Any], n_parts: int, inputs: dict[str, bytes], text: str
    ) -> Store:
        """Create a run directory, or open it if it exists or another process is first.

        ``inputs``: contents by name. ``text``: the config as it was written. A torn run.json is put aside, and written
        again.
        """
        if root.exists() and not root.is_dir():
            raise InterpError(f"{root} is not a folder: choose another one with --out")
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(root / "run.json") and not is_empty_run(root):
                raise InterpError(f"{root} is not empty, and not a run: choose another folder with --out")
        make_folders(root)
        for name, content in inputs.items():
            write_file(inside(root, "inputs") / name, content)
        header = {
            "kind": kind, "schema": SCHEMA_VERSION, "digest": _digest(document), "n_parts": n_parts, "created": now(),
            "leases": suitable(root), "config": document,
        }  # fmt: skip
        if why := torn(root):
            put_aside(root, root / "run.json", why, warn)
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
            content = read_regular(root / "run.json", MOST_HEADER_BYTES)
        except FileNotFoundError:
            raise InterpError(f"{root} is not a run directory: it has no run.json") from None
        except OSError as error:
            raise InterpError(f"{root}/run.json cannot be read: {error.strerror or error}") from None
        if (header := parsed_object(content)) is None and (header := _recorded_header(root)) is None:
            raise InterpError(
                f"{root}/run.json cannot be read: it is torn. `interp sweep run CONFIG --out {root}` with the config "
                "that the run began with (its sweep.toml) writes it again, and goes on"
            )
        types = {"kind": str, "schema": int, "digest": str, "n_parts": int, "config": dict}
        if any(not isinstance(header.get(k), t) for k, t in types.items()):
            raise InterpError(f"{root}/run.json is not one that interp wrote")
        if header["schema"] > SCHEMA_VERSION:
            raise InterpError(
                f"{root} was made by a newer interp (schema {header['schema']}; this one reads up to "
                f"{SCHEMA_VERSION}): upgrade interp to go on with it"
            )
        if _digest(header["config"]) != header["digest"]:
            raise InterpError(f"{root}/run.json: the frozen config does not match its digest; it was edited or damaged")
        check_folders(root)
        return cls(root, header)

    def mend_header(self) -> None:
        """Write run.json again if it is torn."""
        if why := torn(self.root):
            put_aside(self.root, self.root / "run.json", why, self._pass_on)
            publish_file(self.root / "run.json", json.dumps(self.header, indent=1).encode())

    def leases(self) -> Leases:
        """Return the leases of the run's parts."""
        return open_leases(self.root / "leases", self.header.get("leases", "locks"), self._pass_on)

    def _pass_on(self, message: str) -> None:
        self.report(message)

    # ------------------------------------------------------------ parts

    def path(self, part: int) -> Path:
        """Return where a part is published."""
        return self.root / "parts" / part_name(part)

    def has(self, part: int) -> bool:
        """Return whether a file of that name exists; `inventory` says whether it is whole."""
        return os.path.lexists(self.path(part))

    def inventory(self) -> Inventory:
        """Return the parts that exist, by names and sizes."""
        inventory = take_inventory(self.root, self.n_parts)
        self._receipts = inventory.receipts
        return inventory

    def commit(self, part: int, table: pa.Table, failed: int, note: dict[str, Any], about: dict[str, Any]) -> bool:
        """Publish a part: receipt, then file, synced.

        False if another process published it first; its file stays.

        ``about`` goes into the Parquet metadata, with the part's number and the config's digest; ``note`` (times,
        process) only into the receipt.
        """
        own = {"part": part, "config": self.header["digest"]}
        content = encode_table(table, f"{self.kind} part", SCHEMA_VERSION, {**about, **own})
        receipt = Receipt(part, len(content), table.num_rows, failed, digest_of(content))
        write_file(self.root / "receipts" / receipt.file, json.dumps({**note, **own}).encode())
        return publish_file(self.path(part), content)

    def leftovers(self) -> dict[int, list[Path]]:
        """Return temporary files of processes that died while writing, by part.

        Only the holder of the part's lease may remove them.
        """
        files: dict[int, list[Path]] = {}
        for folder in ("parts", "receipts", "leases"):
            for name in os.listdir(self.root / folder):
                if match := _LEFTOVER.fullmatch(name):
                    files.setdefault(int(match[1]), []).append(self.root / folder / name)
        return files

    def read(self, part: int) -> PartFile:
        """Return a part, compared with its receipts, its number and the run's config.

        InterpError, naming the part, if one of them differs.
        """
        path = self.path(part)
        try:
            file = PartFile(path, read_buffer(path))
        except FileNotFoundError:
            raise InterpError(f"{path} does not exist: resume the run to compute it") from None
        except OSError as error:
            raise InterpError(f"{path} cannot be read: {error.strerror or error}") from None
        if not self._has_receipt(part, digest_of(memoryview(file.buffer))):
            raise InterpError(
                f"{path} is damaged: its contents do not match their checksum. Resume the run to compute it anew"
            )
        if file.about.get("part") != part:
            raise InterpError(
                f"{path} is a copy of another part ({file.about.get('part')}). Resume the run to compute it anew"
            )
        if file.about.get("config", self.header["digest"]) != self.header["digest"]:  # absent in earlier versions
            raise InterpError(f"{path} was computed by a run of another config. Resume this run to compute it anew")
        return file

    def _has_receipt(self, part: int, digest: str) -> bool:
        """Return whether a receipt names this digest. Receipts are listed again if those known do not."""
        for receipts in (self._receipts, None):
            if receipts is None:
                self._receipts = receipts = all_receipts(self.root)
            if any(r.digest == digest for r in receipts.get(part, ())):
                return True
        return False

    def content(self, part: int) -> bytes:
        """Return a part's bytes, checked as by `read`."""
        return self.read(part).buffer.to_pybytes()

    def table(self, part: int) -> pa.Table:
        """Return a part's table, checked as by `read`."""
        return self.read(part).table()

    def about(self, part: int) -> dict[str, Any]:
        """Return a part's metadata, with its provenance, checked as by `read`."""
        return self.read(part).about

    def verify(self, parts: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Check parts as `read` does; yield those that fail, and how."""
        for part in parts:
            try:
                self.read(part)
            except (InterpError, OSError) as error:
                yield part, str(error)

    def put_aside(self, part: int, lease: Lease) -> Path | None:
        """Move a damaged (or failed) part aside, so that it is computed again.

        Only for the holder of its lease.
        """
        del lease  # a parameter only so that no caller forgets to take it
        target = put_aside(self.root, self.path(part), "", None)
        if target is not None:
            for receipt in (self._receipts or all_receipts(self.root)).get(part, ()):
                (self.root / "receipts" / receipt.file).unlink(missing_ok=True)
        return target


def is_empty_run(root: Path) -> bool:
    """Return whether a folder has nothing but what a start that was killed early may have left."""
    ours = {*FOLDERS, "sweep.toml"} if (root / "parts").is_dir() else set(FOLDERS)
    return all(p.name in ours or p.name[0] == "." for p in root.iterdir())


def torn(root: Path) -> str:
    """Return what is wrong with a run.json that holds no JSON object; empty if it does, or does not exist."""
    try:
        header = parsed_object(read_regular(root / "run.json", MOST_HEADER_BYTES))
        return "it is torn" if header is None else ""
    except NotAFile as error:
        return str(error)
    except OSError:
        return ""


def _recorded_header(root: Path) -> dict[str, Any] | None:
    """Return the contents of run.json as a driver of the run recorded them; None if none did."""
    with contextlib.suppress(FileNotFoundError):
        check_folders(root)
        for name in sorted(os.listdir(root / "drivers"), reverse=True):
            with contextlib.suppress(OSError, NotAFile):
                header = (read_note(root / "drivers" / name) or {}).get("run") if name.endswith(".json") else None
                if isinstance(header, dict) and _digest(header.get("config", {})) == header.get("digest"):
                    warn(f"{root}/run.json is torn: its contents are taken from drivers/{name}")
                    return header
    return None


def _digest(document: dict[str, Any]) -> str:
    return digest_of(json.dumps(document, sort_keys=True).encode())


def read_tables(store: Store) -> Iterator[pa.Table]:
    """Yield every part's table in order, compared with its checksum.

    InterpError for a damaged one.
    """
    inventory = store.inventory()
    refuse_damaged(store, inventory)
    for part in sorted(inventory.present):
        yield store.table(part)


def refuse_damaged(store: Store, inventory: Inventory) -> None:
    """Raise InterpError if a part is damaged: a table without it would look complete."""
    if inventory.damaged:
        part, why = next(iter(inventory.damaged.items()))
        raise InterpError(f"{store.path(part)} is damaged ({why}): resume the run to compute it anew")


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
