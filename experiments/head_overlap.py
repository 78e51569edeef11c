"""Head overlap: whether two tasks use the same heads.

    python experiments/head_overlap.py experiments/component_reuse.toml [RUN]
    python experiments/head_overlap.py experiments/recall_reasoning.toml [RUN]

Claims: the heads of indirect object identification are reused for colored objects (Merullo et al. 2024,
`component_reuse.toml`); heads that matter where a fact is recalled differ from those that matter where the prompt
states it (`recall_reasoning.toml`).

Runs the sweep, or resumes it. Writes results/NAME.csv, the effect of every head on both tasks, and results/NAME.json:
the accuracy of the model on each task, the rank correlation of the heads' effects, and how many of the ten strongest
heads the two tasks share.

Result (12 prompts a task): IOI and colored objects share 6 of their ten strongest heads, recall and reasoning 4.

Null: pairs of random sets of ten heads share 0.4 on average. Ceiling: two halves of the prompts of one task share 9.2
(IOI), 7.9 (colored objects), 9.2 (recall) and 4.8 (reasoning). The embedded model does reasoning on 58% of the 12
prompts: too few to say that its heads are others.
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
    """Return the mean recovery of each head, as a ratio of means over prompts.

    A ratio of means is not dominated by a prompt with a small gap between clean and corrupt.
    """
    part = frame if examples is None else frame[frame["example"].isin(examples)]
    means = part.groupby(["layer", "head"])[["raw", "clean", "corrupt"]].mean()
    return means["raw"] / (means["corrupt"] - means["clean"])


def count_shared(a: pd.Series, b: pd.Series) -> int:
    """Count the heads that are among the ten with the largest effect in both tasks."""
    return len(set(a.abs().nlargest(K).index) & set(b.abs().nlargest(K).index))


def overlap_of_halves(frame: pd.DataFrame) -> float:
    """Return the mean overlap of two halves of a task over twenty random splits."""
    numbers, rng = frame["example"].unique(), np.random.default_rng(0)
    overlaps = []
    for _ in range(20):
        mixed = rng.permutation(numbers)
        overlaps.append(count_shared(*(strength(frame, part) for part in np.array_split(mixed, 2))))
    return float(np.mean(overlaps))


def main() -> None:
    """Run or resume the sweep, compare the two tasks, and write the results."""
    config = Path(sys.argv[1])
    sweep = interp.Sweep(config, *sys.argv[2:3])
    print(outcome := sweep.run())
    frames = {title.split(" · ")[1]: e.frame() for title, e in sweep.effects().items()}
    for reason in sweep.failures()["error"].unique():
        print("failed:", reason)
    result: dict[str, object] = {"prompts": {name: int(f["example"].nunique()) for name, f in frames.items()}}
    result["behaviour"] = {title.split(" · ")[1]: e.provenance["behaviour"] for title, e in sweep.effects().items()}
    result["failed_cells"] = outcome.failed
    table = pd.DataFrame({name: strength(frame) for name, frame in frames.items()})
    for a, b in combinations(frames, 2):
        result["rank_correlation"] = float(table[a].abs().rank().corr(table[b].abs().rank()))
        result["shared_of_ten"], result["shared_by_chance"] = count_shared(table[a], table[b]), K * K / len(table)
        result["shared_by_halves"] = {name: overlap_of_halves(frame) for name, frame in frames.items()}
    name = config.stem
    table.reset_index().to_csv(HERE / "results" / f"{name}.csv", index=False, float_format="%.5g")
    (HERE / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(outcome.code)


if __name__ == "__main__":
    main()
