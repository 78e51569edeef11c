"""Documents of text and token files, from any byte on: what one part reads does not depend on the rest of the file.

A document belongs to the part in whose byte range it begins, as lines of split files do in MapReduce.
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
PIECE = 2**18  # characters of one line that are tokenised together; longer documents are cut here
SAMPLE = 2**20  # bytes at either end of a file that go into its fingerprint


def described(path: Path) -> dict[str, Any]:
    """A data file as the run's config keeps it: where, how long, and what its ends hold."""
    if path.suffix.lower() not in (*TEXT, *LINES, *TOKENS):
        raise InterpError(
            f"{path}: text (.txt, a document a line), .jsonl with a key 'text', or token ids (.npy, one dimension) "
            "expected; "
            "pickled data can run code when it is read, and is refused"
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
    """InterpError for what is no UTF-8 text at all: UTF-16, another encoding, anything binary."""
    try:
        if b"\0" not in sample:
            codecs.getincrementaldecoder("utf-8")().decode(sample)  # its last character may be cut
            return
        at = sample.index(b"\0")
    except UnicodeDecodeError as error:
        at = error.start
    raise InterpError(f"{path} is not UTF-8 text (byte {at}): convert it, e.g. iconv -f latin1 -t utf-8")


def documents(path: Path, start: int, stop: int) -> Iterator[str | list[int]]:
    """The documents that begin in bytes [start, stop): texts, or lists of token ids, long ones in pieces."""
    if path.suffix.lower() in TOKENS:
        yield from _token_pieces(path, start, stop)
        return
    with open(path, "rb") as file:
        file.seek(max(0, start - 1))
        if start > 0:
            while (skipped := file.readline(PIECE)) and not skipped.endswith(b"\n"):
                pass  # the line that began before this part
        while file.tell() < stop and (line := file.readline(PIECE)):
            begun = file.tell() - len(line)
            yield from _document(path, begun, line, file)


def _document(path: Path, begun: int, line: bytes, file: Any) -> Iterator[str]:
    if path.suffix.lower() in LINES:
        while not line.endswith(b"\n") and (more := file.readline(PIECE)):
            line += more
        if line.strip():
            yield _text_of(path, begun, line)
        return
    rest = b""
    while True:
        whole = line.endswith(b"\n") or len(line) < PIECE
        line = rest + line
        cut = len(line) if whole else max(line.rfind(b" "), 0) or _between_characters(line)
        line, rest = line[:cut], line[cut:]
        if text := _decoded(path, begun, line).strip():
            yield text
        if whole or not (line := file.readline(PIECE)):
            if tail := _decoded(path, begun, rest).strip():
                yield tail
            return


def _between_characters(line: bytes) -> int:
    """Where the last character begins, which may go on in the next piece."""
    return next((i for i in range(len(line) - 1, 0, -1) if line[i] & 0xC0 != 0x80), len(line))


def _decoded(path: Path, begun: int, text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        bad = text[error.start : error.start + 8]
        raise PromptError(f"{path}: the document at byte {begun} is not UTF-8 ({bad!r})") from None


def _text_of(path: Path, begun: int, line: bytes) -> str:
    try:
        found = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, str):
        raise PromptError(f"{path}, byte {begun}: a JSON object with the key 'text' expected, got {line[:60]!r}")
    return found


def _tokens(path: Path) -> Any:
    import numpy as np

    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise InterpError(f"{path} is no .npy file of plain numbers ({error}); pickled objects are refused") from None
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InterpError(f"{path}: one dimension of whole numbers expected, got {found.dtype} {found.shape}")
    return found


def _token_pieces(path: Path, start: int, stop: int) -> Iterator[list[int]]:
    """Token ids whose bytes begin in the range, counted as if the file had no header."""
    found = _tokens(path)
    header = os.path.getsize(path) - found.nbytes
    first, last = (-(-max(0, edge - header) // found.itemsize) for edge in (start, stop))
    for i in range(first, min(last, len(found)), PIECE // 8):
        yield found[i : min(i + PIECE // 8, last, len(found))].tolist()
