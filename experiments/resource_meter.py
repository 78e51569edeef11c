"""Seconds and resident memory of what a script does."""

from __future__ import annotations

import os
import resource
import threading
import time
from pathlib import Path
from typing import Any


def resident() -> float:
    """MiB of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


class Watch:
    """Seconds inside the block, and the largest resident memory, looked at every 5 ms."""

    def __enter__(self) -> Watch:
        self.before = self.peak = resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        self.begun = time.perf_counter()
        return self

    def _look(self) -> None:
        while not self.stop.wait(0.005):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_: Any) -> None:
        self.seconds = time.perf_counter() - self.begun
        self.stop.set()
        self.thread.join()

    def facts(self) -> dict[str, float]:
        """For JSON."""
        load = os.getloadavg()[0]  # what else the machine was doing
        return {"seconds": self.seconds, "peak_mib": self.peak, "loaded_mib": self.before, "load": load}
