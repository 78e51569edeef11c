"""Read documents of text and token files from any byte range.

What is read does not depend on the rest of the file.

A document belongs to the part in whose byte range it begins, like lines of split files in MapReduce.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from interp.errors import InterpError, PromptError

TEXT, LINES, TOKENS = (".txt", ".text", ".md"), (".jsonl", ".ndjson"), (".npy",)
PIECE = 2**18  # characters of one line that are tokenized together; longer documents are cut
SAMPLE = 2**20  # bytes at each end of a file that its fingerprint covers


def describe_file(path: Path) -> dict[str, Any]:
    """Return path, size and a hash of a data file, for the run's config.

    The hash covers the two ends of the file.

    Raises InterpError for a file of another kind, one that cannot be read, or an empty one.
    """
    if path.suffix.lower() not in (*TEXT, *LINES, *TOKENS):
        raise InterpError(
            f"{path}: expected text (.txt, one document per line), .jsonl with a key 'text', or token ids (.npy, one "
            "dimension); pickled data can run code when it is read, and is refused"
        )
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            sample = file.read(SAMPLE)
            hashed = hashlib.blake2b(sample, digest_size=16)
            file.seek(max(0, size - SAMPLE))
            hashed.update(file.read(SAMPLE))
    except OSError as error:
        raise InterpError(f"cannot read {path}: {error.strerror or error}") from None
    if size == 0:
        raise InterpError(f"{path} is empty")
    if path.suffix.lower() in TOKENS:
        _tokens(path)
    else:
        _check_text(path, sample)
    return {"path": str(path.resolve()), "size": size, "ends": hashed.hexdigest()}


def _check_text(path: Path, sample: bytes) -> None:
    """Raise InterpError unless the sample is UTF-8 text.

    UTF-16, other encodings and binary data are refused.
    """
    try:
        if b"\0" not in sample:
            codecs.getincrementaldecoder("utf-8")().decode(sample)  # its last character may be cut
            return
        at = sample.index(b"\0")
    except UnicodeDecodeError as error:
        at = error.start
    raise InterpError(f"{path} is not UTF-8 text (byte {at}): convert it, e.g. iconv -f latin1 -t utf-8")


def documents(path: Path, start: int, stop: int) -> Iterator[str | list[int]]:
    """Yield the documents that begin in bytes [start, stop).

    They are texts or lists of token ids; long ones come in pieces.
    """
    if path.suffix.lower() in TOKENS:
        yield from _token_pieces(path, start, stop)
        return
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start > 0:
            while (skipped := file.readline(PIECE)) and not skipped.endswith(b"\n"):
                pass  # the line that began before this part
        while file.tell() < stop and (line := file.readline(PIECE)):
            at = file.tell() - len(line)
            yield from _document(path, at, line, file)


def _document(path: Path, at: int, line: bytes, file: Any) -> Iterator[str]:
    """Yield the texts of the document that begins with ``line`` at byte ``at``."""
    if path.suffix.lower() in LINES:
        while not line.endswith(b"\n") and (more := file.readline(PIECE)):
            line += more
        if line.strip():
            yield _text_of(path, at, line)
        return
    rest = b""
    while True:
        whole = line.endswith(b"\n") or len(line) < PIECE
        line = rest + line
        cut = len(line) if whole else max(line.rfind(b" "), 0) or _between_characters(line)
        line, rest = line[:cut], line[cut:]
        if text := _decode(path, at, line).strip():
            yield text
        if whole or not (line := file.readline(PIECE)):
            if tail := _decode(path, at, rest).strip():
                yield tail
            return


def _between_characters(line: bytes) -> int:
    """Return where the last character begins, which may continue in the next piece."""
    return next((i for i in range(len(line) - 1, 0, -1) if line[i] & 0xC0 != 0x80), len(line))


def _decode(path: Path, at: int, text: bytes) -> str:
    """Decode UTF-8. PromptError with the document's position if it is not."""
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = text[error.start : error.start + 8]
        raise PromptError(f"{path}: the document at byte {at} is not UTF-8 ({bad!r})") from None


def _text_of(path: Path, at: int, line: bytes) -> str:
    """Return the text of a line of .jsonl."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise PromptError(f"{path}, byte {at}: a JSON object with the key 'text' expected, got {line[:60]!r}")
    return text


def _tokens(path: Path) -> Any:
    """Return the token ids of a .npy file, mapped into memory.

    InterpError for anything else.
    """
    import numpy as np

    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise InterpError(
            f"{path} is not a .npy file of plain numbers ({error}); pickled objects are refused"
        ) from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InterpError(f"{path}: one dimension of whole numbers expected, got {ids.dtype} {ids.shape}")
    return ids


def _token_pieces(path: Path, start: int, stop: int) -> Iterator[list[int]]:
    """Yield the token ids whose bytes begin in the range, in pieces.

    The header counts to the first byte range.
    """
    ids = _tokens(path)
    header = os.path.getsize(path) - ids.nbytes
    first, last = (-(-max(0, edge - header) // ids.itemsize) for edge in (start, stop))
    for i in range(first, min(last, len(ids)), PIECE // 8):
        yield ids[i : min(i + PIECE // 8, last, len(ids))].tolist()
