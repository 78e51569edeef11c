"""Helpers that do not depend on models: files, progress, provenance, argument checks."""
