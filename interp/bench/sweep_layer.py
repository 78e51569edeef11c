"""What the sweep layer costs, and what it reaches: over the engine, by workers, by rows, by parts, by documents."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

from interp.errors import InterpError
from interp.provenance import now, versions

Say = Callable[[str], None]
CONFIG: dict[str, Any] = {
    "name": "bench", "models": [{"load": "smollm2"}], "recipes": [{"recipe": "patch"}],
    "sites": [{"sites": "z"}], "examples_per_part": 4, "tasks": [{"task": "ioi", "n": 8}],
}  # fmt: skip
ROWS, ROWS_PER_PART = 10_000_000, 100_000
PARTS = 10_000


def overhead(say: Say, rounds: int = 3) -> dict[str, Any]:
    """Two parts of four pairs each, every head: `interp.patch` on these pairs, and the sweep, in turn; one thread."""
    import torch

    import interp

    torch.set_num_threads(1)
    model = interp.load("smollm2")
    pairs = interp.tasks.ioi(model, n=8, seed=0)
    sites = model.sites("z")
    interp.patch(model, pairs[:1], model.sites("z", layers=29))  # what is done once
    engine, layer = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        for some in (pairs[:4], pairs[4:]):
            interp.patch(model, some, sites, show_progress=False)
        engine.append(time.perf_counter() - start)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            sweep = interp.Sweep(CONFIG, Path(folder) / "run", models={"smollm2": model})
            assert sweep.run(show="none").code == 0
            layer.append(time.perf_counter() - start)
    pairwise = [b / a - 1 for a, b in zip(engine, layer, strict=True)]
    cells = 8 * len(sites)
    middle = statistics.median(pairwise)
    say(f"overhead: {middle:.2%} over the engine ({cells} cells, {statistics.median(engine):.1f} s)")
    return {"engine_seconds": engine, "sweep_seconds": layer, "overhead": middle, "cells": cells}


def workers(say: Say, executor: str = "local", parts: int = 8) -> dict[str, Any]:
    """The same sweep with one worker of one thread and with two; from the first part's start to the end."""
    import interp

    found: dict[str, Any] = {}
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            config = {**CONFIG, "examples_per_part": 2, "tasks": [{"task": "ioi", "n": 2 * parts}]}
            sweep = interp.Sweep(config, Path(folder) / "run")
            command = [sys.executable, "-m", "interp.cli", "sweep", "resume", str(sweep.root), "--log", "json"]
            sweep.create()
            process = subprocess.Popen(
                [*command, "--executor", executor, "--workers", str(n)], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None
            events = [(time.perf_counter(), json.loads(line)) for line in process.stdout]
            assert process.wait() == 0
        done = [(t, e) for t, e in events if e["event"] == "done"]
        first = [min(t for t, e in done if e["worker"] == w) for w in sorted({e["worker"] for _, e in done})]
        # each worker's first part holds its loading; what follows is the pace
        steady = sum(1 for t, _ in done if t > max(first)) / (done[-1][0] - max(first))
        whole = len(done) / (done[-1][0] - events[0][0])
        found[str(n)] = {"parts_per_second": steady, "parts_per_second_with_start": whole, "parts": len(done)}
    ratio = found["2"]["parts_per_second"] / found["1"]["parts_per_second"]
    say(f"{executor}: two workers are {ratio:.2f}× one once loaded")
    return {**found, "ratio": ratio}


def rows(say: Say) -> dict[str, Any]:
    """Ten million rows of one sweep's shape, as parts: bytes on disk, and the time of a layer × head table."""
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
            store.commit(part.number, table_of(_made_up(rng, part.number), {**labels, "part": part.number}), 0, {}, {})
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


def _made_up(rng: np.random.Generator, example: int) -> pd.DataFrame:
    """Cells of one example as a float32 model gives them: z, layer × head × position."""
    at = np.arange(ROWS_PER_PART)
    clean, corrupt = rng.normal(4, 1), rng.normal(-4, 1)
    patched = (corrupt + rng.normal(0, 0.3, ROWS_PER_PART)).astype(np.float32).astype(float)
    return pd.DataFrame({
        "example": example, "component": "z", "layer": at // 9 % 30, "head": at % 9, "position": at // 270,
        "token": [f" token{i % 40}" for i in at // 270], "role": "", "intervention": "patch", "mode": "denoise",
        "metric": "logit_diff", "clean": np.float32(clean), "corrupt": np.float32(corrupt), "patched": patched,
        "effect": (patched - corrupt) / (clean - corrupt), "raw": patched - corrupt,
    })  # fmt: skip


class _Nothing:
    """A job whose parts are there at once, and which notes when the first one is asked for."""

    first: float | None = None

    def __init__(self, document: Any, shelf: Any):
        import pyarrow as pa

        self.table = pa.table({"x": [1.0]})

    def compute(self, part: int) -> Any:
        _Nothing.first = _Nothing.first or time.perf_counter()
        return SimpleNamespace(table=self.table, failed=0, about={}, note={})


def resume(say: Say) -> dict[str, Any]:
    """A run of 10,000 parts of which ten are missing: seconds from the start of a driver to the first part."""
    from interp.sweep import work
    from interp.sweep.drive import Options, drive
    from interp.sweep.store import Store

    work.JOBS["nothing"] = f"{__name__}:_Nothing"
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "run", "nothing", {"name": "nothing"}, PARTS, {}, "")
        job = _Nothing(None, None)
        start = time.perf_counter()
        for part in range(PARTS):
            if part % 1000 != 7:
                store.commit(part, job.table, 0, {}, {})
        committed = (time.perf_counter() - start) / PARTS
        _Nothing.first = None
        start = time.perf_counter()
        outcome = drive(Store.open(store.root), Options(executor="in-process", show="none"))
        whole = time.perf_counter() - start
        assert outcome.code == 0 and _Nothing.first is not None
        found = _Nothing.first - start
    say(f"resume: {found:.2f} s to the first part of {PARTS:,}, {whole:.1f} s with every checksum")
    return {"parts": PARTS, "seconds_to_first": found, "seconds_with_checksums": whole, "commit_seconds": committed}


def corpus(say: Say) -> dict[str, Any]:
    """Peak memory of a process that takes statistics over 1, 100 and 10,000 documents, of a tiny random model."""
    peaks = {}
    for n in (1, 100, 10_000):
        code = f"from {__name__} import _corpus; _corpus({n})"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks[n] = int(done.stdout.split()[-1])
        say(f"corpus: {n:,} documents, peak {peaks[n] / 2**20:.0f} MiB")
    return {"peak_bytes": peaks, "growth": peaks[10_000] / peaks[100]}


def _corpus(n: int) -> None:
    import interp
    from interp import corpus as measured
    from interp.zoo.architectures import tiny_hf
    from interp.zoo.known import induction

    hf = tiny_hf("llama")
    words = induction().bridge.tokenizer
    model = interp.load(hf.float(), tokenizer=words)
    with tempfile.TemporaryDirectory() as folder:
        text = " ".join(words.convert_ids_to_tokens(range(5, 60)))
        (Path(folder) / "docs.txt").write_text(f"{text}\n" * n)
        options = {"bytes_per_part": 2**15, "executor": "in-process", "show": "none"}
        found = measured.statistics(model, Path(folder) / "docs.txt", Path(folder) / "run", context=32, **options)
        assert found.documents == n
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


CASES: dict[str, Callable[[Say], dict[str, Any]]] = {
    "overhead": overhead, "local": workers, "ray": lambda say: workers(say, "ray"), "rows": rows, "resume": resume,
    "corpus": corpus,
}  # fmt: skip


def run(names: Sequence[str], json_file: Path | None, say: Say = print) -> dict[str, Any]:
    """Measure the named cases, saying each and writing all to ``json_file``; cases that it has from before stay."""
    if wrong := set(names) - set(CASES):
        raise InterpError(f"no such cases: {', '.join(sorted(wrong))}; there are {', '.join(CASES)}")
    result: dict[str, Any] = {}
    if json_file and json_file.exists():
        result = json.loads(json_file.read_text())
    for name in names:
        found = CASES[name](say)
        result[name] = {**found, "made": now(), "machine": platform.machine(), "versions": versions()}
        if json_file:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(result, indent=1) + "\n")
    return result
