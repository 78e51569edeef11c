"""The engine: record base runs, write activations into them, read a metric. Sweeps meet forwards only here."""

from interp.engine.cells import Cell, Write
from interp.engine.core import Engine
from interp.engine.runs import Run

__all__ = ["Cell", "Engine", "Run", "Write"]
