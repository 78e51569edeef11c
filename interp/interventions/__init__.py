"""Interventions inside attention, addressed by layers and heads of a model and tokens of a prompt.

`AttentionEdit` changes how queries read keys, `AttentionMask` which keys they see. `interp.edit` compares several of
them, and ``model.edited(…)`` applies them to every forward.
"""

from interp.interventions.edits import ON_CELLS, AttentionEdit
from interp.interventions.masks import MASK_FIELDS, AttentionMask

AttentionChange = AttentionEdit | AttentionMask

__all__ = ["ON_CELLS", "AttentionChange", "AttentionEdit", "AttentionMask", "parse_change"]


def parse_change(text: str) -> AttentionChange:
    """Read an edit or a mask as it is written on the command line and in configs.

        parse_change("knockout keys=subject")      # an AttentionEdit
        parse_change("open=image>question")        # an AttentionMask

    A text that sets a field which only masks have is a mask. Raises InterpError for anything else.
    """
    names = {word.partition("=")[0] for word in text.split()}
    return AttentionEdit.parse(text) if names.isdisjoint(MASK_FIELDS) else AttentionMask.parse(text)
