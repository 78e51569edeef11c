"""Learn circuits by gradient descent: head gates, DiffMask+, edge pruning."""
