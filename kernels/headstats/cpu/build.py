"""Compilation of the library.

It happens only on request, within a time limit, and without touching a library in use.

Each build works in a temporary folder and ends by renaming one file into place. There is no lock, so a killed build
cannot block the next one, and of two simultaneous builds the later one wins.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from headstats.cpu import trust

COMMAND = "python -m headstats.cpu"
SOURCE = Path(__file__).parent / "source"
LIBRARY = "headstats_cpu.so"
TIME_LIMIT = 600.0  # seconds, for each run of the compiler
COMMON = ("-fPIC", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden")
VARIANTS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
}
ABANDONED = 86400.0  # seconds after which the folder of a build that was killed is removed


class BuildError(RuntimeError):
    """The library could not be built; the message says what to do."""


def cache_root() -> Path:
    """``$HEADSTATS_CACHE``, or ``headstats`` in the user's cache folder."""
    if folder := os.environ.get("HEADSTATS_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headstats"


def library_path() -> Path:
    """Return the path of the library, built or not.

    It depends on the sources, and on the version of torch, Python and the kind of machine.
    """
    parts = [torch.__version__, sysconfig.get_config_var("SOABI") or sys.version, sys.platform, platform.machine()]
    parts += [repr((COMMON, VARIANTS, trust.MARK)), *(f"{p.name}\n{p.read_text()}" for p in sorted(SOURCE.iterdir()))]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache_root() / f"cpu-{key}" / LIBRARY


def compiler() -> str:
    """Return the C++ compiler.

    It is ``$CXX``, or the first of g++, clang++ and c++ that is installed.
    """
    if sys.platform != "linux":
        raise BuildError(f"the compiled backend is for Linux, and this is {sys.platform}; backend 'blocked' runs here")
    cxx = os.environ.get("CXX")
    for name in (cxx,) if cxx else ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return path
    missing = f"CXX={cxx} is not installed" if cxx else "no C++ compiler is installed (g++, clang++ or c++)"
    raise BuildError(f"{missing}. On Debian or Ubuntu: apt-get install g++; on Fedora: dnf install gcc-c++")


def build(say: Callable[[str], None] = print, time_limit: float = TIME_LIMIT) -> Path:
    """Compile the library and put it in place, replacing any existing one.

    Raises BuildError.
    """
    cxx, to = compiler(), library_path()
    root = to.parent.parent
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for folder in (root.resolve(), to.parent):
            if os.path.lexists(folder) and (reason := trust.untrusted(folder)):
                raise BuildError(f"{reason}. Choose another folder with HEADSTATS_CACHE")
        _remove_abandoned(root)
        work = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
    except OSError as error:
        raise BuildError(f"cannot write to {root}: {error}. Choose another folder with HEADSTATS_CACHE") from error
    started = time.monotonic()
    say(f"headstats: compiling the CPU backend with {cxx}")
    try:
        library = _compile(cxx, work, time_limit)
        trust.seal(library)
        library.chmod(0o600)
        to.parent.mkdir(mode=0o700, exist_ok=True)
        library.replace(to)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"headstats: built in {time.monotonic() - started:.0f} s: {to}")
    return to


def _compile(cxx: str, work: Path, time_limit: float) -> Path:
    from torch.utils.cpp_extension import include_paths, library_paths  # slow to import

    x86 = platform.machine() in ("x86_64", "AMD64")
    torch_abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    includes = [f"-I{x}" for x in include_paths()]
    main = [cxx, "-std=c++20", *COMMON, "-fopenmp", torch_abi, *includes, *(["-DHEADSTATS_X86"] if x86 else [])]
    runs = [[*main, "-c", str(SOURCE / "main.cpp"), "-o", str(work / "main.o")]]
    for name, flags in VARIANTS.items():
        if x86 or not flags:
            runs.append([cxx, "-std=c++17", *COMMON, *flags, f"-DHEADSTATS_VARIANT=headstats_{name}", "-c",
                         str(SOURCE / "variant.cpp"), "-o", str(work / f"{name}.o")])  # fmt: skip
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda command: _run(command, time_limit), runs))
    objects = [command[-1] for command in runs]
    # OpenMP is not linked: its symbols come with PyTorch's library, so that both share one thread pool.
    libraries = [f"-L{x}" for x in library_paths()]
    _run([cxx, "-shared", *objects, *libraries, "-ltorch_cpu", "-lc10", "-o", str(work / LIBRARY)], time_limit)
    return work / LIBRARY


def _run(command: list[str], time_limit: float) -> None:
    # In a new session, so that the compiler's child processes can be killed with it.
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=time_limit)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} did not finish in {time_limit:g} s and was stopped") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.returncode:
        lines = "\n".join(output.strip().splitlines()[-15:])
        raise BuildError(f"{' '.join(command)}\nended with status {process.returncode}:\n{lines}")


def _remove_abandoned(root: Path) -> None:
    for folder in root.glob(".building-*"):
        if time.time() - folder.stat().st_mtime > ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)
