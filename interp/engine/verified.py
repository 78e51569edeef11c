"""What has been verified about a model, so that checks are made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from interp.engine.cells import CellWrite
from interp.engine.runs import Frame
from interp.model.layer_edits import LayerEdit
from interp.model.layer_masks import LayerMask
from interp.model.model import Model


@dataclass(frozen=True)
class VerifiedFrame:
    """A frame on which base runs by plain blocks agreed with the model's own.

    ``setting``: the device, dtype and config on which the frame depends.
    """

    setting: str
    frame: Frame


@dataclass
class Verified:
    """What has been verified about one model.

    `Verified.of` returns the model's instance.
    """

    packed_changes: set[frozenset[str]] = field(default_factory=set)
    """Sets of components, and of fields of edits, whose packed cells agreed with full forwards."""

    plain_blocks_differ: bool = False
    """Whether plain blocks gave other numbers than the model's own blocks, so that they are not used."""

    plain_base_runs: VerifiedFrame | None = None
    """The frame with which base runs may be computed by plain blocks; None until that has been verified."""

    packed_circuits: bool | None = None
    """Whether circuits computed packed agreed with one full forward each; None until that has been tried."""

    @classmethod
    def of(cls, model: Model) -> Verified:
        """The model's instance: empty at the first call, the same one afterwards."""
        return VERIFIED.setdefault(model, cls())

    @staticmethod
    def forget(model: Model) -> None:
        """Forget everything about a model, as if it had just been loaded."""
        VERIFIED.pop(model, None)


VERIFIED: WeakKeyDictionary[Model, Verified] = WeakKeyDictionary()  # an entry goes with its model


def kinds_of(change: CellWrite | LayerEdit | LayerMask) -> tuple[str, ...]:
    """What is checked once for each model: a component that is written, a field of an edit."""
    if isinstance(change, LayerEdit):
        return change.edit.changes
    if isinstance(change, LayerMask):
        return change.mask.changes
    component = change.site.component
    return (f"{component} by a mean of heads",) if change.how == "mean" else (component,)
