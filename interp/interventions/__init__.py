"""Interventions inside attention, addressed by layers and heads of a model and tokens of a prompt.

`AttentionEdit` changes how queries read keys. `interp.edit` compares several of them, and ``model.edited(…)`` applies
them to every forward.
"""

from interp.interventions.edits import ON_CELLS, AttentionEdit

__all__ = ["ON_CELLS", "AttentionEdit"]
