"""Measurements of interp beside other libraries, on this machine: `interp bench sweeps`."""
