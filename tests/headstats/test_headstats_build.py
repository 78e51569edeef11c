"""Building and loading the compiled CPU backend: never by itself, never stuck, never from another user's hands.

A script stands in for the compiler where only the build around it is tested; it hands out a library that was built.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from headstats.cpu import build, library, trust

SCRIPT = """#!/bin/sh
{before}
for last; do
  if [ "$wanted" ]; then out="$last"; wanted=; fi
  if [ "$last" = -o ]; then wanted=yes; fi
done
cp {library} "$out"
"""


@pytest.fixture
def compiler(compiled_library, monkeypatch, tmp_path):
    """compiler(shell commands) puts a compiler in place that runs them first; the cache is empty."""
    built = build.library_path()
    monkeypatch.setenv("HEADSTATS_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "compiler"

    def put(before=""):
        script.write_text(SCRIPT.format(before=before, library=built))
        script.chmod(0o700)
        monkeypatch.setenv("CXX", str(script))

    put()
    return put


def command(*options):
    """python -m headstats.cpu in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-m", "headstats.cpu", *options], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def wait_for(found, seconds=60.0):
    end = time.monotonic() + seconds
    while not (result := found()) and time.monotonic() < end:
        time.sleep(0.02)
    assert result
    return result


@pytest.mark.slow
def test_the_command_builds_and_says_so(compiler):
    process = command()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and err == ""
    assert re.search(rf"built in \d s: {build.library_path()}", out) and "agrees with the reference" in out
    process = command("--if-missing")
    assert "is already built" in process.communicate(timeout=120)[0] and process.returncode == 0
    assert os.listdir(build.cache_root()) == [build.library_path().parent.name]  # no work folder is left


@pytest.mark.slow
def test_a_killed_build_does_not_stop_the_next(compiler, monkeypatch):
    compiler("sleep 600")
    process = command()
    work = wait_for(lambda: list(build.cache_root().glob(".building-*")))
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    compiler()
    assert build.build(say=lambda line: None) == build.library_path()
    assert library.load(build.library_path()).level >= 0
    monkeypatch.setattr(build, "ABANDONED", -1.0)
    build.build(say=lambda line: None)
    assert not work[0].exists()


@pytest.mark.slow
def test_two_builds_at_once(compiler):
    compiler("sleep 0.5")
    both = [command(), command()]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert "agrees with the reference" in out
    assert os.listdir(build.cache_root()) == [build.library_path().parent.name]


def test_a_build_beside_a_loaded_library(compiler):
    build.build(say=lambda line: None)
    loaded = library.load(build.library_path())
    build.build(say=lambda line: None)
    assert loaded.structure().B == 0 and library.load(build.library_path()).level == loaded.level


def test_a_compiler_that_hangs_is_stopped_with_its_children(compiler, tmp_path):
    compiler(f"sleep 600 & echo $! > {tmp_path}/child; wait")
    started = time.monotonic()
    with pytest.raises(build.BuildError, match=r"did not finish in 0\.5 s and was stopped"):
        build.build(say=lambda line: None, time_limit=0.5)
    assert time.monotonic() - started < 30
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    wait_for(lambda: not child.exists() or child.read_text().split()[2] == "Z")
    assert list(build.cache_root().iterdir()) == []


@pytest.mark.slow
def test_a_compiler_that_fails(compiler):
    compiler("echo 'vector.h: no such luck'; exit 3")
    with pytest.raises(build.BuildError, match=r"ended with status 3:\nvector\.h: no such luck"):
        build.build(say=lambda line: None)
    process = command("--if-possible")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "was not built" in err and "blocked" in err
    process = command()
    process.communicate(timeout=120)
    assert process.returncode == 1


def test_without_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(build.BuildError, match=r"CXX=no-such-compiler is not installed.*apt-get install g\+\+"):
        build.compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler is installed"):
        build.compiler()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(build.BuildError, match="for Linux, and this is win32"):
        build.compiler()


@pytest.mark.parametrize("what", ["the cache", "its folder", "the file"])
def test_what_others_may_write_is_not_loaded(compiler, what):
    path = build.build(say=lambda line: None)
    open_to_all = {"the cache": path.parent.parent, "its folder": path.parent, "the file": path}[what]
    open_to_all.chmod(0o777)
    with pytest.raises(PermissionError, match="can be written by other users"):
        library.load(path)
    if what == "the cache":
        with pytest.raises(build.BuildError, match=r"can be written by other users.*HEADSTATS_CACHE"):
            build.build(say=lambda line: None)


def test_what_belongs_to_another_user_is_not_loaded(compiler, monkeypatch):
    path = build.build(say=lambda line: None)
    monkeypatch.setattr(trust, "owners", lambda: (path.stat().st_uid + 1,))
    with pytest.raises(PermissionError, match="belongs to user"):
        library.load(path)


def torn(content):
    return content[: len(content) // 2]


def flipped(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


DAMAGE = [torn, flipped, lambda c: b"", lambda c: b"\x7fELF" + bytes(100), lambda c: c + b"\0", lambda c: c[:-1]]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_library_is_not_used(compiler, damage, caplog):
    path = build.build(say=lambda line: None)
    path.write_bytes(damage(path.read_bytes()))
    library.find.cache_clear()
    try:
        found, reason = library.find()
        assert found is None and reason.startswith("its library is not loaded") and f"{build.COMMAND} builds" in reason
        assert "slower" in caplog.text and str(path) in caplog.text
    finally:
        library.find.cache_clear()
    build.build(say=lambda line: None)
    assert library.load(path).level >= 0


@pytest.mark.slow
def test_a_torn_library_kills_no_process_and_is_built_again(compiler):
    path = build.build(say=lambda line: None)
    path.write_bytes(torn(path.read_bytes()))
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parents[2])}
    code = "import torch, headstats; print(headstats.attend(*torch.randn(3, 1, 1, 4, 8)).backend)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "blocked" and "is torn" in done.stderr, done.stderr
    out, err = command("--if-missing").communicate(timeout=120)
    assert "is torn" in out and "it is built again" in out and "agrees with the reference" in out, err


@pytest.mark.parametrize("what", ["its folder", "the file"])
def test_a_link_is_not_followed(compiler, what, tmp_path):
    path = build.build(say=lambda line: None)
    place = {"its folder": path.parent, "the file": path}[what]
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="is a link, and is not followed"):
        library.load(path)
    if what == "its folder":
        with pytest.raises(build.BuildError, match="is a link"):
            build.build(say=lambda line: None)
    else:  # a rebuild replaces the link, and leaves what it pointed to
        before = (tmp_path / "elsewhere").read_bytes()
        assert library.load(build.build(say=lambda line: None)).level >= 0
        assert not path.is_symlink() and (tmp_path / "elsewhere").read_bytes() == before


def test_the_cache_may_be_a_link_to_a_folder_of_ones_own(compiler, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "linked").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HEADSTATS_CACHE", str(tmp_path / "linked"))
    assert library.load(build.build(say=lambda line: None)).level >= 0


def test_the_key_follows_sources_and_torch(monkeypatch, tmp_path):
    first = build.library_path()
    monkeypatch.setattr(build.torch, "__version__", "9.9.9")
    second = build.library_path()
    for source in build.SOURCE.iterdir():
        (tmp_path / source.name).write_text(source.read_text() + "// changed\n")
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    assert len({first, second, build.library_path()}) == 3


@pytest.mark.slow
def test_importing_builds_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(build.__file__).parents[2]), "HEADSTATS_CACHE": str(tmp_path)}
    code = "import torch, headstats; print(headstats.attend(*torch.randn(3, 1, 1, 4, 8)).backend)"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "blocked" and not list(tmp_path.iterdir())
