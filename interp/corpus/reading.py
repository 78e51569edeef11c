"""Read documents of text and token files from any byte range.

What is read does not depend on the rest of the file.

A document belongs to the part in whose byte range it begins, like lines of split files in MapReduce. A document that
cannot be read is returned with the reason, and costs itself alone.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interp.corpus.checked import CheckedFile, FileRecord, record_file
from interp.errors import InterpError, ModelError
from interp.utils.json_text import parse_json
from interp.utils.npy import MOST_HEADER, NpyHeader, read_npy_header
from interp.utils.progress import Advance

TEXT, LINES, TOKENS = (".txt", ".text", ".md"), (".jsonl", ".ndjson"), (".npy",)
PIECE = 2**18  # characters of one document that are tokenized together; longer documents are cut
LONGEST = 2**24  # bytes of a line of .jsonl, which must be in memory to be read
SAMPLE = 2**20  # bytes at the start of a file whose encoding is checked


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of a long one. ``number``: its line in the file, or its first token."""

    number: int
    content: str | list[int]
    is_first: bool = True


@dataclass(frozen=True)
class Refused:
    """A document, or a piece of one, that cannot be read, with the reason."""

    number: int
    reason: str


def describe_file(path: Path, advance: Advance | None = None) -> FileRecord:
    """Read a data file once, check its kind, and return its checksums (``advance``: see `record_file`).

    Raises InterpError for a file of another kind, one that cannot be read, or an empty one.
    """
    if path.suffix.lower() not in (*TEXT, *LINES, *TOKENS):
        raise InterpError(
            f"{path}: expected text (.txt, one document per line), .jsonl with a key 'text', or token ids (.npy, one "
            "dimension); pickled data can run code when it is read, and is refused"
        )
    record = record_file(path, advance)
    try:
        with CheckedFile(path, record.size, record.blocks) as file:
            if path.suffix.lower() in TOKENS:
                _token_header(file)
            else:
                _check_encoding(path, file.read(0, SAMPLE), record.size > SAMPLE)
    except ModelError as error:
        raise InterpError(str(error)) from None
    return record


def _check_encoding(path: Path, sample: bytes, is_cut: bool) -> None:
    """Raise InterpError if most lines of the sample are not UTF-8 text.

    UTF-16, other encodings and binary data are refused. Single bad lines are left to `documents`.
    """
    lines = sample.split(b"\n")
    if is_cut and len(lines) > 1:
        lines.pop()
    bad = [reason for line in lines if line and (reason := _encoding_error(line, is_cut and len(lines) == 1))]
    if 2 * len(bad) > sum(map(bool, lines)):
        at = sample.index(b"\0") if b"\0" in sample else _encoding_error(sample, is_cut)
        raise InterpError(f"{path} is not UTF-8 text (byte {at}): convert it, e.g. iconv -f latin1 -t utf-8")


def _encoding_error(line: bytes, is_cut: bool) -> int | None:
    """Return the first byte that is not text; None if all are. ``is_cut``: the last character may be incomplete."""
    if b"\0" in line:
        return line.index(b"\0")
    try:
        codecs.getincrementaldecoder("utf-8")().decode(line, final=not is_cut)
    except UnicodeDecodeError as error:
        return error.start
    return None


def documents(file: CheckedFile, start: int, stop: int) -> Iterator[Piece | Refused]:
    """Yield the documents that begin in bytes [start, stop).

    They are texts or lists of token ids; long ones come in pieces. Raises ModelError if the file has changed.
    """
    suffix = file.path.suffix.lower()
    if suffix in TOKENS:
        yield from _token_pieces(file, start, stop)
        return
    file.seek(max(0, start - 1))
    if start > 0:
        while (skipped := file.readline(PIECE)) and not skipped.endswith(b"\n") and file.tell() < stop:
            pass  # the line that began before this part
        if not skipped.endswith(b"\n"):
            return
    number = file.line_number(file.tell())
    while file.tell() < stop and (line := file.readline(PIECE)):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield from _json_document(file, number, line) if suffix in LINES else _text_document(file, number, line)
        number += 1


def _text_document(file: CheckedFile, number: int, line: bytes) -> Iterator[Piece | Refused]:
    """Yield the pieces of the line of text that begins with ``line``."""
    rest, is_first = b"", True
    while True:
        whole = line.endswith(b"\n") or not (more := file.readline(PIECE))
        line = rest + line
        cut = len(line) if whole else max(line.rfind(b" "), 0) or _between_characters(line)
        piece = _decoded(number, line[:cut])
        if isinstance(piece, Refused) or piece.strip():
            yield piece if isinstance(piece, Refused) else Piece(number, piece.strip(), is_first)
            is_first = False
        if whole:
            return
        line, rest = more, line[cut:]


def _between_characters(line: bytes) -> int:
    """Return where the last character begins, which may continue in the next piece."""
    return next((i for i in range(len(line) - 1, 0, -1) if line[i] & 0xC0 != 0x80), len(line))


def _decoded(number: int, text: bytes) -> str | Refused:
    """Decode UTF-8 text."""
    at = _encoding_error(text, is_cut=False)
    if at is None:
        return text.decode("utf-8")
    what = "holds a null byte" if text[at : at + 1] == b"\0" else "is not UTF-8"
    return Refused(number, f"{what} ({text[at : at + 8]!r})")


def _json_document(file: CheckedFile, number: int, line: bytes) -> Iterator[Piece | Refused]:
    """Yield the pieces of the text of the .jsonl line that begins with ``line``."""
    pieces, n_bytes = [line], len(line)
    while not pieces[-1].endswith(b"\n") and (more := file.readline(PIECE)):
        n_bytes += len(more)
        pieces = [*pieces, more] if n_bytes <= LONGEST else [more]
    if n_bytes > LONGEST:
        yield Refused(number, f"{n_bytes / 2**20:,.0f} MiB in one line, and at most {LONGEST / 2**20:.0f} are read")
        return
    content = b"".join(pieces)
    if not content.strip():
        return
    text = _text_of(number, content)
    if isinstance(text, Refused):
        yield text
        return
    at = 0
    while at < len(text) or at == 0:
        end = len(text) if len(text) - at <= PIECE else max(text.rfind(" ", at + 1, at + PIECE), 0) or at + PIECE
        yield Piece(number, text[at:end], at == 0)
        at = max(end, 1)


def _text_of(number: int, line: bytes) -> str | Refused:
    """Return the text of a line of .jsonl."""
    try:
        value = parse_json(line)
        text = value["text"] if isinstance(value, dict) else None
        if isinstance(text, str):
            text.encode("utf-8")  # half of a character, as "\\ud800", cannot be tokenized
            return text
        reason = "a text expected there" if isinstance(value, dict) else "it is no object"
    except KeyError:
        reason = "it has no such key"
    except UnicodeEncodeError:
        reason = "its text holds half of a character (a lone surrogate)"
    except (ValueError, MemoryError) as error:
        reason = str(error) or "it does not fit into memory"
    return Refused(number, f"a JSON object with the key 'text' expected, got {line[:60]!r} ({reason:.200})")


def _token_header(file: CheckedFile) -> NpyHeader:
    """Return the header of a .npy file of token ids. InterpError for anything else."""
    try:
        header = read_npy_header(file.read(0, MOST_HEADER), file.size)
    except ValueError as error:
        reason = f"{file.path} is not a .npy file of plain numbers ({error}); pickled objects are refused"
        raise InterpError(reason) from None
    if len(header.shape) != 1 or header.dtype.kind not in "iu":
        kind = f"{header.dtype} {header.shape}"
        raise InterpError(f"{file.path}: one dimension of whole numbers expected, got {kind}")
    return header


def _token_pieces(file: CheckedFile, start: int, stop: int) -> Iterator[Piece]:
    """Yield the token ids whose bytes begin in the range, in pieces.

    The header counts to the first byte range.
    """
    header = _token_header(file)
    size, n_tokens = header.dtype.itemsize, header.shape[0]
    first, last = (min(-(-max(0, edge - header.start) // size), n_tokens) for edge in (start, stop))
    for i in range(first, last, PIECE // 8):
        content = file.read(header.start + i * size, header.start + min(i + PIECE // 8, last) * size)
        yield Piece(i, np.frombuffer(content, header.dtype).tolist())
