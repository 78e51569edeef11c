"""Benchmark of the backends against plain attention: ``python -m headstats.bench``."""
