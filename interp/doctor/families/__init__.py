"""Tiny random models of every architecture family that the matrix checks, built on demand."""
