"""The folders of a run directory: nothing in them is followed out of it, and damaged files are put aside."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interp.utils.files import check_folder, read_regular, sync_folder, temporary_name, writing

log = logging.getLogger("interp")

FOLDERS = ("inputs", "prompts", "parts", "receipts", "leases", "damaged", "drivers")
MOST_NOTE_BYTES = 2**23  # of a small JSON file, such as a lease or a driver's record

Report = Callable[[str], None]  # receives a message for the user


def warn(message: str) -> None:
    """Report a message as a warning of the package's logger."""
    log.warning("%s", message)


def check_folders(root: Path) -> None:
    """Raise InterpError if one of the run's folders is a link: what is written there would land elsewhere."""
    for name in FOLDERS:
        check_folder(root / name)


def make_folders(root: Path) -> None:
    """Make the run's folders that do not exist; a copy of a run may lack the empty ones."""
    check_folders(root)
    with writing(root):
        for name in FOLDERS:
            (root / name).mkdir(exist_ok=True)


def put_aside(root: Path, path: Path, why: str, report: Report | None = None) -> Path | None:
    """Move a file of the run to ``damaged/`` and report why; return its new path, None if it is gone already.

    A link is moved itself, not its target. Raises StorageError if it cannot be moved.
    """
    folder = root / "damaged"
    check_folder(folder)
    with writing(folder):
        folder.mkdir(exist_ok=True)
        target = temporary_name(folder / path.name).with_suffix(path.suffix or ".aside")
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, target)
            sync_folder(path.parent)
            if report is not None:
                report(f"{path} is put aside as damaged/{target.name}: {why}")
            return target
    return None


def read_note(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a small file of the run; None if it is torn, or holds something else.

    Raises NotAFile for a link, a pipe or a device, and OSError if it cannot be read.
    """
    return parsed_object(read_regular(path, MOST_NOTE_BYTES))


def parsed_object(content: bytes) -> dict[str, Any] | None:
    """Return the JSON object that bytes hold; None for anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        note = json.loads(content)
        return note if isinstance(note, dict) else None
    return None
