"""How heads change with the length of the context: entropy, sink mass and distance at 512 to 8,192 tokens.

    python experiments/head_statistics.py [--lengths 512 2048 8192] [--tokens 8192] [--runs runs]

The same tokens, of this repository's documentation, cut to windows of each length; resumed like any run over a corpus.
Writes results/head_statistics.csv: mean and median of every statistic, by length, layer and head.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import interp
from interp import corpus

HERE = Path(__file__).parent


def main() -> None:
    """See the module's first lines."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192])
    ask.add_argument("--tokens", type=int, default=8192)
    ask.add_argument("--runs", type=Path, default=Path("runs"))
    options = ask.parse_args()
    model = interp.load("smollm2")
    pages = sorted((HERE.parent / "docs").rglob("*.md"))
    text = "\n".join(p.read_text(encoding="utf-8") for p in (HERE.parent / "README.md", *pages))
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"][: options.tokens]
    options.runs.mkdir(parents=True, exist_ok=True)
    np.save(options.runs / "head_statistics.npy", np.array(ids, dtype=np.int32))
    tables = []
    for length in options.lengths:
        found = corpus.statistics(
            model, options.runs / "head_statistics.npy", options.runs / f"head-statistics-{length}", context=length,
            statistics={"entropy": True, "sink": 1, "distance": True, "max_prob": True},
        )  # fmt: skip
        print(f"{length}: {found.tokens:,} tokens")
        tables.append(found.frame().assign(context=length))
    table = pd.concat(tables, ignore_index=True)[["context", "layer", "head", "statistic", "count", "mean", "q50"]]
    table.to_csv(HERE / "results" / "head_statistics.csv", index=False, float_format="%.5g")
    print(table.pivot_table(index="context", columns="statistic", values="mean").round(3))


if __name__ == "__main__":
    main()
