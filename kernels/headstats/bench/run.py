"""Measure the backends, and compare them with plain attention and their targets.

Run: python -m headstats.bench [--json FILE] [--quick] [--cases causal prefix costs gpu] [--threads 2]

The paths of a case run in turn in one process, and medians are compared. Peak memory is that of one call in a separate
process: the growth of the resident set since the inputs were created; on CUDA, of the memory that torch allocated.
Needs torch, and triton for the GPU cases, which run only if a GPU exists.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from headstats.bench.cases import KernelCase, SpeedTarget, costs_case, cpu_cases, gpu_cases, prefix_case, ready

SECONDS = 12.0  # time for the runs of one case, after the first run of each path
ROUNDS = (3, 25)  # fewest and most rounds
SLOW = 3.0  # seconds; a path that takes longer runs only twice
KINDS = ("causal", "prefix", "costs", "gpu")
Say = Callable[[str], None]


def cases(kinds: Sequence[str] = KINDS, quick: bool = False) -> list[KernelCase]:
    """Return the cases of these kinds; GPU cases only if a GPU exists.

    quick: only small sizes.
    """
    factories = {
        "causal": lambda: cpu_cases((512, 1024) if quick else (512, 1024, 2048, 4096, 8192)),
        "prefix": lambda: [prefix_case(8, 16, 256) if quick else prefix_case()],
        "costs": lambda: [costs_case(backend, 256 if quick else 2048) for backend in ("blocked", "compiled")],
        "gpu": lambda: gpu_cases((4096,) if quick else (4096, 8192, 16384, 32768)) if torch.cuda.is_available() else [],
    }
    if unknown := set(kinds) - set(factories):
        raise ValueError(f"no such cases: {', '.join(sorted(unknown))}; there are {', '.join(factories)}")
    return [case for kind in factories if kind in kinds for case in factories[kind]()]


def run(kinds: Sequence[str] = KINDS, quick: bool = False, threads: int = 2, say: Say = print) -> dict[str, Any]:
    """Measure, report each case when it is done, and return what --json writes."""
    to_measure, before = cases(kinds, quick), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result: dict[str, Any] = {"command": " ".join(["python -m headstats.bench", *sys.argv[1:]]), **machine()}
        say(", ".join(f"{name} {x}" for name, x in result.items() if name != "command"))
        if "gpu" in kinds and not torch.cuda.is_available():
            say("no CUDA device: cases for a GPU are not run")
        say(f"{len(to_measure)} cases, about {_minutes(to_measure):.0f} minutes")
        result["cases"] = []
        for case in to_measure:
            result["cases"].append(measure(case, quick, threads))
            say(table(result["cases"][-1]))
    finally:
        torch.set_num_threads(before)
    return result


def _minutes(to_measure: Sequence[KernelCase]) -> float:
    """Estimate the minutes that the cases take.

    The estimate uses the speed of the plain path per cell on a slow core, and the cost of starting.
    """
    runs = sum(SECONDS * 1.3 + 4 * len(c.paths) * c.memory + 10 * ("flex" in c.paths) for c in to_measure)
    eager = sum((c.rows * c.heads[0] * c.n**2) * 4e-8 * (2 + c.memory) for c in to_measure if "eager" in c.paths)
    return (runs + eager) / 60


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: processor, threads, versions."""
    versions = {}
    for name in ("torch", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), **gpu, "python": platform.python_version(),
            **versions}  # fmt: skip


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def measure(case: KernelCase, quick: bool, threads: int) -> dict[str, Any]:
    """Measure the times of all paths in turn, peak memory, and the targets.

    Peak memory is measured in a separate process for each path.
    """
    paths: dict[str, dict[str, Any]] = {}
    calls, inputs = {}, case.inputs()
    for path in case.paths:
        try:
            calls[path] = ready(case, path, inputs)
            paths[path] = {"seconds": [seconds(case, calls[path])]}  # the first run; dropped if there are more
        except Exception as error:  # a peer may fail in any way: report it, and go on with the others
            calls.pop(path, None)
            paths[path] = {"not_run": f"{type(error).__name__}: {str(error).splitlines()[0]}"[:300]}
    first = {path: paths[path]["seconds"][0] for path in calls}
    quickest = sum(x for x in first.values() if x <= SLOW)
    rounds = ROUNDS[0] if quick else min(max(int(SECONDS / max(quickest, 1e-9)), ROUNDS[0]), ROUNDS[1])
    for number in range(rounds):
        for path, call in calls.items():
            if first[path] <= SLOW or number == 0:
                paths[path]["seconds"].append(seconds(case, call))
    for path in calls:
        if first[path] <= SLOW:
            del paths[path]["seconds"][0]
        paths[path]["median_s"] = statistics.median(paths[path]["seconds"])
    del inputs, calls
    if case.memory:
        for path in first:
            paths[path] |= _memory_elsewhere(case, path, threads)
    return {"name": case.name, "paths": paths, "targets": [_judge(t, paths) for t in case.targets]}


def seconds(case: KernelCase, call: Callable[[], Any]) -> float:
    """Return the seconds of one call, including the end of GPU work."""
    start = time.perf_counter()
    result = call()
    if case.device == "cuda":
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _memory_elsewhere(case: KernelCase, path: str, threads: int) -> dict[str, Any]:
    """Return the peak MiB, or why it could not be measured.

    It is measured in a process that does nothing else.
    """
    code = "import sys; from headstats.bench import run as bench; bench.print_peak(*sys.argv[1:])"
    text = json.dumps(asdict(replace(case, targets=())))
    process = subprocess.run([sys.executable, "-c", code, text, path, str(threads)], capture_output=True, text=True)
    if process.returncode:
        return {"mib": None, "mib_not_measured": (process.stderr.strip().splitlines() or ["killed"])[-1][:300]}
    return {"mib": float(process.stdout.split()[-1])}


def print_peak(text: str, path: str, threads: str) -> None:
    """Print the peak memory; called in a separate process. text: the case as JSON."""
    torch.set_num_threads(int(threads))
    print(peak(KernelCase(**json.loads(text)), path))


def peak(case: KernelCase, path: str) -> float:
    """Return the MiB that preparing and running a path takes beyond its inputs.

    It is measured in this process; on CPU, only on Linux.
    """
    small = KernelCase("warm-up", (path,), 256, case.d, case.heads, case.rows, min(case.prefix, 64), case.device)
    ready(small, path, small.inputs())()  # libraries allocate their own memory at first use
    inputs = case.inputs()
    compiled = ready(case, path, inputs) if path == "flex" else None  # the memory of compiling is not counted

    def whole() -> None:
        (compiled or ready(case, path, inputs))()

    return _peak_cuda(whole) if case.device == "cuda" else _peak_resident(whole)


def _peak_cuda(call: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_resident(call: Callable[[], None]) -> float:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc: memory freed by the warm-up must not be reused
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field + ":")) / 1024


def _judge(target: SpeedTarget, paths: dict[str, dict[str, Any]]) -> dict[str, Any]:
    key = "median_s" if target.of == "seconds" else "mib"
    numbers = [None if x is None else paths.get(x, {}).get(key) for x in (target.path, target.minus, target.per)]
    description = (
        target.path + (f" less {target.minus}" if target.minus else "") + (f" / {target.per}" if target.per else "")
    )
    bound = f"<= {target.most:g}" if target.most is not None else f">= {target.least:g}"
    needed = (True, target.minus is not None, target.per is not None)
    if any(need and x is None for need, x in zip(needed, numbers, strict=True)) or numbers[2] == 0:
        return {"what": f"{description}, {target.of}", "bound": bound, "value": None, "met": None}
    own, minus, per = numbers
    assert own is not None
    value = (own - (minus or 0)) / (1 if per is None else per)
    met = value <= target.most if target.most is not None else value >= (target.least or 0)
    return {"what": f"{description}, {target.of}", "bound": bound, "value": value, "met": met}


def table(case: dict[str, Any]) -> str:
    """Format the result of a case as text. Ratios are to the first path that ran."""
    lines = ["", case["name"]]
    ran = [x["median_s"] for x in case["paths"].values() if "median_s" in x]
    for path, x in case["paths"].items():
        if "not_run" in x:
            lines.append(f"  {path:32} not run: {x['not_run']}")
            continue
        if "mib_not_measured" in x:
            lines.append(f"  {path:32} memory not measured: {x['mib_not_measured']}")
        mib = f" {x['mib']:9.1f} MiB" if x.get("mib") is not None else ""
        ratio = x["median_s"] / ran[0]
        lines.append(f"  {path:32} {x['median_s'] * 1e3:10.2f} ms {ratio:7.2f} x{mib}  ({len(x['seconds'])} runs)")
    for t in case["targets"]:
        value = "not measured" if t["value"] is None else f"{t['value']:.2f} {'met' if t['met'] else 'NOT MET'}"
        lines.append(f"  target: {t['what']} {t['bound']}: {value}")
    return "\n".join(lines)


def write(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m headstats.bench", description="Measure on this machine.")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs, to see whether it works")
    parser.add_argument("--cases", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, for what runs on the CPU")
    options = parser.parse_args()
    result = run(options.cases, options.quick, options.threads, say=lambda line: print(line, flush=True))
    if options.json:
        write(result, options.json)


if __name__ == "__main__":
    main()
