"""Facts: where the embedded model's states, MLPs and attention restore a fact whose subject is drowned in noise.

    python experiments/facts_tracing.py [RUN]

Runs `facts_tracing.toml` (or goes on with it) and writes results/facts_tracing.csv: average indirect effect by layer
and kind of token, for single states and for windows of ten MLPs or attention layers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

import interp

HERE = Path(__file__).parent


def main() -> None:
    """See the module's first lines."""
    sweep = interp.Sweep(HERE / "facts_tracing.toml", *sys.argv[1:2])
    print(outcome := sweep.run())
    tables = []
    for title, effects in sweep.effects().items():
        table = interp.trace_table(effects, seed=0)
        tables.append(table.assign(restored=title.split(" · ")[2]))
    table = pd.concat(tables, ignore_index=True)
    table.to_csv(HERE / "results" / "facts_tracing.csv", index=False, float_format="%.5g")
    best = table.loc[table.groupby(["restored", "category"], observed=True)["AIE"].idxmax()]
    print("the layer with the largest average indirect effect, by what is restored and at which token:")
    print(best[["restored", "category", "layer", "AIE", "lo", "hi", "share"]].round(3).to_string(index=False))
    sys.exit(outcome.code)


if __name__ == "__main__":
    main()
