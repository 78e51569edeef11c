"""A process that has read parts ends with its own exit code.

Arrow's threads once freed Python's bytes while Python shut down, which aborted 1 to 12 of 100 starts (exit code 134).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sweep_light as light

from interp.jobs.driver import Options, drive
from interp.jobs.parquet import PartFile, arrow_copy, read_buffer

STARTS = 200


def test_two_hundred_starts_end_with_their_own_code(tmp_path) -> None:
    store = light.make(tmp_path / "run", parts=3)
    assert drive(store, Options(executor="in-process", show="none")).code == 0
    command = [sys.executable, str(Path(__file__).parent / "exit_reader.py"), str(store.root)]

    def start(_: int) -> tuple[int, str]:
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as several:  # more than cores: threads end late
        ends = Counter(several.map(start, range(STARTS)))
    assert ends == {(0, "180\n"): STARTS}


def test_what_is_read_lies_in_memory_of_arrow(tmp_path) -> None:
    import pyarrow as pa

    store = light.make(tmp_path / "run", parts=1)
    store.commit(0, pa.table({"x": [1.0, 2.0]}), 0, {}, {})
    before = pa.total_allocated_bytes()
    buffer = read_buffer(store.path(0))
    assert pa.total_allocated_bytes() - before >= buffer.size == store.path(0).stat().st_size
    table = PartFile(store.path(0), arrow_copy(buffer.to_pybytes())).table()
    assert table.to_pydict() == {"x": [1.0, 2.0]}
