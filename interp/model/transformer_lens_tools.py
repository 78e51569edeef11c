"""Tools of TransformerLens for other rooms: factored matrices and interchange interventions.

Only `interp.model` imports transformer_lens. Importing this module is slow, so modules that need it are loaded lazily.
"""

from __future__ import annotations

from transformer_lens.FactoredMatrix import FactoredMatrix
from transformer_lens.tools.analysis.interchange import (
    SubspaceInterchange,
    collect_activations,
    fit_das,
    intervened_logits,
    run_with_intervention,
)

__all__ = [
    "FactoredMatrix",
    "SubspaceInterchange",
    "collect_activations",
    "fit_das",
    "intervened_logits",
    "run_with_intervention",
]
