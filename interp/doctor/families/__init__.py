"""Tiny random models of every architecture family that the matrix checks: their configs, built on demand."""
