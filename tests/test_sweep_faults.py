"""What a sweep must survive, on parts that take milliseconds; after each fault, resuming gives the undisturbed table.

`experiments/sweep_faults.py` does the same at 50 random instants on a real model.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweep_light as light

from interp.errors import InterpError
from interp.jobs.driver import Options, drive
from interp.jobs.store import Store
from interp.utils import files


def driver(store: Store, **options) -> subprocess.Popen:
    command = [*light.COMMAND, "drive", str(store.root), json.dumps(options)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def resumed(store: Store, code: int = 0, **options) -> str:
    """A driver run to its end."""
    process = driver(store, **options)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    return out + err


def here(store: Store):
    """A driver in this process."""
    return drive(store, Options(executor="in-process", show="none"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    store = light.make(tmp_path_factory.mktemp("runs") / "undisturbed")
    assert here(store).code == 0
    return light.contents(store)


@pytest.fixture
def store(tmp_path) -> Store:
    return light.make(tmp_path / "run")


def some_parts(process: subprocess.Popen, n: int) -> list[dict]:
    """Waits for n parts to be done, or the end; the events until then."""
    events = []
    while sum(e["event"] == "done" for e in events) < n and (line := process.stdout.readline()):
        events.append(json.loads(line))
    return events


def processes_of(store: Store) -> list[int]:
    """Workers that run on a store, by the kernel's list."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if str(store.root).encode() in line and b"drive" not in line:
                found.append(int(folder.name))
    return found


def test_kill_9_of_driver_and_workers_at_random_instants(tmp_path, undisturbed) -> None:
    dice = random.Random(7)
    store = light.make(tmp_path / "run", seconds=0.05)
    for round in range(4):
        process = driver(store, workers=2)
        some_parts(process, dice.randrange(1, 6))
        time.sleep(dice.random() * 0.03)
        if round % 2:  # a worker; its driver replaces it
            for pid in processes_of(store)[:1]:
                os.kill(pid, signal.SIGKILL)
            some_parts(process, 1)
        process.kill()
        process.communicate()
        if len(store.inventory().present) > 34:
            break
    deadline = time.monotonic() + 10
    while processes_of(store) and time.monotonic() < deadline:  # without a driver they end by themselves
        time.sleep(0.05)
    assert not processes_of(store)
    assert not store.inventory().damaged
    assert here(store).code == 0
    assert light.contents(store) == undisturbed
    assert not list((store.root / "parts").glob(".*"))


def test_two_drivers_at_once_share_the_parts(tmp_path, undisturbed) -> None:
    store = light.make(tmp_path / "run", seconds=0.05)
    both = [driver(store, workers=1), driver(store, workers=1)]
    said = [[json.loads(line) for line in p.communicate(timeout=60)[0].splitlines()] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    done = [[e["part"] for e in events if e["event"] == "done"] for events in said]
    started = [[e["part"] for e in events if e["event"] == "started"] for events in said]
    assert sorted(done[0] + done[1]) == list(range(40)) == sorted(started[0] + started[1])
    assert light.contents(store) == undisturbed


DEADLY = """
import os, sys
sys.path.insert(0, {tests!r})
import sweep_light

where, commits, replace, link = {where!r}, [], os.replace, os.link


def die(target):
    commits.append(target)
    if len(commits) == 2:
        os.kill(os.getpid(), 9)


def replaced(source, target, **options):
    if where == "before the receipt" and "/receipts/" in str(target):
        die(target)
    replace(source, target, **options)


def linked(source, target, **options):
    if where == "before the part":
        die(target)
    link(source, target, **options)
    if where == "after the part":
        die(target)


os.replace, os.link = replaced, linked
sys.exit(sweep_light.main())
"""


def test_drivers_killed_in_the_middle_of_a_commit_beside_another(tmp_path, undisturbed) -> None:
    store, deadly = light.make(tmp_path / "run"), {}
    honest = driver(store, executor="in-process")
    while '"started"' not in honest.stdout.readline():
        pass
    honest.send_signal(signal.SIGSTOP)  # with a part in hand, until the others are dead
    options = json.dumps({"executor": "in-process", "show": "none"})
    for i, where in enumerate(("before the receipt", "before the part", "after the part")):
        script = tmp_path / f"deadly{i}.py"
        script.write_text(DEADLY.format(tests=str(Path(light.__file__).parent), where=where))
        deadly[where] = subprocess.Popen([sys.executable, str(script), "drive", str(store.root), options])
    assert {where: p.wait(timeout=60) for where, p in deadly.items()} == dict.fromkeys(deadly, -signal.SIGKILL)
    honest.send_signal(signal.SIGCONT)
    out, err = honest.communicate(timeout=60)
    assert honest.returncode == 0, err
    done = [e["part"] for e in map(json.loads, out.splitlines()) if e["event"] == "done"]
    assert len(done) == len(set(done)) == 40 - 3 - 1  # one whole part each, and one at the last breath
    assert not store.inventory().damaged and store.inventory().rows == 40 * 50
    assert here(store).code == 0  # which removes what the dead had not put in place yet
    assert light.contents(store) == undisturbed


def test_ctrl_c_once_finishes_what_is_in_hand_and_twice_drops_it(tmp_path, undisturbed) -> None:
    slow = light.make(tmp_path / "slow", seconds=0.3)
    process = driver(slow, workers=2)
    some_parts(process, 1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and '"stopping"' in out
    n = len(slow.inventory().present)
    assert 1 <= n < 40 and not list((slow.root / "leases").iterdir())
    process = driver(slow, workers=2)
    while json.loads(process.stdout.readline())["event"] != "started":
        pass
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130 and not processes_of(slow)
    (slow.root / "inputs" / "seconds").write_text("0.0")
    assert here(slow).code == 0
    assert light.contents(slow) == undisturbed


def test_truncated_flipped_and_lost_parts_are_found_computed_anew_and_reported(store, undisturbed) -> None:
    here(store)
    with open(store.path(3), "r+b") as file:
        file.truncate(100)
    with open(store.path(5), "r+b") as file:
        file.seek(200)
        byte = file.read(1)[0]
        file.seek(200)
        file.write(bytes([byte ^ 1]))
    store.path(7).unlink()
    next((store.root / "receipts").glob("000009-*")).unlink()
    assert set(store.inventory().damaged) == {3, 9}
    assert [p for p, _ in store.verify(range(4, 7))] == [5]
    with pytest.raises(InterpError, match=r"000005.parquet is damaged"):
        store.table(5)
    outcome = here(store)
    assert outcome.code == 0 and set(outcome.damaged) == {3, 5, 9}
    assert "3 part(s) were found damaged and computed anew: 3, 5, 9" in str(outcome)
    assert light.contents(store) == undisturbed
    assert len(list((store.root / "damaged").iterdir())) == 3


def test_a_file_that_cannot_grow(tmp_path) -> None:
    store, whole = (light.make(tmp_path / n, parts=4, rows=4000) for n in ("run", "whole"))
    said = resumed(store, code=2, workers=1, largest_file=10_000)
    assert "cannot write" in said and "free some space, and resume" in said
    assert not store.inventory().present
    assert here(store).code == here(whole).code == 0
    assert light.contents(store) == light.contents(whole)


def test_a_full_disk_and_a_move_to_another(tmp_path, undisturbed) -> None:
    try:
        subprocess.run(["unshare", "-Urm", "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a user namespace to mount a small tmpfs in")
    small, moved = tmp_path / "small", tmp_path / "moved"
    small.mkdir()
    script = (
        f"mount -t tmpfs -o size=160k tmpfs {small} || exit 9; cp -a {tmp_path}/fresh {small}/run; "
        f"{sys.executable} {light.__file__} drive {small}/run '{{\"workers\": 1}}'; code=$?; "
        f"cp -a {small}/run {moved}; exit $code"
    )
    light.make(tmp_path / "fresh")
    done = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode == 9:
        pytest.skip("a tmpfs may not be mounted here")
    assert done.returncode == 2 and "No space left" in done.stderr, done.stdout[-500:] + done.stderr
    store = Store.open(moved)
    assert 0 < len(store.inventory().present) < 40 and not store.inventory().damaged
    assert here(store).code == 0
    assert light.contents(store) == undisturbed


def test_read_only_output(store, undisturbed, monkeypatch) -> None:
    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(files, "_synced_file", refuse)
        with pytest.raises(InterpError, match="Read-only file system; it is read-only here: choose another folder"):
            here(store)
    assert here(store).code == 0
    assert light.contents(store) == undisturbed


def test_a_folder_that_cannot_be_made(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InterpError, match="cannot write"):
        light.make(tmp_path / "file" / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("")
    with pytest.raises(InterpError, match="is not empty, and not a run"):
        light.make(tmp_path / "full")


def test_clocks_that_jump(store, undisturbed, monkeypatch) -> None:
    clock = time.time
    jumps = iter([3e9, -1e9, 0.0, 1e8] * 1000)
    monkeypatch.setattr(time, "time", lambda: clock() + next(jumps))
    for number in (1, 2):  # a lease that a dead process left, from 1970 and from 2100
        (store.root / "leases" / f"{number:06d}").write_text("{}")
        os.utime(store.root / "leases" / f"{number:06d}", (number * 2e9, number * 2e9))
    assert here(store).code == 0
    assert light.contents(store) == undisturbed


def test_shards_and_merge(tmp_path, undisturbed) -> None:
    from interp.jobs.merge import merge

    halves = [light.make(tmp_path / n) for n in "ab"]
    for i, half in enumerate(halves):
        outcome = drive(half, Options(executor="in-process", show="none", shard=(i, 2)))
        assert outcome.code == 0 and outcome.present == 20 and "belong to other shards" in str(outcome)
    halves[1].path(3).write_bytes(b"PAR1")
    assert merge(halves[0], [Store.open(shutil.copytree(tmp_path / "b", tmp_path / "moved"))]) == {
        "taken": 19, "there": 0, "missing": 1,
    }  # fmt: skip
    here(halves[1])
    assert merge(halves[0], [halves[1], halves[1]])["missing"] == 0
    assert light.contents(halves[0]) == undisturbed
    other = light.make(tmp_path / "c", rows=3)
    with pytest.raises(InterpError, match=r"rows: 50 → 3"):
        merge(halves[0], [other])


def test_a_part_that_kills_its_workers_is_left_and_said(store, monkeypatch, undisturbed) -> None:
    script = store.root.parent / "deadly.py"
    script.write_text(
        f"import sys, os; sys.path.insert(0, {str(Path(light.__file__).parent)!r}); import sweep_light\n"
        "honest = sweep_light.LightJob.compute\n"
        "deadly = lambda self, part: os.kill(os.getpid(), 9) if part == 2 else honest(self, part)\n"
        "sweep_light.LightJob.compute = deadly\n"
        "sys.exit(sweep_light.main())\n"
    )
    said = resumed(store, code=4, workers=1, extra={"command": [sys.executable, str(script)]})
    assert "5 workers died while they computed it; the last one was killed by SIGKILL" in said
    assert len(store.inventory().present) == 39
    assert here(store).code == 0
    assert light.contents(store) == undisturbed


def test_a_copy_without_empty_folders_goes_on(store, undisturbed) -> None:
    for name in ("leases", "damaged", "drivers", "prompts", "inputs"):
        (store.root / name).rmdir()
    assert here(store).code == 0
    assert light.contents(store) == undisturbed
