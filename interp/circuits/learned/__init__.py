"""Learn circuits by gradient descent: causal head gating, DiffMask+, edge pruning."""
