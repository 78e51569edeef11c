"""Progress bars with the remaining time: on stderr in a terminal, as an updated output in a notebook.

They are shown only where somebody looks, only for calls that take a moment, and only for the outermost call: what a
shown (or silenced) call runs inside shows nothing of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from html import escape
from typing import Any

Advance = Callable[[float], None]

PATIENCE = 0.4  # seconds that a call may take without a bar
REDRAW = 0.2  # seconds between two updates in a notebook
NOTEBOOK_METADATA = {"interp": "progress"}  # of the outputs in a notebook, by which they can be left out of a file

_INSIDE: ContextVar[bool] = ContextVar("inside a call with progress", default=False)
_SHOWN: ContextVar[bool] = ContextVar("inside a call whose bar is shown", default=False)


def is_shown() -> bool:
    """Return whether a bar is shown at the moment."""
    return _SHOWN.get()


def _kernel_shell() -> Any:
    """Return IPython's shell if this process is the kernel of a notebook; else None."""
    if "ipykernel" not in sys.modules or "IPython" not in sys.modules:
        return None
    shell = sys.modules["IPython"].get_ipython()
    return shell if hasattr(shell, "kernel") else None


def import_tqdm_quietly() -> None:
    """In a kernel, import tqdm without its warning that ipywidgets is missing: our bars need none.

    tqdm warns once, when transformers or another library first imports it.
    """
    if "ipykernel" in sys.modules:
        with warnings.catch_warnings(), contextlib.suppress(ImportError):
            warnings.simplefilter("ignore")
            importlib.import_module("tqdm.auto")


def _is_interactive() -> bool:
    """Return whether stderr is a terminal, or the process is a Jupyter kernel."""
    return _kernel_shell() is not None or sys.stderr.isatty()


@contextmanager
def progress(title: str, total: float, show: bool | None = None) -> Iterator[Advance]:
    """Yield ``advance(n)``, which moves a bar by n of ``total``. n may be a fraction of a step.

        with progress("faithfulness", len(circuits), show_progress) as advance:
            for circuit in circuits:
                measure(circuit)
                advance(1)

    ``show``: whether a bar is shown; None: only on a terminal or in Jupyter; False also silences the bars of the calls
    inside. Calls of less than `PATIENCE` show none.
    """
    if total == 0 or _INSIDE.get() or (show is None and not _is_interactive()):
        yield lambda n: None
        return
    inside, shown = _INSIDE.set(True), _SHOWN.set(show is not False)
    try:
        if show is False:
            yield lambda n: None
        else:
            with (_notebook_bar if _kernel_shell() else _terminal_bar)(title, total) as advance:
                yield advance
    finally:
        _INSIDE.reset(inside)
        _SHOWN.reset(shown)


@contextmanager
def _terminal_bar(title: str, total: float) -> Iterator[Advance]:
    """Show a rich bar on stderr once the call has taken `PATIENCE`, whether or not it has moved by then."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    bar = Progress(*columns, console=Console(stderr=True, force_jupyter=False))
    task, done = bar.add_task(title, total=total), 0.0
    timer = threading.Timer(PATIENCE, bar.start)
    timer.daemon = True
    timer.start()

    def advance(n: float) -> None:
        nonlocal done
        done += n
        bar.update(task, completed=min(total, round(done, 6)))  # fractions add up to whole steps

    try:
        yield advance
    finally:
        timer.cancel()
        timer.join()  # either it has started the bar, or it never will
        if bar.live.is_started:
            bar.stop()


@contextmanager
def _notebook_bar(title: str, total: float) -> Iterator[Advance]:
    """Show a bar as one output that is updated: it needs no widgets and holds no escape codes."""
    from IPython.display import publish_display_data

    start = last = time.perf_counter()
    done, shown, name = 0.0, False, uuid.uuid4().hex

    def draw(line: str, bar: str) -> None:
        nonlocal shown
        data = {"text/plain": line, "text/html": f"{bar}<code>{escape(line)}</code>"}
        publish_display_data(data, NOTEBOOK_METADATA, transient={"display_id": name}, update=shown)
        shown = True

    def advance(n: float) -> None:
        nonlocal done, last
        done += n
        now = time.perf_counter()
        if now - last < (REDRAW if shown else PATIENCE):
            return
        last, spent = now, now - start
        left = f", about {_duration(spent * (total - done) / done)} left" if done > 0 else ""
        line = f"{title}: {min(total, round(done, 6)):.0f} of {total:.0f} in {_duration(spent)}{left}"
        draw(line, f'<progress max="{total:g}" value="{done:g}"></progress> ')

    try:
        yield advance
    finally:
        if shown:
            spent = _duration(time.perf_counter() - start)
            draw(f"{title}: {min(total, round(done, 6)):.0f} of {total:.0f} in {spent}", "")


def _duration(seconds: float) -> str:
    """Return seconds as ``7 s``, ``2:05`` or ``1:02:05``."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"
