"""Measure the backends beside plain attention: ``python -m headstats.bench``."""
