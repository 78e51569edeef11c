"""Tiny random models of every architecture family that the matrix checks.

They are built on demand.
"""
