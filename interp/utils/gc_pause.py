"""Pause Python's garbage collector while many long-lived objects are made."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause garbage collection inside the block.

    Importing and loading make a million objects that stay; searching them for garbage takes a third of the time. At the
    end they are put into the collector's oldest generation, which it does not search at once.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.unfreeze()  # moves them from the permanent generation into the oldest
            gc.enable()
