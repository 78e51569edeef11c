"""Triton's slow checks, each a process of its own: the interpreter changes what @triton.jit means for a whole process,
and compiling wants one in which it does not. Two run at a time, since each keeps one core busy."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
# Longest first, so that the two end together.
FILES = {
    "interpreted": "headstats_interpreted.py",
    "aot_passes": "headstats_aot_passes.py",
    "aot_edits": "headstats_aot_edits.py",
    "aot": "headstats_aot.py",
    "interpreted_largest": "headstats_interpreted_largest.py",
    "interpreted_columns": "headstats_interpreted_columns.py",
    "interpreted_backward": "headstats_interpreted_backward.py",
}


def process(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a fresh process that finds headstats and the helpers beside this file."""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(HERE), env.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, *arguments], env=env | environment, cwd=ROOT, capture_output=True, text=True)


class Jobs:
    """Runs those of `FILES` that are ``wanted``; ``jobs[name]`` waits for one. ``folder`` keeps what they compile."""

    def __init__(self, wanted: Iterable[str], folder: pathlib.Path):
        # two at a time, or one where pytest itself runs in two processes
        self.pool = ThreadPoolExecutor(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
        chosen = sorted(wanted, key=list(FILES).index)
        self.found = {name: self.pool.submit(_run, name, folder / name) for name in chosen}

    def __getitem__(self, name: str) -> subprocess.CompletedProcess[str]:
        return self.found[name].result()

    def close(self) -> None:
        """Waits for what is running; what has not begun is not begun."""
        self.pool.shutdown(cancel_futures=True)


def _run(name: str, folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    file = str(HERE / FILES[name])
    if name.startswith("aot"):
        return process([file], TRITON_CACHE_DIR=str(folder), OMP_NUM_THREADS="1")
    return process(["-m", "pytest", "-p", "no:cacheprovider", file], TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
