"""Interventions on attention weights, and their lowering for other backends."""
