"""Python's garbage collector, kept from looking where there is no garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Importing and loading make a million objects, which stay; looking through them for garbage takes a third of it.

    At the end they are handed to the collector as old ones, which it need not look through at once.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.freeze()
            gc.unfreeze()  # back from the permanent generation into the oldest
            gc.enable()
