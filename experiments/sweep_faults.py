"""Kill a real sweep at random instants, fifty times, and compare what resuming gives with an undisturbed run.

    python experiments/sweep_faults.py [--kills 50] [--seed 0] [--out experiments/results/sweep_faults.json]

A tiny random model in float64, two local workers. Each round starts a driver, waits a random time, and kills with
SIGKILL the driver, a worker, or all of them. At the end every part's bytes must equal the undisturbed run's.
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
from interp.zoo.known import induction


def prepare(folder: Path, examples: int) -> Path:
    """A model, prompts and a config in a folder."""
    tokenizer = induction().bridge.tokenizer
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
    config.write_text(
        'name = "faults"\nexamples_per_part = 1\n[[models]]\nload = "'
        + str(folder / "model")
        + '"\ndtype = "float64"\n'
        '[[tasks]]\npairs = "pairs.jsonl"\nrequire = 0\n[[recipes]]\nrecipe = "patch"\n[[recipes]]\nrecipe = "ablate"\n'
        'using = "resample"\n[[sites]]\nsites = "z@each,resid_pre"\n'
    )
    return config


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    """A driver with two local workers."""
    command = [sys.executable, "-m", "interp.cli.main", "sweep", "run", str(config), "-o", str(out)]
    options = ["--executor", "local", "--workers", "2", "--log", "none"]
    return subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def workers_of(driver: int) -> list[int]:
    """Its child processes."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == driver:
            found.append(int(stat.parent.name))
    return found


def parts(root: Path) -> dict[str, bytes]:
    """Every part's bytes."""
    return {p.name: p.read_bytes() for p in sorted((root / "parts").glob("*.parquet"))}


def main() -> None:
    """See the module's first lines."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--kills", type=int, default=50)
    ask.add_argument("--examples", type=int, default=60)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--out", type=Path, default=Path("experiments/results/sweep_faults.json"))
    options = ask.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = prepare(folder, options.examples)
        whole = interp.Sweep(config, folder / "whole")
        assert whole.run(executor="in-process", show="none").code == 0
        disturbed = interp.Sweep(config, folder / "disturbed")
        disturbed.create()
        kills, per_round = [], []
        driver: subprocess.Popen[bytes] | None = None
        while len(kills) < options.kills:
            if driver is None or driver.poll() is not None:
                driver = start(config, folder / "disturbed")
                # so that there is something left to disturb, some finished parts are taken away again
                finished = sorted((folder / "disturbed" / "parts").glob("*.parquet"))
                for path in dice.sample(finished, min(len(finished), len(finished) * 2 // 3)):
                    path.unlink()
            published, patience = len(parts(folder / "disturbed")), time.monotonic() + 60
            while len(parts(folder / "disturbed")) <= published and time.monotonic() < patience:
                time.sleep(0.05)  # not while models load: a kill must find parts in hand
            time.sleep(dice.uniform(0, 1.0))
            what = dice.choice(("driver", "worker", "worker", "all"))
            below = workers_of(driver.pid)
            victims = (
                [driver.pid] if what == "driver" else [dice.choice(below)] if what == "worker" and below else below
            )
            victims = [driver.pid, *below] if what == "all" else victims
            for pid in victims:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            if what != "worker":
                driver.wait()
            kills.append(what)
            per_round.append(len(parts(folder / "disturbed")))
            assert not disturbed.status().damaged, "a kill left a damaged part"
        if driver is not None and driver.poll() is None:
            driver.kill()
            driver.wait()
        before = len(parts(folder / "disturbed"))
        outcome = disturbed.run(executor="in-process", show="none")
        same = parts(folder / "disturbed") == parts(folder / "whole")
        result = {
            "kills": {w: kills.count(w) for w in ("driver", "worker", "all")}, "parts": outcome.parts,
            "parts_after_each_kill": per_round, "parts_before_the_last_resume": before, "code": outcome.code,
            "identical_to_the_undisturbed_run": same, "made": now(), "machine": platform.machine(),
            "versions": versions(),
        }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["kills"]), "identical:", same)
    assert same and outcome.code == 0 and max(per_round) > 0, "kills that found nothing in hand prove nothing"


if __name__ == "__main__":
    main()
