"""Take over the finished parts of other copies of a run."""

from __future__ import annotations

import contextlib
import os

from interp.errors import InterpError
from interp.jobs.audit import Audit
from interp.jobs.receipts import Receipt
from interp.jobs.store import Store, differences
from interp.jobs.work import StoreFiles
from interp.utils.files import NotAFile, publish_file, read_regular, write_file


def merge(store: Store, others: list[Store]) -> dict[str, int]:
    """Copy parts that other run directories of the same config have.

    Parts that this one has already are skipped. Every part is checked, against its own run and against this one, before
    the first is copied: parts that were computed with other weights, another dtype or other prompts are refused with
    InterpError. Other versions or devices are reported.

    Returns how many parts were copied (``taken``), existed already (``there``), and are still ``missing``.
    """
    for other in others:
        if other.header["digest"] != store.header["digest"]:
            changed = "\n".join(differences(store.document, other.document))
            raise InterpError(f"{other.root} is a run of another config than {store.root}; they differ in\n{changed}")
    receipts = [other.inventory().present for other in others]
    _check_all(store, others, receipts)
    counts = {"taken": 0, "there": 0}
    for other, present in zip(others, receipts, strict=True):
        _copy_frozen(store, other)
        for part in sorted(present):
            if store.has(part):
                counts["there"] += 1
            else:
                counts["taken" if _copy(store, other, part, present[part]) else "there"] += 1
    counts["missing"] = store.n_parts - len(store.inventory().present)
    return counts


def _check_all(store: Store, others: list[Store], receipts: list[dict[int, Receipt]]) -> None:
    """Raise InterpError unless all parts to be copied belong together, and with those of this run."""
    own = Audit(store)
    for _, why in own.failures(sorted(store.inventory().present)):
        store.report(why)
    for other, present in zip(others, receipts, strict=True):
        if not own.is_checked_by_kind:
            _compare_frozen(store, other)
        theirs = Audit(other)
        for part in sorted(present):
            if not store.has(part):
                file = theirs.read(part)
                if why := own.compare(part, file):
                    raise InterpError(f"{file.path} does not belong to {store.root}: {why}. Nothing was copied")
    for line in own.notes():
        store.report(line)


def _compare_frozen(store: Store, other: Store) -> None:
    """Raise InterpError if a frozen file differs, in a kind of run whose parts do not say what they were made of."""
    ours, theirs = StoreFiles(store, only_reads=True), StoreFiles(other, only_reads=True)
    for name in _frozen_names(other):
        if (content := ours.get(name)) is not None and content != theirs.get(name):
            raise InterpError(f"{other.root / name} differs from that of {store.root}. Nothing was copied")


def _copy_frozen(store: Store, other: Store) -> None:
    """Copy the frozen files that this run lacks."""
    ours, theirs = StoreFiles(store), StoreFiles(other, only_reads=True)
    for name in _frozen_names(other):
        if (content := theirs.get(name)) is not None and ours.get(name) is None:
            ours.keep(name, content)


def _frozen_names(store: Store) -> list[str]:
    with contextlib.suppress(FileNotFoundError):
        return [f"prompts/{name}" for name in sorted(os.listdir(store.root / "prompts")) if name.endswith(".json")]
    return []


def _copy(store: Store, other: Store, part: int, receipt: Receipt) -> bool:
    """Copy a part with its receipt; False if another process published it first."""
    content = other.content(part)
    try:
        note = read_regular(other.root / "receipts" / receipt.file)
    except (OSError, NotAFile):  # its name says what counts
        note = b"{}"
    write_file(store.root / "receipts" / receipt.file, note)
    return publish_file(store.path(part), content)
