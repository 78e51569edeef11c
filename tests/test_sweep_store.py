"""The run directory and its leases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pyarrow as pa
import pytest
import sweep_light as light

from interp.errors import InterpError
from interp.jobs.leases import HeartbeatLeases, LockLeases, holders, open_leases, suitable
from interp.jobs.store import Receipt, Store
from interp.utils.files import inside, publish_file


def test_a_part_is_written_once(tmp_path) -> None:
    store = light.make(tmp_path / "run", parts=3)
    one, two = pa.table({"x": [1.0, 2.0]}), pa.table({"x": [3.0]})
    assert store.commit(1, one, 1, {"seconds": 2}, {"about": "it"})
    assert not store.commit(1, two, 0, {}, {})
    assert store.table(1).equals(one) and store.about(1)["about"] == "it"
    found = store.inventory()
    assert found.present[1] == Receipt(1, store.path(1).stat().st_size, 2, 1, found.present[1].digest)
    assert (found.rows, found.failed, found.damaged) == (2, 1, {})
    lease = store.leases().take(1)
    assert lease is not None and store.put_aside(1, lease) is not None
    assert not store.has(1) and store.commit(1, two, 0, {}, {}) and store.table(1).equals(two)


@pytest.mark.parametrize("outside", ["nowhere", "there.parquet"])
def test_links_among_the_parts_are_damage_and_hide_nothing(tmp_path, outside: str) -> None:
    from interp.jobs.driver import Options, drive

    store = light.make(tmp_path / "run", parts=20)
    assert drive(store, Options(executor="in-process", show="none")).code == 0
    whole = store.content(7)
    (tmp_path / "there.parquet").write_bytes(whole)
    store.path(7).unlink()
    store.path(7).symlink_to(tmp_path / outside)
    found = store.inventory()
    assert len(found.present) == 19 and found.damaged == {7: "it is a link, or not a file"}
    outcome = drive(store, Options(executor="in-process", show="none"))
    assert outcome.code == 0 and list(outcome.damaged) == [7] and store.content(7) == whole


def test_publishing_is_exclusive_without_hard_links_too(tmp_path, monkeypatch) -> None:
    def refuse(*_):
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    assert publish_file(tmp_path / "x", b"1") and not publish_file(tmp_path / "x", b"2")
    assert (tmp_path / "x").read_bytes() == b"1" and len(list(tmp_path.iterdir())) == 1


def test_what_is_no_run_or_newer_or_edited_is_refused(tmp_path) -> None:
    with pytest.raises(InterpError, match="not a run directory"):
        Store.open(tmp_path)
    store = light.make(tmp_path / "run")
    header = json.loads((store.root / "run.json").read_text())
    for change, words in (
        ({"schema": 2}, "made by a newer interp"),
        ({"config": {"rows": 1}}, "does not match its digest"),
        ({"n_parts": "many"}, "is not one that interp wrote"),
    ):
        (store.root / "run.json").write_text(json.dumps(header | change))
        with pytest.raises(InterpError, match=words):
            Store.open(store.root)
    (store.root / "run.json").write_text('{"kind": ')
    with pytest.raises(InterpError, match="cannot be read"):
        Store.open(store.root)


def test_paths_that_lead_out_are_refused(tmp_path) -> None:
    store = light.make(tmp_path / "run")
    (tmp_path / "secret").write_text("s")
    (store.root / "inputs" / "link").symlink_to(tmp_path / "secret")
    for path in ("../secret", "/etc/passwd", "inputs/../../secret", "inputs/link"):
        with pytest.raises(InterpError, match="leads out of the run directory"):
            inside(store.root, path)
    store.commit(0, pa.table({"x": [1.0]}), 0, {}, {})
    os.rename(store.path(0), tmp_path / "elsewhere.parquet")
    store.path(0).symlink_to(tmp_path / "elsewhere.parquet")
    with pytest.raises(InterpError, match="is a link"):
        store.table(0)


def test_locks_are_held_by_the_living(tmp_path) -> None:
    assert suitable(tmp_path) == "locks"
    leases = open_leases(tmp_path / "leases", "locks")
    assert isinstance(leases, LockLeases)
    code = (
        "import sys; from pathlib import Path; from interp.jobs.leases import LockLeases\n"
        f"lease = LockLeases(Path({str(tmp_path / 'leases')!r})).take(5); print(lease is not None, flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "True\n"
    assert leases.take(5) is None and holders(leases.folder)[5]["pid"] == other.pid
    mine = leases.take(6)
    assert mine is not None and leases.take(6) is None
    mine.release()
    assert not (tmp_path / "leases" / "000006").exists()
    other.kill()
    other.wait()
    lease = leases.take(5)
    assert lease is not None
    lease.release()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_heartbeats_take_over_only_what_was_watched_standing_still(tmp_path, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(HeartbeatLeases, "_is_dead", lambda self, note: False)  # as if on other machines
    holder, watcher, third = (HeartbeatLeases(tmp_path / "l", beat=0.02, clock=clock) for _ in range(3))
    lease = holder.take(1)
    assert lease is not None and watcher.take(1) is None
    time.sleep(0.1)
    clock.now += 1000  # its number has grown in the meantime: it lives
    assert watcher.take(1) is None
    holder.close()  # the holder dies
    time.sleep(0.05)
    assert watcher.take(1) is None and third.take(1) is None
    clock.now += 59
    assert watcher.take(1) is None
    clock.now += 2
    taken = watcher.take(1)
    assert taken is not None and third.take(1) is None
    taken.release()  # said to be free: nobody has to watch
    assert third.take(1) is not None
    for leases in (watcher, third):
        leases.close()


def test_heartbeats_of_a_dead_process_of_this_machine_are_not_waited_for(tmp_path) -> None:
    code = (
        "import os; from pathlib import Path; from interp.jobs.leases import HeartbeatLeases\n"
        f"HeartbeatLeases(Path({str(tmp_path / 'l')!r})).take(1); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    leases = HeartbeatLeases(tmp_path / "l")
    assert leases.take(1) is not None and leases.take(1) is None
    leases.close()


def test_a_run_by_heartbeats(tmp_path) -> None:
    from interp.jobs.driver import Options, drive

    store = light.make(tmp_path / "run", parts=5)
    store.header["leases"] = "heartbeats"
    assert drive(store, Options(executor="in-process", show="none")).code == 0
