"""Measures the backends beside plain attention, and holds them to their targets.

Run: python -m headstats.bench [--json FILE] [--quick] [--cases causal prefix costs gpu] [--threads 2]

The paths of a case run in turn in one process; what is compared is medians. Peak memory is that of one call in a
process of its own: growth of the resident set since the inputs were made, on CUDA of the memory that torch
allocated. Needs torch, and triton for the cases on a GPU, which run only where there is one.
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

from headstats.bench.cases import Case, Target, costs_case, cpu_cases, gpu_cases, prefix_case, ready

SECONDS = 12.0  # for the runs of one case, after the first of each path
ROUNDS = (3, 25)  # fewest and most
SLOW = 3.0  # a path that takes longer than this runs twice
KINDS = ("causal", "prefix", "costs", "gpu")
Say = Callable[[str], None]


def cases(kinds: Sequence[str] = KINDS, quick: bool = False) -> list[Case]:
    """The cases of these kinds, those for a GPU only where there is one. quick: small sizes alone."""
    made = {
        "causal": lambda: cpu_cases((512, 1024) if quick else (512, 1024, 2048, 4096, 8192)),
        "prefix": lambda: [prefix_case(8, 16, 256) if quick else prefix_case()],
        "costs": lambda: [costs_case(backend, 256 if quick else 2048) for backend in ("blocked", "compiled")],
        "gpu": lambda: gpu_cases((4096,) if quick else (4096, 8192, 16384, 32768)) if torch.cuda.is_available() else [],
    }
    if wrong := set(kinds) - set(made):
        raise ValueError(f"no such cases: {', '.join(sorted(wrong))}; there are {', '.join(made)}")
    return [case for kind in made if kind in kinds for case in made[kind]()]


def run(kinds: Sequence[str] = KINDS, quick: bool = False, threads: int = 2, say: Say = print) -> dict[str, Any]:
    """Measures, reporting each case as it is done; returns what --json writes."""
    chosen, before = cases(kinds, quick), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result: dict[str, Any] = {"command": " ".join(["python -m headstats.bench", *sys.argv[1:]]), **machine()}
        say(", ".join(f"{name} {x}" for name, x in result.items() if name != "command"))
        if "gpu" in kinds and not torch.cuda.is_available():
            say("no CUDA device: cases for a GPU are not run")
        say(f"{len(chosen)} cases, about {_minutes(chosen):.0f} minutes")
        result["cases"] = []
        for case in chosen:
            result["cases"].append(measure(case, quick, threads))
            say(table(result["cases"][-1]))
    finally:
        torch.set_num_threads(before)
    return result


def _minutes(chosen: Sequence[Case]) -> float:
    """A guess from how long the plain path of each case takes per cell on a slow core, and what starting costs."""
    most = sum(SECONDS * 1.3 + 4 * len(c.paths) * c.memory + 10 * ("flex" in c.paths) for c in chosen)
    eager = sum((c.rows * c.heads[0] * c.n**2) * 4e-8 * (2 + c.memory) for c in chosen if "eager" in c.paths)
    return (most + eager) / 60


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
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


def measure(case: Case, quick: bool, threads: int) -> dict[str, Any]:
    """Times of each path in alternation, peak memory of each in a process of its own, and the targets."""
    paths: dict[str, dict[str, Any]] = {}
    calls, inputs = {}, case.inputs()
    for path in case.paths:
        try:
            calls[path] = ready(case, path, inputs)
            paths[path] = {"seconds": [seconds(case, calls[path])]}  # the first run; dropped if there are others
        except Exception as error:  # a peer may fail in ways of its own: it is named, and the others go on
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
        found = paths[path]
        if first[path] <= SLOW:
            del found["seconds"][0]
        found["median_s"] = statistics.median(found["seconds"])
    del inputs, calls
    if case.memory:
        for path in first:
            paths[path] |= _memory_elsewhere(case, path, threads)
    return {"name": case.name, "paths": paths, "targets": [_judged(t, paths) for t in case.targets]}


def seconds(case: Case, call: Callable[[], Any]) -> float:
    """One call, to its end."""
    begun = time.perf_counter()
    result = call()
    if case.device == "cuda":
        torch.cuda.synchronize()
    done = time.perf_counter() - begun
    del result
    return done


def _memory_elsewhere(case: Case, path: str, threads: int) -> dict[str, Any]:
    """Peak MiB, from a process that does nothing else, or why it is not known."""
    code = "import sys; from headstats.bench import run as bench; bench.print_peak(*sys.argv[1:])"
    text = json.dumps(asdict(replace(case, targets=())))
    done = subprocess.run([sys.executable, "-c", code, text, path, str(threads)], capture_output=True, text=True)
    if done.returncode:
        return {"mib": None, "mib_not_measured": (done.stderr.strip().splitlines() or ["killed"])[-1][:300]}
    return {"mib": float(done.stdout.split()[-1])}


def print_peak(text: str, path: str, threads: str) -> None:
    """What the process for memory does: text is the case as JSON."""
    torch.set_num_threads(int(threads))
    print(peak(Case(**json.loads(text)), path))


def peak(case: Case, path: str) -> float:
    """MiB that preparing and running a path takes beyond its inputs, in this process. On CPU for Linux alone."""
    small = Case("warm-up", (path,), 256, case.d, case.heads, case.rows, min(case.prefix, 64), case.device)
    ready(small, path, small.inputs())()  # libraries make their own room at first use
    inputs = case.inputs()
    compiled = ready(case, path, inputs) if path == "flex" else None  # what compiling takes is not counted

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
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's: room that the warm-up left must not be used again
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(field + ":")) / 1024


def _judged(target: Target, paths: dict[str, dict[str, Any]]) -> dict[str, Any]:
    key = "median_s" if target.of == "seconds" else "mib"
    numbers = [None if x is None else paths.get(x, {}).get(key) for x in (target.path, target.minus, target.per)]
    what = target.path + (f" less {target.minus}" if target.minus else "") + (f" / {target.per}" if target.per else "")
    bound = f"<= {target.most:g}" if target.most is not None else f">= {target.least:g}"
    asked = (True, target.minus is not None, target.per is not None)
    if any(need and x is None for need, x in zip(asked, numbers, strict=True)) or numbers[2] == 0:
        return {"what": f"{what}, {target.of}", "bound": bound, "value": None, "met": None}
    own, minus, per = numbers
    assert own is not None
    value = (own - (minus or 0)) / (1 if per is None else per)
    met = value <= target.most if target.most is not None else value >= (target.least or 0)
    return {"what": f"{what}, {target.of}", "bound": bound, "value": value, "met": met}


def table(case: dict[str, Any]) -> str:
    """A case for people. The ratio is to the first path that ran."""
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
    """The result as JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m headstats.bench", description="Measure, on this machine.")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    parser.add_argument("--quick", action="store_true", help="small sizes and few runs: does it work?")
    parser.add_argument("--cases", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--threads", type=int, default=2, help="of torch, for what runs on the CPU")
    options = parser.parse_args()
    result = run(options.cases, options.quick, options.threads, say=lambda line: print(line, flush=True))
    if options.json:
        write(result, options.json)


if __name__ == "__main__":
    main()
