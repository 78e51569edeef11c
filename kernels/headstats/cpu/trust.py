"""Checks of files in a cache before they are used: who could have written them, and whether they are whole."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

MARK = b"headstats-seal-1"  # at the end of a sealed file, before the SHA-256 of everything in front of it
DIGEST = 32


class DamagedFile(OSError):
    """A file in a cache is torn, or its contents are not those that were written."""


def owners() -> tuple[int, ...]:
    """Return the users whose files are trusted: this user and root."""
    return (os.getuid(), 0)


def untrusted(path: Path) -> str | None:
    """Return why another user could have put a file or folder there or changed it, or None.

    A link is never trusted. On Windows, where a user's cache is private, the answer is None. Raises OSError if the path
    does not exist.
    """
    status = path.lstat()
    if not hasattr(os, "getuid"):
        return None
    if stat.S_ISLNK(status.st_mode):
        return f"{path} is a link, and is not followed"
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        return f"{path} is neither a file nor a folder"
    if status.st_uid not in owners():
        return f"{path} belongs to user {status.st_uid}, neither to this one nor to root"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by other users (chmod go-w {path})"
    return None


def seal(path: Path) -> None:
    """Append the checksum of a file to it. A shared library is loaded as before: the loader ignores what follows it."""
    with open(path, "r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(MARK + digest)


def check_seal(path: Path) -> None:
    """Raise DamagedFile unless a file ends with the checksum of the rest of it. Links are not followed."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    with open(handle, "rb") as file:
        content = memoryview(file.read())
    end = max(0, len(content) - DIGEST - len(MARK))
    if content[end : end + len(MARK)] != MARK:
        raise DamagedFile(f"{path} is torn: its end, with its checksum, is missing")
    if hashlib.sha256(content[:end]).digest() != content[-DIGEST:]:
        raise DamagedFile(f"{path} is damaged: its contents do not match their checksum")
