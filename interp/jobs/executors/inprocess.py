"""In this process: one part after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from interp.jobs.store import Store
from interp.jobs.work import Emit, Work, job_of


def run(
    store: Store, parts: range, emit: Emit, stopped: Callable[[], bool], *, threads: int | None = 1,
    models: dict[str, Any] | None = None, **_: Any,
) -> dict[int, str]:  # fmt: skip
    """Work through the parts; returns those that were left, and why. ``models``: objects in place of loading."""
    leases = store.leases()
    job = job_of(store, models=models) if models else job_of(store)
    work = Work(store, job, leases, emit, stopped)
    with _threads(threads):
        work.through(parts)
    leases.close()
    return work.left


@contextlib.contextmanager
def _threads(n: int | None) -> Iterator[None]:
    if n is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
