"""Interventions, addressed by layers and heads of a model and tokens of a prompt.

`AttentionEdit` changes how queries read keys, `AttentionMask` which keys they see, and `Write` an activation.
`interp.edit` compares several of them; ``model.edited(…)`` applies edits and masks to every forward.
"""

from interp.interventions.edits import OF_WEIGHTS, ON_CELLS, AttentionEdit
from interp.interventions.masks import MASK_FIELDS, AttentionMask
from interp.interventions.writes import WRITE_FIELDS, Write

AttentionChange = AttentionEdit | AttentionMask
Change = AttentionChange | Write

__all__ = [
    "OF_WEIGHTS", "ON_CELLS", "AttentionChange", "AttentionEdit", "AttentionMask", "Change", "Write", "parse_change",
]  # fmt: skip


def parse_change(text: str) -> Change:
    """Read an edit, a mask or a write as it is written on the command line and in configs.

        parse_change("knockout keys=subject")      # an AttentionEdit
        parse_change("open=image>question")        # an AttentionMask
        parse_change("site=z.L9H6@-1 set=0")       # a Write

    A text that sets a field which only masks or writes have is one. Raises InterpError for anything else.
    """
    names = {word.partition("=")[0] for word in text.split()}
    if not names.isdisjoint(WRITE_FIELDS):
        return Write.parse(text)
    return AttentionEdit.parse(text) if names.isdisjoint(MASK_FIELDS) else AttentionMask.parse(text)
