"""Do two tasks use the same heads? For `component_reuse.toml` and `recall_reasoning.toml`.

    python experiments/head_overlap.py experiments/component_reuse.toml [RUN]

Runs the sweep (or goes on with it) and writes results/NAME.csv, every head's effect on both tasks, and
results/NAME.json: how well the model does each task, the rank correlation of the heads' effects, and how many of one
task's ten strongest heads are among the other's, against what pairs of random sets of ten share, and the overlap of two
halves of the same task's prompts.
"""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

import interp

HERE, K = Path(__file__).parent, 10


def strength(frame: pd.DataFrame, examples: object = None) -> pd.Series:
    """Mean change of the metric by head: ratio of means over prompts, which no small gap dominates."""
    part = frame if examples is None else frame[frame["example"].isin(examples)]
    means = part.groupby(["layer", "head"])[["raw", "clean", "corrupt"]].mean()
    return means["raw"] / (means["corrupt"] - means["clean"])


def shared(a: pd.Series, b: pd.Series) -> int:
    """Heads that are among the ten of largest effect in both."""
    return len(set(a.abs().nlargest(K).index) & set(b.abs().nlargest(K).index))


def halves(frame: pd.DataFrame) -> float:
    """Mean overlap of two halves of a task's prompts, over twenty random cuts."""
    numbers, rng = frame["example"].unique(), np.random.default_rng(0)
    found = []
    for _ in range(20):
        mixed = rng.permutation(numbers)
        found.append(shared(*(strength(frame, part) for part in np.array_split(mixed, 2))))
    return float(np.mean(found))


def main() -> None:
    """See the module's first lines."""
    config = Path(sys.argv[1])
    sweep = interp.Sweep(config, *sys.argv[2:3])
    print(outcome := sweep.run())
    frames = {title.split(" · ")[1]: e.frame() for title, e in sweep.effects().items()}
    for reason in sweep.failures()["error"].unique():
        print("failed:", reason)
    found: dict[str, object] = {"prompts": {name: int(f["example"].nunique()) for name, f in frames.items()}}
    found["behaviour"] = {title.split(" · ")[1]: e.provenance["behaviour"] for title, e in sweep.effects().items()}
    found["failed_cells"] = outcome.failed
    table = pd.DataFrame({name: strength(frame) for name, frame in frames.items()})
    for a, b in combinations(frames, 2):
        found["rank_correlation"] = float(table[a].abs().rank().corr(table[b].abs().rank()))
        found["shared_of_ten"], found["shared_by_chance"] = shared(table[a], table[b]), K * K / len(table)
        found["shared_by_halves"] = {name: halves(frame) for name, frame in frames.items()}
    name = config.stem
    table.reset_index().to_csv(HERE / "results" / f"{name}.csv", index=False, float_format="%.5g")
    (HERE / "results" / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    sys.exit(outcome.code)


if __name__ == "__main__":
    main()
