"""The architecture matrix: is a model, routed through headstats, still the model that Hugging Face wrote?

Each check runs one tiny random-weight family of `interp.doctor.families.text` three ways: ours, Hugging Face's
eager attention, and TransformerLens' own path. It answers with the largest difference, relative to the size of
what it compares.
"""

from interp.doctor.matrix.case import ALLOWED, WORDS, Case, difference
from interp.doctor.matrix.table import CHECKS, Matrix, Row, Verdict, architectures, examine_family, header, run_check

__all__ = [
    "ALLOWED", "CHECKS", "WORDS", "Case", "Matrix", "Row", "Verdict", "architectures", "difference", "examine_family",
    "header", "run_check",
]  # fmt: skip
