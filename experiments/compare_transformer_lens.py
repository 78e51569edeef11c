"""The README's table: patching sweeps against transformer_lens.patching, attention statistics against eager.

Run: python experiments/compare_transformer_lens.py [--json FILE] [--rounds 3] [--quick]

Alternating runs in one process; medians and their ratio are reported. Every sweep's cells are checked equal
(1e-4 logits) before its time counts. Peak memory is the growth of the process's resident set while the
statistics of one attention layer are computed, measured in a fresh process each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # transformer_lens.patching draws a bar

CLEAN = "When John and Mary went to the store, John gave a drink to"
PAIRS = {
    "differing late (second name swapped)": CLEAN.replace("store, John", "store, Mary"),
    "differing early (first name replaced)": CLEAN.replace("When John", "When Tom"),
}


def alternate(rounds: int, ours: Callable[[], Any], theirs: Callable[[], Any]) -> dict[str, Any]:
    """Two functions run in turn: medians of their seconds, the ratio theirs/ours, the largest gap of their results."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, function in (("ours", ours), ("theirs", theirs)):
            begun = time.perf_counter()
            results[name] = function()
            times[name].append(time.perf_counter() - begun)
    gap = float(abs(results["ours"] - results["theirs"]).max())
    assert gap < 1e-4, f"the sweeps disagree by {gap} logits"
    ours_s, theirs_s = (statistics.median(times[n]) for n in ("ours", "theirs"))
    return {"ours_s": ours_s, "theirs_s": theirs_s, "ratio": theirs_s / ours_s, "max_gap": gap, "raw": times}


def sweeps(rounds: int) -> list[dict[str, Any]]:
    """resid_pre by layer × position and z by layer × head, one 15-token pair, against transformer_lens.patching."""
    import numpy as np
    import torch
    from transformer_lens import patching

    import interp

    model = interp.load("smollm2")
    answer, foil = (model.coder.continuation(t)[0] for t in (" Mary", " John"))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, answer] - logits[0, -1, foil]

    rows = []
    for what, corrupt in PAIRS.items():
        pair = interp.PromptPair(CLEAN, corrupt, " Mary", " John")
        tokens = model.bridge.to_tokens(corrupt)
        with torch.no_grad():
            _, cache = model.run_with_cache(model.bridge.to_tokens(CLEAN))
        for component, loop in (
            ("resid_pre", patching.get_act_patch_resid_pre),
            ("z", patching.get_act_patch_attn_head_out_all_pos),
        ):
            sites = model.sites(component)

            def ours(sites=sites, pair=pair) -> np.ndarray:
                return interp.patch(model, pair, sites).frame()["patched"].to_numpy()

            @torch.no_grad()
            def theirs(loop=loop, tokens=tokens, cache=cache) -> np.ndarray:
                return loop(model.bridge, tokens, cache, metric).numpy().ravel()

            ours()  # warm up
            row = {"sweep": component, "pair": what, "cells": len(ours()), "tokens": tokens.shape[1]}
            rows.append(row | alternate(rounds, ours, theirs))
            print(f"{component:10} {what:40} {rows[-1]['ratio']:6.1f}×", flush=True)
    return rows


STATS = """
import resource, sys, threading, time, torch
torch.set_num_threads(2); torch.manual_seed(0)
n, how = int(sys.argv[1]), sys.argv[2]
q, k, v = (torch.randn(1, h, n, 64) for h in (9, 3, 3))
import headstats
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize() / 2**20
headstats.attend(q[:, :, :64], k[:, :, :64], v[:, :, :64], backend=how)
base, peak, stop = resident(), [0.0], False
def watch():
    while not stop: peak[0] = max(peak[0], resident()); time.sleep(0.001)
thread = threading.Thread(target=watch); thread.start()
begun = time.perf_counter()
headstats.attend(q, k, v, backend=how)
seconds = time.perf_counter() - begun
stop = True; thread.join()
print(seconds, max(peak[0], resident()) - base)
"""


def statistics_rows(rounds: int, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    """Default statistics of one layer (9 heads, 3 KV heads, 64 wide, causal, float32): blocked against eager."""
    rows = []
    for n in lengths:
        measured: dict[str, list[list[float]]] = {"blocked": [], "reference": []}
        for _ in range(rounds):
            for how, found in measured.items():
                done = subprocess.run([sys.executable, "-c", STATS, str(n), how], capture_output=True, text=True)
                found.append([float(x) for x in done.stdout.split()])
        blocked, eager = ([statistics.median(c) for c in zip(*measured[h], strict=True)] for h in measured)
        rows.append(
            {"tokens": n, "ours_s": blocked[0], "theirs_s": eager[0], "ratio": eager[0] / blocked[0],
             "ours_mib": blocked[1], "theirs_mib": eager[1], "raw": measured}
        )  # fmt: skip
        print(
            f"statistics {n:6} tokens {rows[-1]['ratio']:6.1f}×  {blocked[1]:.0f} MiB against {eager[1]:.0f}",
            flush=True,
        )
    return rows


def main() -> None:
    """Measure, print, and write the raw numbers if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="leave the 8,192-token statistics out")
    options = parser.parse_args()
    import torch

    from interp.provenance import now, versions

    torch.set_num_threads(2)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "made": now(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "sweeps": sweeps(options.rounds),
        "statistics": statistics_rows(options.rounds, (2048,) if options.quick else (2048, 8192)),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
