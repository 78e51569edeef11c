"""Files from anywhere: each is read or refused with one message that names it, in bounded time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
N = 2000


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="limits memory as on Linux")
def test_two_thousand_damaged_files_and_a_dozen_bombs(tmp_path, record_property) -> None:
    """In a process that may allocate 2 GiB; `damaged_files` says what is damaged and how."""
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    script = ROOT / "tests" / "damaged_files.py"
    done = subprocess.run([sys.executable, "-W", "ignore", script, tmp_path, str(N)], env=env, cwd=ROOT,
                          capture_output=True, text=True, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    *complaints, last = done.stdout.splitlines()
    found = json.loads(last)
    record_property("found", last)
    assert not complaints, "\n".join(complaints[:20])
    assert found["read"] + found["refused"] == N and found["refused"] > N // 2
    assert found["seconds"] < 60 and found["MiB"] < 300, found  # 7 s and 13 MiB when this was written
    assert found["bombs"] == 14 and found["bombs_MiB"] < 500, found
