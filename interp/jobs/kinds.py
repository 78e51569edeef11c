"""The kinds of runs, and the class that computes the parts of each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from interp.errors import InterpError
from interp.jobs.job import Job, PartCheck, RunFiles

JOBS = {"sweep": "interp.sweep.effects_job:EffectsJob", "corpus": "interp.corpus.job:CorpusJob"}


def job_class(kind: str) -> Callable[..., Job]:
    """Return the class that computes a kind of run."""
    if kind not in JOBS:
        raise InterpError(f"this run is of a kind that this interp does not know: {kind!r}")
    module, _, name = JOBS[kind].partition(":")
    return getattr(importlib.import_module(module), name)


def part_check(kind: str, document: dict[str, Any], files: RunFiles) -> PartCheck | None:
    """Return the check of a part of a kind of run; None where the kind has none."""
    make = getattr(job_class(kind), "part_check", None) if kind in JOBS else None
    return make(document, files) if make is not None else None
