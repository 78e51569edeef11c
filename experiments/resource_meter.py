"""Measure seconds and resident memory of a block of code."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path
from typing import Any


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


class ResourceMeter:
    """Measure seconds and peak resident memory of a ``with`` block.

    Memory is sampled every 5 ms.
    """

    def __enter__(self) -> ResourceMeter:
        self.before = self.peak = resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        self.begun = time.perf_counter()
        return self

    def _sample(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.begun
        self.stop.set()
        self.thread.join()

    def facts(self) -> dict[str, float]:
        """Return the measurements for JSON, with the machine's load in the last minute."""
        load = os.getloadavg()[0]
        return {"seconds": self.seconds, "peak_mib": self.peak, "loaded_mib": self.before, "load": load}
