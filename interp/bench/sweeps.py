"""Time interp's sweeps next to other libraries'.

Measured are seconds per cell, alternating in one process, once the numbers agree.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from json import dumps, loads
from pathlib import Path
from typing import Any

import numpy as np
import torch

from interp.bench.cases import NAMES, SweepCase, Workbench, cases
from interp.bench.peers import OPTIONAL, DenseHooks, HuggingFace, NNsight, OneByOne, Pyvene, TransformerLens, missing
from interp.engine.matmul import PLAIN, Products, choose_products
from interp.errors import InterpError
from interp.utils.files import result_file
from interp.utils.provenance import now, versions

TOLERANCE = 1e-4  # logits, or probability
SLOW, LONG = 20.0, 60.0  # from so many seconds on a library runs at most twice, and interp once
Say = Callable[[str], None]


def workbench(seed: int = 0) -> tuple[Workbench, Any]:
    """Load the embedded model three times, and its tokenizer.

    The three are interp's Model, the plain model and TransformerLens' bridge.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from interp.model.embedded import embedded_model
    from interp.model.load_model import load as load_model
    from interp.model.loading import boot

    folder = embedded_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    bridge = boot(load(), bos=True, tokenizer=tokenizer).bridge
    bridge.eval()
    return Workbench(load_model("smollm2"), load(), bridge, seed), tokenizer


def run(
    names: Sequence[str] = NAMES, rounds: int = 3, threads: int = 2, json: Path | None = None, say: Say = print
) -> dict[str, Any]:
    """Measure the named cases.

    Reports each with ``say`` and writes all to ``json`` as they finish.
    """
    if wrong := set(names) - set(NAMES):
        raise InterpError(f"no such cases: {', '.join(sorted(wrong))}; there are {', '.join(NAMES)}")
    if rounds < 1 or threads < 1:
        raise InterpError(f"rounds={rounds}, threads={threads}: at least 1 expected")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bench, tokenizer = workbench()
        result: dict[str, Any] = {
            "made": now(),
            "machine": f"{platform.machine()}, {threads} threads",
            "versions": versions() | _version("nnsight") | _version("pyvene"),
            "model": repr(bench.model),
            "products_gflops": rates(bench.model.d_model),
            "cases": [],
        }
        say(f"{result['model']}; {result['machine']}; matrix products: " + _rates(result["products_gflops"]))
        for why in filter(None, map(missing, OPTIONAL)):
            say(f"not measured: {why}")
        peers = peers_of(bench, tokenizer)
        builders = cases(bench)
        for name in names:
            timings = measure(builders[name](), peers, rounds, result["products_gflops"])
            result["cases"].append({**timings, **{k: result[k] for k in ("made", "machine", "versions")}})
            say(table(result["cases"][-1]))
            if json:
                write(result, json)
        return result
    finally:
        torch.set_num_threads(before)


def peers_of(bench: Workbench, tokenizer: Any) -> dict[type, Any]:
    """The installed other libraries, ready to sweep."""
    hf = HuggingFace(bench.hf)
    makers: dict[type, Callable[[], Any]] = {
        TransformerLens: lambda: TransformerLens(bench.bridge, hf), HuggingFace: lambda: hf,
        OneByOne: lambda: OneByOne(bench.hf), DenseHooks: lambda: DenseHooks(bench.hf),
        NNsight: lambda: NNsight(hf, tokenizer), Pyvene: lambda: Pyvene(hf),
    }  # fmt: skip
    return {kind: make() for kind, make in makers.items() if missing(kind) is None}


def measure(case: SweepCase, peers: dict[type, Any], rounds: int, peaks: dict[str, float]) -> dict[str, Any]:
    """Time one case.

    Raises InterpError if a library's numbers differ from interp's by more than `TOLERANCE`.
    """
    plan, before = case.plan(), _memory("VmRSS", reset=True)
    first, frame = _timed(case.ours)  # includes the engine's check, once per model
    ours, rss = case.order(frame), {"before": before, "peak": _memory("VmHWM")}
    used = {kind: peers[kind] for kind in case.peers if kind in peers}
    seconds: dict[str, list[float]] = {"interp": [], **{p.name: [] for p in used.values()}}
    gaps: dict[str, float] = {}
    if first > SLOW:  # so long a run needs no warm-up
        seconds["interp"].append(first)
    for _ in range(rounds):
        if first <= LONG and (len(seconds["interp"]) < 2 or seconds["interp"][0] < SLOW):
            seconds["interp"].append(_timed(case.ours)[0])
        for peer in used.values():
            if len(seconds[peer.name]) >= 2 and seconds[peer.name][0] > SLOW:
                continue
            took, values = _timed(lambda peer=peer: [peer.sweep(part.job) for part in case.parts])
            means = np.concatenate([v.reshape(-1, p.samples).mean(1) for v, p in zip(values, case.parts, strict=True)])
            gaps[peer.name] = float(abs(means - ours[[i for p in case.parts for i in p.rows]]).max())
            if not gaps[peer.name] < TOLERANCE:
                raise InterpError(f"{case.name}: interp and {peer.name} disagree by {gaps[peer.name]:.1e}")
            seconds[peer.name].append(took)
    n_peer_cells = sum(len(p.rows) * p.samples for p in case.parts)
    cells = {"interp": len(ours) * case.samples, **{p.name: n_peer_cells for p in used.values()}}
    paths = {
        name: {"seconds": s, "median_s": statistics.median(s), "cells": cells[name],
               "ms_a_cell": 1e3 * statistics.median(s) / cells[name], "max_gap": gaps.get(name)}
        for name, s in seconds.items()
    }  # fmt: skip
    interp_ms = paths["interp"]["ms_a_cell"]
    targets = {
        used[kind].name: {"at_least": bound, "ratio": paths[used[kind].name]["ms_a_cell"] / interp_ms}
        for kind, bound in case.targets.items() if kind in used
    }  # fmt: skip
    return {
        "name": case.name, "made": now(), "products_gflops": peaks,
        "tokens": case.tokens, "differ_from": case.differ, "note": case.note,
        "gflop": plan.flops / 1e9, "naive_gflop": next(iter(plan.steps.values())) / 1e9,
        "bound_s": {name: plan.flops / 1e9 / rate for name, rate in peaks.items()},
        "gflops": plan.flops / 1e9 / paths["interp"]["median_s"],
        "memory_mb": (plan.runs_bytes + plan.batch_bytes) / 1e6, "rss_mb": rss,
        "paths": paths, "targets": targets,
        "not_measured": {kind.name: missing(kind) for kind in case.peers if kind not in peers},
    }  # fmt: skip


def _memory(field: str, reset: bool = False) -> float | None:
    """Linux' figure of this process's memory in MB.

    ``field``: VmRSS (now) or VmHWM (the maximum since ``reset``).
    """
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(field)), None)


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


@torch.no_grad()
def rates(d_model: int) -> dict[str, float]:
    """GFLOP/s of a large float32 product: PyTorch's own and the engine's."""
    x, weight = torch.randn(2048, d_model), torch.randn(4 * d_model, d_model)

    def rate(products: Products) -> float:
        times = sorted(_timed(lambda: products.linear(x, weight))[0] for _ in range(15))
        return 2 * x.shape[0] * weight.numel() / times[len(times) // 2] / 1e9

    return {"torch": rate(PLAIN), "engine": rate(choose_products(x.dtype, x.device))}


def _rates(peaks: dict[str, float]) -> str:
    return ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in peaks.items())


def _version(package: str) -> dict[str, str]:
    from importlib import metadata

    try:
        return {package: metadata.version(package)}
    except metadata.PackageNotFoundError:
        return {}


def table(case: dict[str, Any]) -> str:
    """Write the timings of a case as text."""
    interp_ms = case["paths"]["interp"]["ms_a_cell"]
    lines = ["", f"{case['name']}: {case['tokens']} tokens, differing from token {case['differ_from']}"]
    lines += [f"  ({case['note']})"] if case["note"] else []
    for name, path in case["paths"].items():
        lines.append(
            f"  {name:36} {path['median_s']:8.2f} s {path['cells']:7} cells {path['ms_a_cell']:9.3f} ms a cell "
            f"{path['ms_a_cell'] / interp_ms:7.1f} ×"
        )
    lines += [f"  {name:36} not measured: {why}" for name, why in case["not_measured"].items()]
    bound = case["bound_s"]
    lines.append(
        f"  {case['gflop']:.0f} GFLOP of {case['naive_gflop']:.0f}: at best {bound['engine']:.2f} s at the engine's "
        f"products' rate ({bound['torch']:.2f} s at torch's); reached {case['gflops']:.0f} GFLOP/s"
    )
    rss = case["rss_mb"]
    if rss["peak"]:
        lines.append(f"  resident memory of the process: {rss['before']:.0f} MB before, {rss['peak']:.0f} MB at most")
    for name, t in case["targets"].items():
        met = "met" if t["ratio"] >= t["at_least"] else "NOT MET"
        lines.append(f"  target: {t['at_least']:g} × over {name}: {t['ratio']:.1f} × {met}")
    return "\n".join(lines)


def write(result: dict[str, Any], path: Path) -> None:
    """Write the result as JSON; cases in the file that were not measured again stay."""
    if path.exists():
        measured = {c["name"] for c in result["cases"]}
        earlier = loads(path.read_text())
        unchanged = [c for c in earlier["cases"] if c["name"] not in measured]
        result = {**result, "cases": unchanged + result["cases"]}
    with result_file(path) as file:
        file.write(f"{dumps(result, indent=1)}\n".encode())
