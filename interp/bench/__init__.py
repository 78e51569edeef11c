"""Measurements of interp next to other libraries, on this machine: `interp bench sweeps`."""
