"""Receipts, and the inventory of a run: which parts exist, by names and sizes alone."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

_RECEIPT = re.compile(r"([0-9]{6,18})-([0-9]{1,18})-([0-9]{1,18})-([0-9]{1,18})-([0-9a-f]{32})\.json")
_PART = re.compile(r"([0-9]{6,18})\.parquet")


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
        if (match := _RECEIPT.fullmatch(file)) is None:
            return None
        receipt = cls(int(match[1]), int(match[2]), int(match[3]), int(match[4]), match[5])
        return receipt if receipt.file == file else None


@dataclass(frozen=True)
class Inventory:
    """The parts that exist, by names and sizes alone.

    ``present``: whole parts with their receipts. ``damaged``: parts that do not match a receipt, with the reason.
    ``strays``: names of other Parquet files among the parts, which belong to no part of the run. ``receipts``: all
    receipts of each part.
    """

    present: dict[int, Receipt]
    damaged: dict[int, str]
    strays: tuple[str, ...] = ()
    receipts: dict[int, list[Receipt]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """Number of rows of all parts."""
        return sum(r.rows for r in self.present.values())

    @property
    def failed(self) -> int:
        """Number of rows without a number."""
        return sum(r.failed for r in self.present.values())


def part_name(part: int) -> str:
    """Return the file name of a part."""
    return f"{part:06d}.parquet"


def all_receipts(root: Path) -> dict[int, list[Receipt]]:
    """Return the receipts of a run by part."""
    receipts: dict[int, list[Receipt]] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(root / "receipts")):
            if (receipt := Receipt.parse(name)) is not None:
                receipts.setdefault(receipt.part, []).append(receipt)
    return receipts


def take_inventory(root: Path, n_parts: int) -> Inventory:
    """Return which parts of a run exist."""
    sizes: dict[int, int] = {}
    present: dict[int, Receipt] = {}
    damaged: dict[int, str] = {}
    strays: list[str] = []
    with contextlib.suppress(FileNotFoundError), os.scandir(root / "parts") as entries:
        for entry in entries:
            match = _PART.fullmatch(entry.name)
            if match is None or int(match[1]) >= n_parts or part_name(int(match[1])) != entry.name:
                if entry.name.endswith(".parquet") and not entry.name.startswith("."):
                    strays.append(entry.name)
                continue
            with contextlib.suppress(FileNotFoundError):  # moved aside just now: the others still exist
                if entry.is_file(follow_symlinks=False):
                    sizes[int(match[1])] = entry.stat(follow_symlinks=False).st_size
                else:
                    damaged[int(match[1])] = "it is a link, or not a file"
    receipts = all_receipts(root)  # after the parts: a receipt exists before its part
    for part, size in sizes.items():
        fitting = [r for r in receipts.get(part, ()) if r.size == size]
        if fitting:
            present[part] = fitting[0]
        elif part in receipts:
            damaged[part] = f"it has {size} bytes, its receipt says {min(r.size for r in receipts[part])}"
        else:
            damaged[part] = "it has no receipt"
    return Inventory(present, damaged, tuple(sorted(strays)), receipts)
