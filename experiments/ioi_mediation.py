"""IOI: how much of a name swap's effect passes through each head of the embedded model.

    python experiments/ioi_mediation.py [RUN]

Runs `ioi_mediation.toml` (or goes on with it) and writes results/ioi_mediation.csv: for every head the total, natural
direct and natural indirect effect and their interaction, with 95% bootstrap intervals over prompts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import interp

HERE = Path(__file__).parent


def main() -> None:
    """See the module's first lines."""
    sweep = interp.Sweep(HERE / "ioi_mediation.toml", *sys.argv[1:2])
    print(outcome := sweep.run())
    (effects,) = sweep.effects().values()
    table = effects.summary(by=["layer", "head", "intervention"], seed=0)
    columns = ["layer", "head", "intervention", "n", "raw", "raw_lo", "raw_hi", "pooled", "pooled_lo", "pooled_hi"]
    table = table[columns].sort_values(["intervention", "layer", "head"])
    table.to_csv(HERE / "results" / "ioi_mediation.csv", index=False, float_format="%.5g")
    indirect = table[table["intervention"] == "natural indirect effect"]
    strongest = indirect.reindex(indirect["pooled"].abs().sort_values(ascending=False).index).head(8)
    print("share of the total effect that passes through a head (pooled over prompts):")
    print(strongest[["layer", "head", "pooled", "pooled_lo", "pooled_hi"]].to_string(index=False))
    sys.exit(outcome.code)


if __name__ == "__main__":
    main()
