"""Interventions inside attention, addressed by layers and heads of a model and tokens of a prompt.

`AttentionEdit` changes how queries read keys, `AttentionMask` which keys they see. `interp.edit` compares
several edits, and ``model.edited(…)`` applies edits and masks to every forward.
"""

from interp.interventions.edits import ON_CELLS, AttentionEdit
from interp.interventions.masks import AttentionMask

AttentionChange = AttentionEdit | AttentionMask

__all__ = ["ON_CELLS", "AttentionChange", "AttentionEdit", "AttentionMask"]
