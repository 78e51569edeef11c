"""The engine: records base runs, writes activations into them, reads a metric.

Sweeps run forwards only here.
"""

from interp.engine.cells import Cell, CellWrite
from interp.engine.core import Engine
from interp.engine.plan import Plan, explain
from interp.engine.runs import Run

__all__ = ["Cell", "CellWrite", "Engine", "Plan", "Run", "explain"]
