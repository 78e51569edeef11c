"""Benchmark of the backends: ``python -m headstats.bench``."""
