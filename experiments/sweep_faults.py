"""Kill a sweep fifty times at random, and compare it with an undisturbed run.

    python experiments/sweep_faults.py [--kills 50] [--seed 0] [--out experiments/results/sweep_faults.json]

Claim: a sweep that is killed and resumed writes the bytes of an undisturbed run. The sweep has a tiny random model in
float64 and two local workers. Each round starts a driver, waits a random time, and kills the driver, a worker, or all
of them with SIGKILL. At the end the bytes of every part must equal those of the undisturbed run.

Result (results/sweep_faults.json): identical after 50 kills (12 of the driver, 24 of a worker, 14 of all). Check on the
test: a run whose kills met no finished part proves nothing and is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import interp
from interp.doctor.families.text import tiny_hf
from interp.utils.provenance import now, versions

CONFIG = """
name = "faults"
examples_per_part = 1
[[models]]
load = "{model}"
dtype = "float64"
[[tasks]]
pairs = "pairs.jsonl"
require = 0
[[recipes]]
recipe = "patch"
[[recipes]]
recipe = "ablate"
using = "resample"
[[sites]]
sites = "z@each,resid_pre"
"""


def prepare(folder: Path, examples: int) -> Path:
    """Write a model, prompts and a sweep config into a folder."""
    tokenizer = interp.zoo.induction().bridge.tokenizer
    tiny_hf("llama").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    words = [w for w in tokenizer.convert_ids_to_tokens(range(5, 90)) if w.isalpha()]
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(examples):
        clean = list(rng.choice(words, 12))
        corrupt = [*clean[:3], str(rng.choice(words)), *clean[4:]]
        lines.append({"clean": " ".join(clean), "corrupt": " ".join(corrupt), "answer": words[0], "foil": words[1]})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = folder / "sweep.toml"
    config.write_text(CONFIG.format(model=folder / "model"))
    return config


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start a driver with two local workers."""
    command = [sys.executable, "-m", "interp.cli.main", "sweep", "run", str(config), "-o", str(out)]
    options = ["--executor", "local", "--workers", "2", "--log", "none"]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workers_of(driver: int) -> list[int]:
    """Return the process ids of the workers of a driver."""
    workers = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == driver:
            workers.append(int(stat.parent.name))
    return workers


def parts(root: Path) -> dict[str, bytes]:
    """Return the bytes of every part by file name."""
    return {p.name: p.read_bytes() for p in sorted((root / "parts").glob("*.parquet"))}


def kill_at_random(
    disturbed: interp.Sweep, config: Path, kills: int, dice: random.Random
) -> tuple[list[str], list[int]]:
    """Start and kill a run repeatedly; return targets and numbers of parts."""
    folder = config.parent / "disturbed"
    targets: list[str] = []
    parts_after: list[int] = []
    driver: subprocess.Popen[bytes] | None = None
    while len(targets) < kills:
        if driver is None or driver.poll() is not None:
            driver = start(config, folder)
            # delete some finished parts, so that there is work left to disturb
            finished = sorted((folder / "parts").glob("*.parquet"))
            for path in dice.sample(finished, min(len(finished), len(finished) * 2 // 3)):
                path.unlink()
        published, patience = len(parts(folder)), time.monotonic() + 60
        while len(parts(folder)) <= published and time.monotonic() < patience:
            time.sleep(0.05)  # models load first: a kill must happen while parts are being computed
        time.sleep(dice.uniform(0, 1.0))
        target = dice.choice(("driver", "worker", "worker", "all"))
        for pid in processes_to_kill(driver.pid, target, dice):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if target != "worker":
            driver.wait()
        targets.append(target)
        parts_after.append(len(parts(folder)))
        assert not disturbed.status().damaged, "a kill left a damaged part"
    if driver is not None and driver.poll() is None:
        driver.kill()
        driver.wait()
    return targets, parts_after


def processes_to_kill(driver: int, target: str, dice: random.Random) -> list[int]:
    """Return the process ids of the driver, of one worker, or of all."""
    workers = workers_of(driver)
    if target == "driver":
        return [driver]
    if target == "all":
        return [driver, *workers]
    return [dice.choice(workers)] if workers else []


def main() -> None:
    """Run the sweep undisturbed and disturbed, and compare the bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("experiments/results/sweep_faults.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(folder, options.examples)
        whole = interp.Sweep(config, folder / "whole")
        assert whole.run(executor="in-process", show="none").code == 0
        disturbed = interp.Sweep(config, folder / "disturbed")
        disturbed.create()
        targets, parts_after = kill_at_random(disturbed, config, options.kills, random.Random(options.seed))
        parts_before = len(parts(folder / "disturbed"))
        outcome = disturbed.run(executor="in-process", show="none")
        is_same = parts(folder / "disturbed") == parts(folder / "whole")
        result = {
            "kills": {t: targets.count(t) for t in ("driver", "worker", "all")}, "parts": outcome.parts,
            "parts_after_each_kill": parts_after, "parts_before_the_last_resume": parts_before, "code": outcome.code,
            "identical_to_the_undisturbed_run": is_same, "made": now(), "machine": platform.machine(),
            "versions": versions(),
        }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["kills"]), "identical:", is_same)
    assert is_same and outcome.code == 0 and max(parts_after) > 0, "the kills met no finished part"


if __name__ == "__main__":
    main()
