"""Helpers that know nothing of models: files, progress, provenance, argument checks."""
