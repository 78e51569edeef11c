"""IOI mediation: how much of the effect of a name swap passes through each head.

    python experiments/ioi_mediation.py [RUN]

Question: which heads of the embedded model mediate indirect object identification? Runs `ioi_mediation.toml`, or
resumes it, and writes results/ioi_mediation.csv: for every head the total, natural direct and natural indirect effect
and their interaction, with 95% bootstrap intervals over prompts.

Result (12 pairs; share of the total effect that passes through a head, pooled over prompts): L23H3 0.53 [0.47, 0.61],
L20H0 0.42 [0.36, 0.48], L29H1 0.26 [0.25, 0.28]; L24H4 works against the swap with −0.25 [−0.34, −0.18]. Shares of
single heads need not add up to 1. Null: a head that mediates nothing has an indirect effect of 0; the mean of the
indirect effects over all 270 heads is −0.04 logits, of a total effect of −9.05.
"""

from __future__ import annotations

import sys
from pathlib import Path

import interp

HERE = Path(__file__).parent


def main() -> None:
    """Run or resume the sweep, write the table, and print the strongest mediators."""
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
