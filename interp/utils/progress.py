"""Progress bars with the remaining time, on stderr.

They are shown only on a terminal or in Jupyter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

Advance = Callable[[int], None]


def _is_interactive() -> bool:
    """Return whether stderr is a terminal, or the process is a Jupyter kernel."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


@contextmanager
def progress(title: str, total: int, show: bool | None = None) -> Iterator[Advance]:
    """Yield ``advance(n)``, which moves a rich bar by n of ``total``.

    ``show``: whether a bar is shown; None: only on a terminal or in Jupyter.
    """
    if not (_is_interactive() if show is None else show) or total == 0:
        yield lambda n: None
        return
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
    # a moving bar in Jupyter is a widget; without ipywidgets rich would warn at every sweep, so it prints a plain line
    jupyter = None if find_spec("ipywidgets") else False
    with Progress(*columns, console=Console(stderr=True, force_jupyter=jupyter)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)
