"""Measurements of interp next to other libraries: `interp bench sweeps`."""
