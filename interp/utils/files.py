"""Files that are whole or absent, and paths that stay where they belong."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from pathlib import Path

from interp.errors import InterpError

NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EACCES)
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz")  # reading one can run code
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorageError(InterpError):
    """The run directory cannot be written: full, read-only, gone. The sweep stops; what is finished stays."""


def digest_of(content: bytes | memoryview) -> str:
    """BLAKE2b, 128 bits, as hex."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def inside(root: Path, relative: str) -> Path:
    """``relative`` below ``root``. InterpError if it, or what it links to, lies elsewhere."""
    found = root / relative
    if (
        Path(relative).is_absolute()
        or ".." in Path(relative).parts
        or not found.resolve().is_relative_to(root.resolve())
    ):
        raise InterpError(f"{root}: the path {relative!r} leads out of the run directory, and is refused")
    return found


def sync_folder(folder: Path) -> None:
    """Makes names in a folder survive a power cut, where the platform can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems sync names by themselves
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(target: Path):
    """OSErrors as a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            hint = "free some space, and resume: what is finished is kept"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            hint = "it is read-only here: choose another folder, or make it writable and resume"
        else:
            hint = "resume when it is there again: what is finished is kept"
        raise StorageError(f"cannot write {target}: {error.strerror or error}; {hint}") from error


def temporary_name(target: Path) -> Path:
    """A name in the same folder that nobody else uses."""
    return target.parent / f".{target.name}.{uuid.uuid4().hex[:12]}.tmp"


def _write_temporary(target: Path, content: bytes | memoryview) -> Path:
    temporary = temporary_name(target)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        _unlink(temporary)
        raise
    return temporary


def write_file(target: Path, content: bytes | memoryview) -> None:
    """Write, sync, rename over what may be there. StorageError if it cannot be."""
    with writing(target):
        temporary = _write_temporary(target, content)
        try:
            os.replace(temporary, target)
        except BaseException:
            _unlink(temporary)
            raise
        sync_folder(target.parent)


def publish_file(target: Path, content: bytes | memoryview) -> bool:
    """Write, sync, and put in place only if nothing is there: False if something was. One of several writers wins."""
    with writing(target):
        temporary = _write_temporary(target, content)
        try:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS or not target.parent.exists():
                    raise
                if target.exists():  # no hard links here: between this look and the rename the lease has to do
                    return False
                os.rename(temporary, target)
            sync_folder(target.parent)
            return True
        finally:
            _unlink(temporary)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
