"""Write files whole or not at all, and keep paths inside a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from interp.errors import InterpError

NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EACCES)
PICKLES = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".joblib", ".npy", ".npz")  # reading one can run code
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StorageError(InterpError):
    """The run directory cannot be written: full, read-only or gone.

    The run stops; finished parts are kept.
    """


class NotAFile(InterpError):
    """A path that should be a regular file is a link, a pipe, a device, a folder, or has another name elsewhere."""


def digest_of(content: bytes | memoryview) -> str:
    """Return the BLAKE2b digest of 128 bits as hex."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def inside(root: Path, relative: str) -> Path:
    """Return the path ``relative`` inside ``root``.

    InterpError if it, or what it links to, lies elsewhere.
    """
    path = root / relative
    if (
        Path(relative).is_absolute()
        or ".." in Path(relative).parts
        or not path.resolve().is_relative_to(root.resolve())
    ):
        raise InterpError(f"{root}: the path {relative!r} leads out of the run directory, and is refused")
    return path


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """Return a descriptor of a regular file. Links, pipes and devices are refused, and never waited for.

        handle = open_regular(run / "leases" / "000003", os.O_RDWR | os.O_CREAT)

    A file that is opened for writing in place must have no second name (hard link): what is written would appear there
    too. Raises NotAFile, or OSError as `os.open` does. Protects against what somebody else left in a folder, not
    against a process that changes it at this moment.
    """
    with contextlib.suppress(FileNotFoundError):
        _check_regular(path, os.lstat(path), flags)  # before it is opened: a tape rewinds when it is
    safe = sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    handle = os.open(path, flags | safe, 0o666)
    try:
        _check_regular(path, os.fstat(handle), flags)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _check_regular(path: Path, entry: os.stat_result, flags: int) -> None:
    """Raise NotAFile unless an entry is a regular file that may be opened with these flags."""
    if stat.S_ISLNK(entry.st_mode):
        raise NotAFile(f"{path} is a link, and is not followed")
    if not stat.S_ISREG(entry.st_mode):
        raise NotAFile(f"{path} is not a regular file, and is not opened")
    if flags & (os.O_WRONLY | os.O_RDWR) and entry.st_nlink > 1:
        raise NotAFile(f"{path} has another name (a hard link), and is not written to")


def read_regular(path: Path, most_bytes: int | None = None) -> bytes:
    """Return the contents of a regular file; see `open_regular` for what is refused.

    ``most_bytes``: NotAFile for a longer file, before anything is read. Raises OSError if it cannot be read.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if most_bytes is not None and size > most_bytes:
            raise NotAFile(f"{path} has {size:,} bytes, more than the {most_bytes:,} that such a file may have")
        return file.read() if most_bytes is None else file.read(most_bytes)


def check_folder(folder: Path) -> None:
    """Raise NotAFile if a path exists and is not a folder itself, such as a link to one."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(folder).st_mode
        if stat.S_ISLNK(mode):
            raise NotAFile(f"{folder} is a link, and is not followed: replace it by the folder itself")
        if not stat.S_ISDIR(mode):
            raise NotAFile(f"{folder} is not a folder")


def check_suffix(path: str | os.PathLike[str], suffix: str, why: str) -> None:
    """Raise InterpError unless a file's name ends with ``suffix``; the message says why, and names such a file."""
    try:
        name = Path(path)
    except TypeError:
        raise InterpError(f"cannot write {path!r:.60}: the name of a {suffix} file is expected") from None
    if name.suffix.lower() != suffix:
        raise InterpError(f"cannot write {name}: the name of a {suffix} file is expected, as in "
                          f"{name.with_suffix(suffix) if name.name else 'result' + suffix}; {why}")  # fmt: skip


def sync_folder(folder: Path) -> None:
    """Make names in a folder survive a power cut, where the platform supports it."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network filesystems sync names themselves
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn an OSError inside the block into a StorageError with a hint."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            hint = "free some space, and resume: what is finished is kept"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            hint = "it is read-only here: choose another folder, or make it writable and resume"
        else:
            hint = "resume when it is back: what is finished is kept"
        raise StorageError(f"cannot write {target}: {error.strerror or error}; {hint}") from error


def temporary_name(target: Path) -> Path:
    """Return an unused name in the folder of ``target``, short enough for any filesystem."""
    return target.parent / f".{target.name[:40]}.{uuid.uuid4().hex[:12]}.tmp"


@contextlib.contextmanager
def _synced_file(temporary: Path) -> Iterator[BinaryIO]:
    """Open a new file; it is on disk when the block ends, and removed if the block raises."""
    try:
        with open(temporary, "xb") as file:  # mode 0o666: the kernel applies the umask
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        _unlink(temporary)
        raise


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces ``target`` when the block ends.

    The file is written whole and synced, or not at all: this is the one way in which interp writes results. Permissions
    are those of any new file, as the umask says; after an error or an interruption nothing is left behind. Raises
    OSError.

        with whole_file(Path("table.csv")) as file:
            file.write(content)
    """
    temporary = temporary_name(target)
    with _synced_file(temporary) as file:
        yield file
    try:
        os.replace(temporary, target)
    except BaseException:
        _unlink(temporary)
        raise
    sync_folder(target.parent)


@contextlib.contextmanager
def result_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Like `whole_file`, in a folder that is made if it does not exist.

    InterpError if it cannot be written.
    """
    target = Path(path)
    if "\0" in str(target):
        raise InterpError(f"cannot write {str(target)!r}: a path cannot hold a null character")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as file:
            yield file
    except OSError as error:
        raise InterpError(f"cannot write {target}: {error.strerror or error}. Choose a writable folder.") from None


def write_file(target: Path, content: bytes | memoryview) -> None:
    """Write a file of a run directory over what may exist there.

    StorageError if it cannot be written.
    """
    with writing(target), whole_file(target) as file:
        file.write(content)


def publish_file(target: Path, content: bytes | memoryview) -> bool:
    """Write, sync, and put in place only if nothing exists there; False if something does.

    One of several writers wins.

    StorageError if it cannot be written.
    """
    with writing(target):
        temporary = temporary_name(target)
        with _synced_file(temporary) as file:
            file.write(content)
        try:
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS or not target.parent.exists():
                    raise
                if target.exists():  # no hard links: between this look and the rename only the lease protects
                    return False
                os.rename(temporary, target)
            sync_folder(target.parent)
            return True
        finally:
            _unlink(temporary)


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
