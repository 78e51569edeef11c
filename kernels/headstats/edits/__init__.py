"""Interventions on attention weights: the meaning of an `Edit`, and its rewriting for backends that lack it."""
