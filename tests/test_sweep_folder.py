"""Nothing in a run directory is followed out of it, and a torn file is put aside with a message; the run goes on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import sweep_light as light

from interp.errors import InterpError
from interp.jobs.driver import Options, drive
from interp.jobs.executors.local import Pool
from interp.jobs.frozen import FrozenFiles
from interp.jobs.leases import HeartbeatLeases, LockLeases, holders
from interp.jobs.merge import merge
from interp.jobs.store import Store


@pytest.fixture
def precious(tmp_path) -> Path:
    """A file outside the run, that must stay as it is."""
    path = tmp_path / "precious"
    path.write_text("thesis")
    return path


def spoil(path: Path, how: str, target: Path) -> None:
    """Put something that leads elsewhere, or blocks, where a file of the run belongs."""
    path.parent.mkdir(exist_ok=True)
    if how == "link":
        path.symlink_to(target)
    elif how == "dangling":
        path.symlink_to(target.with_name("new"))
    elif how == "hard link":
        os.link(target, path)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()


WAYS = ("link", "dangling", "hard link", "pipe", "folder")


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["locks", "heartbeats"])
def test_leases_are_not_followed(tmp_path, precious, how, kind) -> None:
    store, said = light.make(tmp_path / "run", parts=3), []
    name = "000001" if kind == "locks" else "000001.0"
    spoil(store.root / "leases" / name, how, precious)
    if kind == "heartbeats" and how == "hard link":  # read only: it is watched like any lease without a number
        leases = HeartbeatLeases(store.root / "leases", beat=0.0, report=said.append)
        assert leases.take(1) is not None and "is torn" in said[0]
        leases.close()
    else:
        store.header["leases"] = kind
        outcome = drive(store, Options(executor="in-process", show="none"))
        assert outcome.code == 0 and outcome.present == 3 and "is put aside as damaged/" in str(outcome)
    assert precious.read_text() == "thesis" and not precious.with_name("new").exists()
    assert holders(store.root / "leases").get(1, {}) is not None


@pytest.mark.parametrize("text", ["", '{"host": "a", "pid": 12', "[1]", '{"pid": ', "9" * 5000, "[" * 50_000, "\udcff"])
def test_a_torn_heartbeat_is_taken_over_after_three_beats(tmp_path, text) -> None:
    said, now = [], [0.0]
    leases = HeartbeatLeases(tmp_path / "leases", beat=5.0, clock=lambda: now[0], report=said.append)
    (tmp_path / "leases" / "000001.0").write_bytes(text.encode(errors="surrogateescape"))
    assert leases.take(1) is None and holders(tmp_path / "leases") == {1: {}}
    now[0] = 14.0
    assert leases.take(1) is None
    now[0] = 16.0
    assert leases.take(1) is not None and "000001.0 is torn" in said[0]
    leases.close()


@pytest.mark.parametrize("pid", [None, [], "x", 10**30, -1, 1.5])
def test_odd_holders_are_watched(tmp_path, pid) -> None:
    from interp.jobs.leases import holder, pid_namespace

    leases = HeartbeatLeases(tmp_path / "leases")
    note = {**holder(), "pids": pid_namespace(), "count": 3, "pid": pid}
    (tmp_path / "leases" / "000001.0").write_text(json.dumps(note))
    assert leases.take(1) is None


@pytest.mark.parametrize("how", WAYS[:3])
def test_a_heartbeat_never_writes_through_a_link(tmp_path, precious, how) -> None:
    leases = HeartbeatLeases(tmp_path / "leases")
    lease = leases.take(1)
    path = tmp_path / "leases" / "000001.0"
    path.unlink()
    spoil(path, how, precious)
    assert lease is not None
    lease.release()
    leases.close()
    assert precious.read_text() == "thesis" and not precious.with_name("new").exists()
    assert not path.is_symlink() and json.loads(path.read_text())["count"] == -1


@pytest.mark.parametrize("folder", ["leases", "parts", "prompts", "receipts", "damaged", "drivers", "inputs"])
def test_a_folder_that_is_a_link_is_refused(tmp_path, folder) -> None:
    store = light.make(tmp_path / "run", parts=2)
    (tmp_path / "elsewhere").mkdir()
    (store.root / folder).rmdir()
    (store.root / folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InterpError, match=rf"{folder} is a link, and is not followed"):
        Store.open(store.root)
    with pytest.raises(InterpError, match=rf"{folder} is a link, and is not followed"):
        drive(store, Options(executor="in-process", show="none"))
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("how", WAYS)
def test_parts_logs_and_leftovers_are_not_followed(tmp_path, precious, how) -> None:
    store = light.make(tmp_path / "run", parts=3)
    spoil(store.path(1), how, precious)
    spoil(store.root / "parts" / ".000002.parquet.0123.tmp", how, precious)
    outcome = drive(store, Options(executor="in-process", show="none"))
    assert outcome.code == 0 and list(outcome.damaged) == [1]
    assert not list((store.root / "parts").glob(".*")) and len(store.inventory().present) == 3
    pool = Pool(store, range(3), lambda event: None, lambda: False, 1, 1)
    spoil(pool._log_path(0), how, precious)
    with pool._open_log(pool._log_path(0)) as log:
        log.write(b"log")
    assert precious.read_text() == "thesis" and not precious.with_name("new").exists()


@pytest.mark.parametrize("how", WAYS[:2] + WAYS[3:])
def test_frozen_files_and_receipts_are_not_followed(tmp_path, precious, how) -> None:
    store, said = light.make(tmp_path / "run", parts=1), []
    files = FrozenFiles(store.root, said.append)
    spoil(store.root / "prompts" / "x.json", how, precious)
    assert files.get("prompts/x.json") is None and "is put aside as damaged/" in said[0]
    assert files.keep("prompts/x.json", b"{}") == b"{}" == files.get("prompts/x.json")
    spoil(store.root / "prompts" / "y.json", how, precious)
    assert files.keep("prompts/y.json", b"[]") == b"[]" == files.get("prompts/y.json")
    for name in ("../precious", "/etc/passwd", "prompts/..", "prompts/../../precious", ".."):
        with pytest.raises(InterpError):
            files.get(name)
    assert drive(store, Options(executor="in-process", show="none")).code == 0
    receipt = next((store.root / "receipts").iterdir())
    receipt.unlink()
    spoil(receipt, how, precious)
    assert merge(light.make(tmp_path / "copy", parts=1), [store])["taken"] == 1
    assert "thesis" not in (tmp_path / "copy" / "receipts" / receipt.name).read_text()
    assert precious.read_text() == "thesis"


@pytest.mark.parametrize("content", ["", '{"kind": "light", "sch', "[" * 50_000, "link", "pipe"])
def test_a_torn_run_json_is_put_aside_by_a_run_with_its_config(tmp_path, precious, content, caplog) -> None:
    store = light.make(tmp_path / "run", parts=3)
    assert drive(store, Options(executor="in-process", show="none")).code == 0
    whole, path = light.contents(store), store.root / "run.json"
    shutil.copy(path, precious)
    path.unlink()
    shutil.rmtree(store.root / "drivers")  # which recorded what run.json held
    if content in WAYS:
        spoil(path, content, precious)
    else:
        path.write_text(content)
    with pytest.raises(InterpError, match=r"run.json"):
        Store.open(store.root)
    store = light.make(tmp_path / "run", parts=3)
    assert "run.json is put aside as damaged/" in caplog.text
    assert drive(store, Options(executor="in-process", show="none")).code == 0 and light.contents(store) == whole


def test_a_lock_is_still_exclusive(tmp_path) -> None:
    one, two = (LockLeases(tmp_path / "leases") for _ in range(2))
    lease = one.take(1)
    assert lease is not None and two.take(1) is None
    lease.release()
    assert two.take(1) is not None
