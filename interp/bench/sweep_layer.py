"""Measure the sweep layer.

The cases are its cost over the engine, and its scaling in workers, rows, parts and documents.
"""

from __future__ import annotations

import functools
import gc
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd

from interp.errors import InterpError
from interp.utils.files import result_file
from interp.utils.provenance import now, versions

Say = Callable[[str], None]
CONFIG: dict[str, Any] = {
    "name": "bench", "models": [{"load": "smollm2"}], "recipes": [{"recipe": "patch"}],
    "sites": [{"sites": "z"}], "examples_per_part": 4, "tasks": [{"task": "ioi", "n": 8}],
}  # fmt: skip
ROWS, ROWS_PER_PART = 10_000_000, 100_000
PARTS = 10_000


def overhead(say: Say, pairs: int = 32) -> dict[str, Any]:
    """Compare the sweep of `interp sweep init` with its recipes called by hand.

    Both use the same pairs and one thread. Both sides make the pairs, and start with a loaded model that the engine has
    checked. The sweep's side includes all that its users get: the check that the model does the task, the run
    directory, every part synced. The calls by hand run before and after the sweep; their mean counts. Reported
    separately: the seconds before the first part, which a run spends once, and the share of a part's time outside its
    recipe.
    """
    import tomllib

    import torch

    from interp.model.load_model import load
    from interp.recipes.ablation import ablate
    from interp.recipes.patching import patch
    from interp.sweep.api import Sweep
    from interp.sweep.template import sweep_template
    from interp.tasks.indirect_object import ioi

    config = tomllib.loads(sweep_template())
    config["tasks"][0]["n"] = pairs
    torch.set_num_threads(1)
    model = load("smollm2")
    sites = model.sites("z")

    def by_hand(n: int, z_sites: Any) -> int:
        task_pairs = ioi(model, n=n, seed=0)
        patched = patch(model, task_pairs, z_sites, mode="denoise", show_progress=False)
        return len(patched) + len(ablate(model, task_pairs, z_sites, using="mean", show_progress=False))

    by_hand(2, model.sites("z", layers=29))  # work that is done once per process
    engine = []

    def time_by_hand() -> int:
        start = time.perf_counter()
        n = by_hand(pairs, sites)
        engine.append(time.perf_counter() - start)
        return n

    cells = time_by_hand()
    spans: list[tuple[float, float]] = []  # of the recipes' calls
    with tempfile.TemporaryDirectory() as folder, _recipes_timed(spans):
        start = time.perf_counter()
        sweep = Sweep(config, Path(folder) / "run", models={"smollm2": model})
        outcome = sweep.run(show="none")
        layer = time.perf_counter() - start
        assert outcome.code == 0 and outcome.rows == cells
    time_by_hand()
    ratio = layer / statistics.mean(engine) - 1
    once = spans[0][0] - start
    outside = [b - a for (_, a), (b, _) in itertools.pairwise([*spans, (start + layer, 0.0)])]
    share = statistics.median(outside) * len(spans) / sum(b - a for a, b in spans)
    say(
        f"overhead: {ratio:.2%} over the engine ({cells} cells, {statistics.mean(engine):.1f} s): {once:.2f} s once, "
        f"and {share:.2%} of each part"
    )
    return {
        "cells": cells, "engine_seconds": engine, "sweep_seconds": layer, "overhead": ratio, "pairs": pairs,
        "once_seconds": once, "parts": len(spans), "part_seconds": outside, "part_share": share,
        "recipe_seconds": sum(b - a for a, b in spans),
    }  # fmt: skip


@contextmanager
def _recipes_timed(spans: list[tuple[float, float]]) -> Iterator[None]:
    """Append the start and end of each recipe call in the block to ``spans``."""
    from interp.sweep import effects_job

    call_of = effects_job.call_of

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            effects = function(*args, **options)
            spans.append((start, time.perf_counter()))
            return effects

        return call

    def timed_call_of(*args: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
        recipe, arguments = call_of(*args)
        return timed(recipe), arguments

    with mock.patch.object(effects_job, "call_of", timed_call_of):
        yield


def workers(say: Say, executor: str = "local", parts: int = 8) -> dict[str, Any]:
    """Run the same sweep with one worker of one thread and with two.

    The time is from the first part's start to the end.
    """
    from interp.sweep.api import Sweep

    rates: dict[str, Any] = {}
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            config = {**CONFIG, "examples_per_part": 2, "tasks": [{"task": "ioi", "n": 2 * parts}]}
            sweep = Sweep(config, Path(folder) / "run")
            command = [sys.executable, "-m", "interp.cli.main", "sweep", "resume", str(sweep.root), "--log", "json"]
            sweep.create()
            start = time.perf_counter()
            process = subprocess.Popen(
                [*command, "--executor", executor, "--workers", str(n)], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            events = [(time.perf_counter(), json.loads(line)) for line in process.stdout]
            assert process.wait() == 0
        done = [(t, e) for t, e in events if e["event"] == "done"]
        first = [min(t for t, e in done if e["worker"] == w) for w in sorted({e["worker"] for _, e in done})]
        # each worker's first part includes loading; the parts after it show the rate
        steady = sum(1 for t, _ in done if t > max(first)) / (done[-1][0] - max(first))
        whole = len(done) / (done[-1][0] - start)
        rates[str(n)] = {"parts_per_second": steady, "parts_per_second_with_start": whole, "parts": len(done)}
    ratio = rates["2"]["parts_per_second"] / rates["1"]["parts_per_second"]
    say(f"{executor}: two workers are {ratio:.2f}× one once loaded")
    return {**rates, "ratio": ratio}


def rows(say: Say) -> dict[str, Any]:
    """Write ten million rows of a sweep's shape as parts.

    Measures bytes on disk and the time of a layer × head table.
    """
    from interp.sweep.api import Sweep
    from interp.sweep.table import table_of

    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(
            {**CONFIG, "examples_per_part": 1, "tasks": [{"task": "ioi", "n": ROWS // ROWS_PER_PART}],
             "sites": [{"sites": "z@each"}]}, Path(folder) / "run",
        )  # fmt: skip
        store = sweep.create()
        rng = np.random.default_rng(0)
        start = time.perf_counter()
        for part in sweep.config.parts:
            labels = dict(zip(("model", "task", "recipe", "sites", "seed"), part.combination, strict=True))
            store.commit(
                part.number, table_of(_synthetic_cells(rng, part.number), {**labels, "part": part.number}), 0, {}, {}
            )
        written = time.perf_counter() - start
        size = sum(p.stat().st_size for p in (store.root / "parts").iterdir())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            table = sweep.table(by=["layer", "head"])
            times.append(time.perf_counter() - start)
        assert int(table["n"].to_numpy().sum()) == ROWS
    say(f"rows: {ROWS:,} in {size / 1e6:.0f} MB, written in {written:.0f} s; layer × head in {min(times):.2f} s")
    return {"rows": ROWS, "bytes": size, "write_seconds": written, "table_seconds": times, "table_rows": len(table)}


def _synthetic_cells(rng: np.random.Generator, example: int) -> pd.DataFrame:
    """Synthetic cells of one example: z, layer × head × position, in float32."""
    at = np.arange(ROWS_PER_PART)
    clean, corrupt = rng.normal(4, 1), rng.normal(-4, 1)
    patched = (corrupt + rng.normal(0, 0.3, ROWS_PER_PART)).astype(np.float32).astype(float)
    return pd.DataFrame({
        "example": example, "component": "z", "layer": at // 9 % 30, "head": at % 9, "position": at // 270,
        "token": [f" token{i % 40}" for i in at // 270], "role": "", "intervention": "patch", "mode": "denoise",
        "metric": "logit_diff", "clean": np.float32(clean), "corrupt": np.float32(corrupt), "patched": patched,
        "effect": (patched - corrupt) / (clean - corrupt), "raw": patched - corrupt,
    })  # fmt: skip


class _EmptyJob:
    """A job whose parts take no time; it notes when the first one is computed."""

    first: float | None = None

    def __init__(self, document: Any, shelf: Any):
        import pyarrow as pa

        self.table = pa.table({"x": [1.0]})

    def compute(self, part: int) -> Any:
        _EmptyJob.first = _EmptyJob.first or time.perf_counter()
        return SimpleNamespace(table=self.table, failed=0, about={}, note={})


def resume(say: Say) -> dict[str, Any]:
    """Resume a run of 10,000 parts without ten of them, then verify and export it.

    Measures seconds from the driver's start to the first part, and of each of three checks of every part and exports.
    """
    from interp.jobs import kinds
    from interp.jobs.audit import Audit
    from interp.jobs.driver import Options, drive
    from interp.jobs.store import Store
    from interp.sweep.export import export

    kinds.JOBS["nothing"] = f"{__name__}:_EmptyJob"
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "run", "nothing", {"name": "nothing"}, PARTS, {}, "")
        job = _EmptyJob(None, None)
        start = time.perf_counter()
        for part in range(PARTS):
            if part % 1000 != 7:
                store.commit(part, job.table, 0, {}, {})
        committed = (time.perf_counter() - start) / PARTS
        _EmptyJob.first = None
        start = time.perf_counter()
        outcome = drive(Store.open(store.root), Options(executor="in-process", show="none"))
        whole = time.perf_counter() - start
        assert outcome.code == 0 and _EmptyJob.first is not None
        to_first = _EmptyJob.first - start
        store = Store.open(store.root)
        verify = [_seconds(lambda: list(Audit(store).failures(range(PARTS)))) for _ in range(3)]
        exports = [_seconds(lambda: export(store, Path(folder) / "table.parquet")) for _ in range(3)]
    say(
        f"resume: {to_first:.2f} s to the first part of {PARTS:,}, {whole:.1f} s with every checksum; verify "
        f"{statistics.median(verify):.1f} s, export {statistics.median(exports):.1f} s"
    )
    return {
        "parts": PARTS, "seconds_to_first": to_first, "seconds_with_checksums": whole, "commit_seconds": committed,
        "verify_seconds": verify, "export_seconds": exports,
    }  # fmt: skip


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def corpus(say: Say) -> dict[str, Any]:
    """Measure the memory of statistics over 1, 100 and 10,000 documents.

    Documents have 200 tokens, and the model is tiny and random. Each runs in a separate process that has processed a
    few documents before, so that the memory of loading and imports does not hide that of the stream: the peak since
    then, less what was resident then.
    """
    by_documents: dict[str, Any] = {}
    for n in (1, 100, 10_000):
        code = f"from {__name__} import _corpus; _corpus({n})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        by_documents[str(n)] = json.loads(done.stdout.splitlines()[-1])
        before, most = (by_documents[str(n)][k] / 2**20 for k in ("resident_bytes", "stream_bytes"))
        say(f"corpus: {n:,} documents, {most:.1f} MiB besides the {before:.0f} MiB of a process with the model")
    return by_documents


def _corpus(n: int) -> None:
    from interp.corpus import statistics as corpus_statistics
    from interp.doctor.families.text import tiny_hf
    from interp.model.load_model import load
    from interp.zoo.known import induction

    hf = tiny_hf("llama")
    words = induction().bridge.tokenizer
    model = load(hf.float(), tokenizer=words)
    text = " ".join(words.convert_ids_to_tokens([5 + i % 60 for i in range(200)]))
    options = {"bytes_per_part": 2**16, "executor": "in-process", "show": "none"}
    with tempfile.TemporaryDirectory() as folder:

        def measure(documents: int) -> None:
            data = Path(folder) / f"docs{documents}.txt"
            with open(data, "w") as file:
                file.writelines(f"{text}\n" for _ in range(documents))
            result = corpus_statistics(model, data, Path(folder) / f"run{documents}", context=64, **options)
            assert result.documents == documents

        measure(2 * 2**16 // len(text))  # two parts
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _status("VmRSS")
        measure(n)
        most = _status("VmHWM")
    print(json.dumps({"resident_bytes": before, "peak_bytes": most, "stream_bytes": max(0, most - before)}))


def _status(name: str) -> int:
    """Linux' figure of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


CASES: dict[str, Callable[[Say], dict[str, Any]]] = {
    "overhead": overhead, "local": workers, "ray": lambda say: workers(say, "ray"), "rows": rows, "resume": resume,
    "corpus": corpus,
}  # fmt: skip


def run(names: Sequence[str], json_file: Path | None, say: Say = print) -> dict[str, Any]:
    """Measure the named cases.

    Reports each with ``say`` and writes all to ``json_file``, whose other cases stay.
    """
    if wrong := set(names) - set(CASES):
        raise InterpError(f"no such cases: {', '.join(sorted(wrong))}; there are {', '.join(CASES)}")
    result: dict[str, Any] = {}
    if json_file and json_file.exists():
        result = json.loads(json_file.read_text())
    for name in names:
        measurement = CASES[name](say)
        result[name] = {**measurement, "made": now(), "machine": platform.machine(), "versions": versions()}
        if json_file:
            with result_file(json_file) as file:
                file.write(f"{json.dumps(result, indent=1)}\n".encode())
    return result
