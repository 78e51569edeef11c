"""Measure attention with statistics: the blocked backend against eager.

The documentation quotes the figures.

Run: python experiments/compare_eager.py [--json FILE] [--rounds 3] [--quick]

Figures are medians of runs, each in its own process. Peak memory is the growth of the process's resident set while the
statistics of one attention layer are computed. (For sweeps: `interp bench sweeps`.)

Result (results/compare_eager.json, two CPU cores, float32): at 2,048 tokens 0.14 s and 19 MiB against 1.14 s and
640 MiB; at 8,192 tokens 2.23 s and 65 MiB against 26.56 s and 10,151 MiB.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    """Measure the default statistics of one layer.

    The layer has 9 heads, 3 KV heads and head size 64; it is causal and in float32.
    """
    rows = []
    for n in lengths:
        measured: dict[str, list[list[float]]] = {"blocked": [], "reference": []}
        for _ in range(rounds):
            for how, runs in measured.items():
                done = subprocess.run([sys.executable, "-c", STATS, str(n), how], capture_output=True, text=True)
                runs.append([float(x) for x in done.stdout.split()])
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
    """Measure, print, and write the raw numbers if `--json` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="leave the 8,192-token statistics out")
    options = parser.parse_args()
    import torch

    from interp.utils.provenance import now, versions

    torch.set_num_threads(2)
    result = {
        "command": " ".join(["python", *sys.argv]),
        "made": now(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": versions(),
        "statistics": statistics_rows(options.rounds, (2048,) if options.quick else (2048, 8192)),
    }
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
