"""Interventions on attention weights: what an `Edit` means, and how backends without it carry it out."""
