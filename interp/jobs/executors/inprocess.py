"""Compute parts in this process, one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from interp.jobs.store import Store
from interp.jobs.work import Emit, Work, job_of
from interp.utils.threads import limit_threads


def run(
    store: Store, parts: range, emit: Emit, stopped: Callable[[], bool], *, threads: int | None = 1,
    models: dict[str, Any] | None = None, **_: Any,
) -> dict[int, str]:  # fmt: skip
    """Compute the parts; return those that were left, and why.

    ``models``: model objects to use instead of loading.
    """
    leases = store.leases()
    job = job_of(store, models=models) if models else job_of(store)
    work = Work(store, job, leases, emit, stopped)
    with limit_threads(threads):
        work.compute_parts(parts)
    leases.close()
    return work.left
