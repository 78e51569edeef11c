"""Displays of a running job.

A live line on a terminal, plain lines elsewhere, JSON lines for programs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from interp.jobs.work import Event, memory

EVERY = 10.0  # seconds between plain lines


@dataclass
class Tally:
    """Progress of the run as this driver sees it.

    Parts that other drivers publish meanwhile are not counted.
    """

    parts: int
    done: int
    rows: int
    failed: int
    begun: float = field(default_factory=time.monotonic)
    here: int = 0  # parts done by this driver
    rows_here: int = 0
    sizes: dict[Any, int] = field(default_factory=dict)  # memory by worker

    def add(self, event: Event) -> None:
        """Count an event."""
        if event["event"] == "done":
            self.done, self.here = self.done + 1, self.here + 1
            self.rows, self.rows_here = self.rows + event["rows"], self.rows_here + event["rows"]
            self.failed += event["failed"]
            self.sizes[event.get("worker")] = event["memory"]
        elif event["event"] == "died":
            self.sizes.pop(event["worker"], None)

    @property
    def rate(self) -> float:
        """Cells per second of this driver."""
        return self.rows_here / max(time.monotonic() - self.begun, 1e-9)

    @property
    def left(self) -> float | None:
        """Estimated seconds left at the rate so far; None before the first part."""
        if not self.here:
            return None
        return (self.parts - self.done) * (time.monotonic() - self.begun) / self.here

    @property
    def memory(self) -> int:
        """Bytes of memory of this process and its workers."""
        workers = sum(size for worker, size in self.sizes.items() if worker is not None)
        return memory() + workers

    def words(self) -> str:
        """Return the progress as one line."""
        left = "?" if self.left is None else duration(self.left)
        failed = f", {self.failed:,} failed" if self.failed else ""
        return (
            f"{self.done:,}/{self.parts:,} parts, {self.rows:,} cells{failed}, {self.rate:,.0f} cells/s, {left} left, "
            f"{self.memory / 2**30:.2f} GiB"
        )


def duration(seconds: float) -> str:
    """Format seconds as ``1 h 02 min``, ``3 min 20 s`` or ``12 s``."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


MESSAGES = {
    "died": "worker {worker} {reason}; its part is taken over",
    "left": "part {part} is left undone: {reason}",
    "damaged": "part {part} is damaged and will be computed anew: {reason}",
    "retried": "part {part} had failed cells and will be computed anew",
    "stopping": "finishing the current parts; press Ctrl-C again to drop them",
    "note": "{reason}",
}


class Display:
    """Plain lines: messages, and the progress every few seconds."""

    def __init__(self, tally: Tally, out: TextIO | None = None, every: float = EVERY):
        self.tally, self.out, self.every = tally, out or sys.stderr, every
        self.last = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self.tally.add(event)
        if event["event"] in MESSAGES:
            self.line(MESSAGES[event["event"]].format(**event))
        if event["event"] == "done" and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self.line(self.tally.words())

    def line(self, text: str) -> None:
        """Write one line."""
        print(text, file=self.out, flush=True)


class JsonLines(Display):
    """Every event as a line of JSON, with the numbers of parts, cells and failures."""

    def __call__(self, event: Event) -> None:
        """Show an event."""
        self.tally.add(event)
        t = self.tally
        counts = {"parts": t.parts, "parts_done": t.done, "cells": t.rows, "failed_cells": t.failed}
        left = {"seconds_left": None if t.left is None else round(t.left, 1), "cells_per_second": round(t.rate, 1)}
        self.line(json.dumps({**event, **counts, **left, "memory": t.memory}))


class Silent(Display):
    """Show nothing."""

    def line(self, text: str) -> None:
        """Write nothing."""


class Live(Display):
    """One line that stays in place, drawn by rich, with messages above it."""

    def __init__(self, tally: Tally, title: str):
        super().__init__(tally)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[words]}"),
            console=Console(stderr=True),
        )
        self.task = self.bar.add_task(title, total=tally.parts, completed=tally.done, words=tally.words())

    def __call__(self, event: Event) -> None:
        """Show an event."""
        super().__call__(event)
        self.bar.update(self.task, completed=self.tally.done, words=self.tally.words())

    def line(self, text: str) -> None:
        """Write one line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def display(kind: str, tally: Tally, title: str) -> Iterator[Display]:
    """Yield a display of a kind: "auto", "live", "plain", "json" or "none".

    "auto" is live on a terminal, else plain.
    """
    if kind == "json":
        yield JsonLines(tally, sys.stdout)
    elif kind == "live" or (kind == "auto" and sys.stderr.isatty()):
        shown = Live(tally, title)
        shown.every = float("inf")
        with shown.bar:
            yield shown
    elif kind == "none":
        yield Silent(tally)
    else:
        yield Display(tally)
