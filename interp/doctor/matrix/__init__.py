"""The architecture matrix: routed through headstats, a model stays the same.

Each check runs one tiny random-weight family of `interp.doctor.families.text` three ways: through headstats, with
Hugging Face's eager attention, and by TransformerLens' own path. It returns the largest difference, relative to the
largest compared value.
"""

from interp.doctor.matrix.case import ALLOWED, WORDS, FamilyCase, difference
from interp.doctor.matrix.table import (
    CHECKS,
    FamilyRow,
    Matrix,
    Verdict,
    architectures,
    examine_family,
    header,
    run_check,
)

__all__ = [
    "ALLOWED", "CHECKS", "WORDS", "FamilyCase", "FamilyRow", "Matrix", "Verdict", "architectures", "difference",
    "examine_family", "header", "run_check",
]  # fmt: skip
