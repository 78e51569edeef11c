"""Files are whole or absent, and anybody whom the umask allows can read them."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from interp.circuits.circuit import Circuit
from interp.circuits.topology import Architecture
from interp.errors import InterpError
from interp.plots.report import report
from interp.results.effects import Effects
from interp.utils.files import (
    NotAFile,
    check_folder,
    open_regular,
    publish_file,
    read_regular,
    result_file,
    whole_file,
    write_file,
)

EFFECTS = Effects(
    pd.DataFrame({
        "example": [0], "component": "z", "layer": 0, "head": 0, "position": pd.NA, "sender": pd.NA, "token": pd.NA,
        "role": pd.NA, "intervention": "patch", "mode": "denoise", "metric": "logit_diff", "clean": 1.0, "corrupt": 0.0,
        "patched": 0.5, "effect": 0.5, "raw": 0.5,
    }), {"model": "tiny"},
)  # fmt: skip
CIRCUIT = Circuit(Architecture(1, 1, 1, mlps=True, parallel=False), ["z.L0H0 -> resid_post.L0"])
WRITERS: dict[str, Callable[[Path], object]] = {
    "effects": lambda path: EFFECTS.write(path),
    "page": lambda path: report(EFFECTS).write(path),
    "circuit": lambda path: CIRCUIT.write(path),
    "run": lambda path: write_file(path, b"x"),
    "part": lambda path: publish_file(path, b"x"),
}

NAMES = {"effects": "result.parquet", "page": "result.html", "circuit": "result.json"}  # others: any name


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("kind", WRITERS)
def test_permissions_are_as_the_umask_says(kind: str, umask: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "umask", None)  # nobody sets it for the whole process, even for a moment
    WRITERS[kind](tmp_path / NAMES.get(kind, "result"))
    monkeypatch.undo()
    assert stat.S_IMODE((tmp_path / NAMES.get(kind, "result")).stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("kind", "step"), [(kind, step) for kind in WRITERS for step in ("fsync", "link" if kind == "part" else "replace")]
)
def test_an_interrupted_write_leaves_nothing_behind(kind: str, step: str, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, interrupt)
    with pytest.raises(KeyboardInterrupt):
        WRITERS[kind](tmp_path / NAMES.get(kind, "result"))
    assert list(tmp_path.iterdir()) == []


def test_an_error_keeps_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "result").write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(tmp_path / "result") as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"]


def test_long_names_and_bad_paths(tmp_path: Path) -> None:
    longest = tmp_path / "new" / ("ü" * 120 + ".parquet")
    with result_file(longest) as file:
        file.write(b"x")
    assert longest.read_bytes() == b"x"
    with pytest.raises(InterpError, match="null character"), result_file(tmp_path / "nul\0"):
        pass
    with pytest.raises(InterpError, match="Choose a writable folder"), result_file(longest / "below"):
        pass


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert read_regular(tmp_path / "file") == b"12345"
    with pytest.raises(NotAFile, match="has 5 bytes, more than the 4"):
        read_regular(tmp_path / "file", most_bytes=4)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, words in (
        ("link", "is a link"),
        ("dangling", "is a link"),
        ("folder", "not a regular"),
        ("pipe", "not a"),
    ):
        for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND):
            with pytest.raises(NotAFile, match=words):
                open_regular(tmp_path / name, flags)
    with pytest.raises(NotAFile, match="not a regular file"):
        read_regular(Path("/dev/zero"))
    os.link(tmp_path / "file", tmp_path / "second")
    assert read_regular(tmp_path / "second") == b"12345"  # reading it does no harm
    with pytest.raises(NotAFile, match="has another name"):
        open_regular(tmp_path / "second", os.O_RDWR)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "absent")
    os.close(open_regular(tmp_path / "absent", os.O_RDWR | os.O_CREAT))


def test_a_link_to_a_folder_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "file").write_bytes(b"")
    check_folder(tmp_path / "folder")
    check_folder(tmp_path / "absent")
    for name, words in (("link", "is a link"), ("file", "is not a folder")):
        with pytest.raises(NotAFile, match=words):
            check_folder(tmp_path / name)
