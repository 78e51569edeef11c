"""How a running sweep is seen: one live display on a terminal, plain lines elsewhere, JSON lines for programs."""

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
    """What is known of the run's progress. ``others``: parts that other drivers published meanwhile are not in it."""

    parts: int
    done: int
    rows: int
    failed: int
    begun: float = field(default_factory=time.monotonic)
    here: int = 0  # parts done by this driver
    rows_here: int = 0
    sizes: dict[Any, int] = field(default_factory=dict)  # memory by worker

    def add(self, event: Event) -> None:
        """Takes note of an event."""
        if event["event"] == "done":
            self.done, self.here = self.done + 1, self.here + 1
            self.rows, self.rows_here = self.rows + event["rows"], self.rows_here + event["rows"]
            self.failed += event["failed"]
            self.sizes[event.get("worker")] = event["memory"]
        elif event["event"] == "died":
            self.sizes.pop(event["worker"], None)

    @property
    def rate(self) -> float:
        """Cells a second, of this driver."""
        return self.rows_here / max(time.monotonic() - self.begun, 1e-9)

    @property
    def left(self) -> float | None:
        """Seconds to go at the pace so far; None before the first part."""
        if not self.here:
            return None
        return (self.parts - self.done) * (time.monotonic() - self.begun) / self.here

    @property
    def memory(self) -> int:
        """Bytes of this process and its workers."""
        apart = sum(size for worker, size in self.sizes.items() if worker is not None)
        return memory() + apart

    def words(self) -> str:
        """One line."""
        left = "?" if self.left is None else duration(self.left)
        failed = f", {self.failed:,} failed" if self.failed else ""
        return (
            f"{self.done:,}/{self.parts:,} parts, {self.rows:,} cells{failed}, {self.rate:,.0f} cells/s, {left} left, "
            f"{self.memory / 2**30:.2f} GiB"
        )


def duration(seconds: float) -> str:
    """``1 h 02 min``, ``3 min 20 s``, ``12 s``."""
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


TOLD = {
    "died": "worker {worker} {reason}; its part is taken over",
    "left": "part {part} is left undone: {reason}",
    "damaged": "part {part} is damaged and will be computed anew: {reason}",
    "retried": "part {part} had failed cells and will be computed anew",
    "stopping": "finishing the parts in hand; ctrl-C again to drop them",
    "note": "{reason}",
}


class Display:
    """Plain lines: what happened, and how far it is every few seconds."""

    def __init__(self, tally: Tally, out: TextIO | None = None, every: float = EVERY):
        self.tally, self.out, self.every = tally, out or sys.stderr, every
        self.last = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Shows an event."""
        self.tally.add(event)
        if event["event"] in TOLD:
            self.line(TOLD[event["event"]].format(**event))
        if event["event"] == "done" and time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            self.line(self.tally.words())

    def line(self, text: str) -> None:
        """Writes one line."""
        print(text, file=self.out, flush=True)


class Lines(Display):
    """Every event as a line of JSON, with the tally of parts, cells and failures."""

    def __call__(self, event: Event) -> None:
        """Shows an event."""
        self.tally.add(event)
        t = self.tally
        counted = {"parts": t.parts, "parts_done": t.done, "cells": t.rows, "failed_cells": t.failed}
        left = {"seconds_left": None if t.left is None else round(t.left, 1), "cells_per_second": round(t.rate, 1)}
        self.line(json.dumps({**event, **counted, **left, "memory": t.memory}))


class Silent(Display):
    """Nothing is shown."""

    def line(self, text: str) -> None:
        """Writes nothing."""


class Live(Display):
    """One line that stays in place, drawn by rich; events above it."""

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
        """Shows an event."""
        super().__call__(event)
        self.bar.update(self.task, completed=self.tally.done, words=self.tally.words())

    def line(self, text: str) -> None:
        """Writes one line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False)


@contextlib.contextmanager
def display(kind: str, tally: Tally, title: str) -> Iterator[Display]:
    """``"auto"``: live on a terminal, else plain lines; ``"live"``, ``"plain"``, ``"json"``, ``"none"``."""
    if kind == "json":
        yield Lines(tally, sys.stdout)
    elif kind == "live" or (kind == "auto" and sys.stderr.isatty()):
        shown = Live(tally, title)
        shown.every = float("inf")
        with shown.bar:
            yield shown
    elif kind == "none":
        yield Silent(tally)
    else:
        yield Display(tally)
